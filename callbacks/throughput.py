"""Logs steps per second and peak memory beside the metrics, at the trainer's logging interval."""

from __future__ import annotations

import resource
import time
from typing import Any

import lightning as L
import torch


class Throughput(L.Callback):
    """`perf/steps_per_second` since the last row, `perf/peak_memory_mb` of this process."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.global_step - self._step
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped + 1  # what Lightning goes by
        if not steps or logged % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        pl_module.log("perf/steps_per_second", steps / (now - self._since), batch_size=1)
        pl_module.log("perf/peak_memory_mb", peak_memory_mb(), batch_size=1)
        self._since, self._step = now, trainer.global_step


def peak_memory_mb() -> float:
    """Peak allocated (GPU) or resident (CPU) memory of this process, MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
