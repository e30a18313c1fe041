"""Ends a fit that was told to stop (SIGTERM, SIGUSR1) after a whole batch and with everything saved.

Lightning's own way does not serve here: on SIGTERM it saves nothing and exits with 0, its handler for SIGUSR1 requeues
the job from inside the fit alone, and with several ranks both send a collective from within the signal handler, which
meets other collectives in another order on each rank. Here the handler only notes the signal. After each batch the
ranks agree whether any of them was told; then all save, and leave before the next batch with `EXIT_CODES`.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks.signals import EXIT_CODES

log = logging.getLogger(__name__)


class StopWhenTold(Callback):
    """Calls `save(trainer, module)` on all ranks, then raises SystemExit with the signal's code.

    Put it behind the callbacks whose work on a batch must be part of what is saved.
    """

    def __init__(self, save: Callable[[L.Trainer, L.LightningModule], None]) -> None:
        self.save = save
        self.told = 0  # the signal that this rank was sent
        self.code: int | None = None  # what all ranks have agreed to exit with

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the place of Lightning's handlers; Lightning puts back the ones before when the fit ends."""

        def note(signum: int, frame: FrameType | None) -> None:
            if not self.told and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)  # type: ignore[attr-defined]  # processes that this one started
            self.told = self.told or signum

        for signum in EXIT_CODES:
            signal.signal(signum, note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        told = self.told  # it may change between the two questions
        if self.code is None and trainer.strategy.reduce_boolean_decision(bool(told), all=False):
            ends = trainer.strategy.reduce_boolean_decision(told == signal.SIGTERM, all=False)
            self.save(trainer, pl_module)
            log.info("told to stop: saved after step %d", trainer.global_step)
            self.code = EXIT_CODES[signal.SIGTERM if ends else signal.SIGUSR1]

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


def checkpoints(folder: Path, every: int) -> list[Callback]:
    """`folder/last.ckpt`, replaced every so many optimiser steps and before an end by signal; see `last_checkpoint`."""
    periodic = ModelCheckpoint(folder, filename="last", every_n_train_steps=every, enable_version_counter=False)
    return [periodic, StopWhenTold(lambda trainer, _: trainer.save_checkpoint(folder / "last.ckpt"))]


def last_checkpoint(folder: Path) -> Path | None:
    """What an interrupted attempt has left there, for `fit(ckpt_path=...)`."""
    path = folder / "last.ckpt"
    return path if path.exists() else None
