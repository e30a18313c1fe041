"""Every batch of answers is on the disk before the next one is generated (evaluation/rows.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from callbacks.progress import Progress
from datamodules.prompt_batches import PromptBatch
from evaluation.rows import GenerationLog


class GenerationWriter(BasePredictionWriter):
    """Appends to `generations` what was `missing` there (ids), and moves `progress`."""

    def __init__(self, generations: GenerationLog, progress: Progress, missing: Collection[str]) -> None:
        super().__init__(write_interval="batch")
        self.generations, self.progress, self.missing = generations, progress, missing

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
        new = [(p, said) for p, said in zip(batch.prompts, prediction, strict=True) if p.id in self.missing]
        self.generations.append([p for p, _ in new], [said for _, said in new])
        self.progress.advance(len(new))
