"""A model that answers batches of benchmark prompts: `Trainer.predict` divides them over devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from datamodules.prompt_batches import PromptBatch
from lightning_modules.at_work import AtWork
from mllm.generate import answer
from mllm.loading import MLLM


class Answerer(L.LightningModule):
    """Greedy answers of at most `max_new_tokens`.

    Args:
        model: `mllm.model`, or it under an adapter.
    """

    def __init__(self, mllm: MLLM, model: torch.nn.Module, max_new_tokens: int) -> None:
        super().__init__()
        self.at_work = AtWork()
        self.mllm, self.model, self.max_new_tokens = mllm, model, max_new_tokens

    def predict_step(self, batch: PromptBatch, batch_idx: int = 0) -> list[str]:
        texts = [p.text for p in batch.prompts]
        self.at_work.on(batch_idx, lambda: self.described(texts, batch.media is not None))
        return answer(self.mllm, texts, batch.media, self.max_new_tokens, self.model)

    def described(self, texts: list[str], media: bool) -> tuple[int, str, int]:
        """The batch; a medium counts with as many tokens as the blank."""
        longest = max(len(self.mllm.prompts.prompt(text, media)) for text in texts)
        return len(texts), "prompts", longest + self.max_new_tokens

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # texts and media in memory; the processor makes tensors of them
