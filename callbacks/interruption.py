"""Ends a fit that was told to stop (Ctrl-C, SIGTERM, SIGUSR1) after a whole batch and with everything saved.

Lightning's own way does not serve here: on SIGTERM it saves nothing and exits with 0, on Ctrl-C it saves nothing, its
handler for SIGUSR1 requeues the job from inside the fit alone, and with several ranks these send a collective from
within the signal handler, which meets other collectives in another order on each rank. Here the handler only notes the
signal. After each batch the ranks agree whether any of them was told; then all save, and leave before the next batch
with `EXIT_CODES`.

What is saved is all that the next step depends on: a fit that goes on from it computes what it would have computed
(docs/resuming.md). Weights, optimiser, schedule and counters are Lightning's; the state of the random generators is
added here; which batch comes next follows from the step.
"""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from callbacks.metrics_file import cut, flush
from callbacks.signals import EXIT_CODES

log = logging.getLogger(__name__)

LAST, NEXT = "last.ckpt", "next.ckpt"
FIRST_CTRL_C = b"\nstops after this step and saves; Ctrl-C again ends at once\n"


class StopWhenTold(Checkpoint):
    """Calls `save(trainer, module)` on all ranks, then raises SystemExit with the signal's code.

    A `Checkpoint`, so that Lightning calls it after the callbacks whose work on a batch must be part of what is saved,
    and adds no checkpoints of its own.
    """

    def __init__(self, save: Callable[[L.Trainer, L.LightningModule], None]) -> None:
        self.save = save
        self.told = 0  # the signal that this rank was sent
        self.code: int | None = None  # what all ranks have agreed to exit with

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the place of Lightning's handlers; Lightning puts back the ones before when the fit ends."""

        def note(signum: int, frame: FrameType | None) -> None:
            if signum == signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)  # even where a step hangs in a library, the next one ends it
                if trainer.is_global_zero:
                    os.write(2, FIRST_CTRL_C)
            if not self.told and trainer.strategy.launcher is not None:
                # Processes that this one started. A terminal sends Ctrl-C to them too: a second one would end them.
                passed_on = signal.SIGTERM if signum == signal.SIGINT else signum
                trainer.strategy.launcher.kill(passed_on)  # type: ignore[attr-defined]
            self.told = self.told or signum

        for signum in EXIT_CODES:
            signal.signal(signum, note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        told = self.told  # it may change between the questions
        if self.code is None and trainer.strategy.reduce_boolean_decision(bool(told), all=False):
            self.code = EXIT_CODES[signal.SIGUSR1]
            for signum in (signal.SIGTERM, signal.SIGINT):  # the last one counts
                if trainer.strategy.reduce_boolean_decision(told == signum, all=False):
                    self.code = EXIT_CODES[signum]
            self.save(trainer, pl_module)
            log.info("told to stop: saved after step %d", trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Only here, so that the metrics of the batch before are logged."""
        self._leave()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The batch was the last one: a signal must not be lost."""
        self._leave()

    def _leave(self) -> None:
        if self.code is not None:
            raise SystemExit(self.code)


class ResumePoints(Checkpoint):
    """`folder/last.ckpt`, replaced every `every` optimiser steps.

    A step's metrics are logged after its checkpoint is made; it counts (gets its name) only then, or a kill in between
    would cost the curve a row.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._pending = False
        self._random: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The rows of steps that are done again are taken back."""
        cut(trainer, trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._publish(trainer)
        if self._random is not None:  # only now: to begin with, Lightning and the loader draw numbers too
            set_random_state(self._random)
            self._random = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish(trainer)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a batch, on all ranks."""
        if not self._pending:
            trainer.save_checkpoint(self.folder / NEXT)
            self._pending = True

    def _publish(self, trainer: L.Trainer) -> None:
        if self._pending:
            flush(trainer)
            if trainer.is_global_zero:
                (self.folder / NEXT).replace(self.folder / LAST)
            self._pending = False

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict


def checkpoints(folder: Path, every: int) -> list[Callback]:
    """`folder/last.ckpt`, replaced every so many optimiser steps and before an end by signal; see `last_checkpoint`."""
    points = ResumePoints(folder, every)
    return [points, StopWhenTold(points.save)]


def last_checkpoint(folder: Path) -> Path | None:
    """What an interrupted attempt has left there, for `fit(ckpt_path=...)`."""
    path = folder / LAST
    return path if path.exists() else None


def random_state() -> dict[str, Any]:
    """Of all generators that a step may draw from (dropout), as values that torch.load(weights_only=True) takes."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """What `random_state` gave, on the device at hand."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
