"""Every batch of answers is on the disk before the next one is generated (evaluation/rows.py)."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from callbacks.progress import Progress
from datamodules.prompt_batches import PromptBatch
from evaluation.rows import GenerationLog


class GenerationWriter(BasePredictionWriter):
    """Appends to `generations` and moves `progress`."""

    def __init__(self, generations: GenerationLog, progress: Progress) -> None:
        super().__init__(write_interval="batch")
        self.generations, self.progress = generations, progress

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: list[str],
        batch_indices: Sequence[int] | None,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.generations.append(batch.prompts, prediction)
        self.progress.advance(len(batch.prompts))
