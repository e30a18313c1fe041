"""Asks a model a part of the benchmarks while it is trained: what a sweep prunes by, and what training may end by.

Losses cannot be compared between settings (beta scales DPO's), answers can: the objective (evaluation/objective.py) of
the same few prompts, judged by the refusal judge, whatever judge the report uses. The trained weights are those of the
step at which training ended.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch

from datamodules.prompt_batches import PromptBatches
from evaluation.objective import answers_objective
from evaluation.rows import GenerationRow
from lightning_modules.at_work import AtWork
from mllm.generate import answer
from mllm.loading import MLLM

log = logging.getLogger(__name__)


class Probe(L.Callback):
    """Logs `probe/asr`, `probe/benign_compliance` and `probe/objective` every so many steps.

    Put it before the callbacks that save: a resumed fit knows what was found before.

    Args:
        batches: prompts and media, the same each time. Every rank asks all of them.
        every: optimiser steps between two probes.
        patience: training ends after so many probes in turn without a better objective; None: never.
        batch_size: `evaluate.batch_size`, which is told if memory does not suffice.
    """

    def __init__(
        self,
        name: str,
        mllm: MLLM,
        batches: PromptBatches,
        every: int,
        max_new_tokens: int,
        patience: int | None = None,
        batch_size: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.name, self.mllm, self.batches, self.every = name, mllm, batches, every
        self.max_new_tokens, self.patience = max_new_tokens, patience
        self.best, self.since, self.last = -1.0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.since, self.last = state_dict["best"], state_dict["since"], state_dict["last"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_spent(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self.last:
            return
        with AtWork(f"{self.name}, probe after {step} steps", {"evaluate.batch_size": self.batch_size}).told():
            found = answers_objective(self.ask(pl_module))
        for logger in trainer.loggers:
            # Under the number of the batch, as the fit's own rows: a resumed fit takes back those of later batches.
            logger.log_metrics({f"probe/{name}": value for name, value in found.items()}, step=step - 1)
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        log.info("%s after %d steps: %s", self.name, step, told)
        self.last = step
        self.since = 0 if found["objective"] > self.best else self.since + 1
        self.best = max(self.best, found["objective"])
        self._stop_if_spent(trainer)

    def ask(self, module: L.LightningModule) -> list[GenerationRow]:
        """Every prompt with its answer by the weights as they are now."""
        modes = [(m, m.training) for m in module.modules()]
        rows = []
        module.eval()
        try:
            for i in range(len(self.batches)):
                b = self.batches[i]
                texts = [p.text for p in b.prompts]
                model = module.model
                assert isinstance(model, torch.nn.Module)
                answers = answer(self.mllm, texts, b.media, self.max_new_tokens, model)
                rows += [
                    GenerationRow(p.id, p.benchmark, p.task, p.scenario, p.request, p.text, said, p.expected, self.name)
                    for p, said in zip(b.prompts, answers, strict=True)
                ]
        finally:
            for m, training in modes:
                m.training = training
        return rows

    def _stop_if_spent(self, trainer: L.Trainer) -> None:
        """All ranks together: rounding may let one of them judge otherwise."""
        spent = self.patience is not None and self.since >= self.patience
        if self.patience is not None and trainer.strategy.reduce_boolean_decision(spent, all=False):
            log.info("%s: %d probes without a better objective, training ends", self.name, self.since)
            trainer.should_stop = True
