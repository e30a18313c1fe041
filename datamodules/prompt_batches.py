"""Benchmark prompts in batches for generation, divided among the ranks of a launch.

Text and media stand apart, prompts of like length together. Rank r of n takes every n-th batch from the r-th: batches
are what they are on one device, so answers do not depend on the number of devices. Nor on an interruption: what is
missing is asked in the batch it always belonged to, for padding is not quite neutral to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from datamodules.benchmark_prompts import BenchmarkPrompt, open_media
from datamodules.media_files import MediaRules


@dataclass(frozen=True)
class PromptBatch:
    """Prompts and their media as the model's processor takes them; None: all are of text alone."""

    prompts: list[BenchmarkPrompt]
    media: list[Any] | None


def batched(prompts: Sequence[BenchmarkPrompt], size: int) -> list[list[BenchmarkPrompt]]:
    """Each prompt once, at most `size` together."""
    groups = [sorted((p for p in prompts if (p.media is None) == text), key=lambda p: len(p.text)) for text in (1, 0)]
    return [group[at : at + size] for group in groups for at in range(0, len(group), size)]


def unanswered(prompts: Sequence[BenchmarkPrompt], size: int, missing: Collection[str]) -> list[list[BenchmarkPrompt]]:
    """Of the batches of all prompts those, whole, in which an answer is missing; `missing`: ids."""
    return [batch for batch in batched(prompts, size) if any(p.id in missing for p in batch)]


class PromptBatches(Dataset[PromptBatch]):
    """Media are opened when their batch comes. Raises ValueError naming a file that is missing or broken."""

    def __init__(self, batches: Sequence[list[BenchmarkPrompt]], rules: MediaRules) -> None:
        self.batches, self.rules = batches, rules

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PromptBatch:
        prompts = self.batches[i]
        media = None if prompts[0].media is None else [open_media(p, self.rules) for p in prompts]
        return PromptBatch(prompts, media)


class PromptDataModule(L.LightningDataModule):
    """`batches`: of all ranks."""

    def __init__(self, batches: Sequence[list[BenchmarkPrompt]], rules: MediaRules) -> None:
        super().__init__()
        self.batches, self.rules = batches, rules

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        assert self.trainer is not None
        mine = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(PromptBatches(mine, self.rules), batch_size=None)
