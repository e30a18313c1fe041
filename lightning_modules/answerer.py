"""A model that answers batches of benchmark prompts: `Trainer.predict` divides them over devices."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from datamodules.prompt_batches import PromptBatch
from mllm.generate import answer
from mllm.loading import MLLM


class Answerer(L.LightningModule):
    """Greedy answers of at most `max_new_tokens`.

    Args:
        model: `mllm.model`, or it under an adapter.
    """

    def __init__(self, mllm: MLLM, model: torch.nn.Module, max_new_tokens: int) -> None:
        super().__init__()
        self.mllm, self.model, self.max_new_tokens = mllm, model, max_new_tokens

    def predict_step(self, batch: PromptBatch, batch_idx: int = 0) -> list[str]:
        return answer(self.mllm, [p.text for p in batch.prompts], batch.media, self.max_new_tokens, self.model)

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # texts and media in memory; the processor makes tensors of them
