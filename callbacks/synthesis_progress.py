"""Shows how far the synthesis is: finished embeddings, and what the running slots do before any of them is finished."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from callbacks.progress import Progress
from callbacks.training_progress import TrainingProgress
from lightning_modules.embedding_optimizer import EmbeddingOptimizer
from lightning_modules.slots import SlotAdam


class SynthesisProgress(TrainingProgress):
    """`12/72 embeddings, 0:41 left, step=58 loss=0.31`; the loss is the running slots' mean.

    Put it behind `StoreEmbeddings`: what it counts is on the disk then.

    Args:
        before: embeddings that earlier launches have stored.
        total: those and the ones of this launch.
    """

    def __init__(self, title: str, before: int, total: int) -> None:
        super().__init__(title, "embeddings")
        self.before, self.total = before, total

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar: on every rank, each has a share of its own."""
        assert isinstance(pl_module, EmbeddingOptimizer)
        (adam,) = trainer.optimizers
        assert isinstance(adam, SlotAdam)
        began = time.monotonic()

        def seconds_left() -> float | None:
            left = steps_left(pl_module, adam)
            return left and left * (time.monotonic() - began) / max(1, trainer.global_step)

        self._progress = Progress(
            self.title, self.total, self.unit, done=self.before + pl_module.finished, estimate=seconds_left
        )
        self._progress.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell what has left its slot, and the optimiser step."""
        assert isinstance(pl_module, EmbeddingOptimizer)
        if self._progress is not None:
            done = self.before + pl_module.finished
            self._progress.set(done, step=trainer.global_step, loss=pl_module.mean_loss)


def steps_left(module: EmbeddingOptimizer, optimizer: SlotAdam) -> float | None:
    """Optimiser steps until every slot is empty, if all take as many as the finished ones took.

    None before a whole generation of slots is finished (the quick ones come first, and their mean flatters), and when
    only slots are left that have taken longer than the mean: nobody knows about them.
    """
    if module.finished < len(module.table):
        return None
    mean = module.finished_steps / module.finished
    running = [e.steps_before + optimizer.ages[s] for s, e in enumerate(module.table) if e is not None]
    missing = len(module.queue) * mean + sum(max(0.0, mean - age) for age in running)
    return missing / max(1, len(running)) or None
