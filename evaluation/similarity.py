"""How close in meaning is an answer to its question? Cosine of MiniLM sentence embeddings, in -1..1 (`make minilm`).

all-MiniLM-L6-v2 as published: mean over the tokens of the last hidden states, then normalised; at most 256 tokens.
Reimers & Gurevych 2019, arXiv 1908.10084.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModel, AutoTokenizer

from mllm.minilm import minilm_folder

MAX_TOKENS = 256


class SentenceSimilarity:
    """The encoder, loaded once. Raises ValueError if it has not been made (says how)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        folder = minilm_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).to(device).eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """Unit vectors, float32 [N, 384] on the CPU."""
        parts = []
        for at in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                list(texts[at : at + batch_size]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self.model.device)
            hidden, mask = self.model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.hidden_size)

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        """Cosine of each pair of texts, [N]."""
        return (self.embed(first) * self.embed(second)).sum(-1)
