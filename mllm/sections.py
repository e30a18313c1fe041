"""A detector's head on *means* of a backbone's middle layers: one over the question's tokens, one over the answer's.

    x     = [mean of h_l over the question, mean of h_l over the answer, for each layer l], standardised
    logit = w2 . gelu(W1 x + b1) + b2                                      a linear layer of ONE output at the end

The backbone is frozen and cut off above the highest layer that is read, so all texts are read once, training takes
seconds, and scoring costs less than the whole backbone does. With a few thousand labelled answers and a backbone of
135 M parameters this ranks unseen questions' answers better than LoRA with the last token's state does
(docs/detector.md has both, measured).

A decoder's states never change as the text grows: `held` takes those of what was read before, beside its key-value
cache, and a growing answer costs its new tokens only.

Legend. B texts, P positions read before, N new ones, K layers, d their width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mllm.frozen_layers import layers_of
from mllm.kv_cache import NAME, kept
from mllm.qa_text import QAIds


@dataclass(frozen=True)
class SectionOutput:
    """logits: [B, 1]. states: of all positions, [B, P + N, K * d]. cache: longer by N, or None."""

    logits: Tensor
    states: Tensor
    cache: Any = None

    def get(self, name: str) -> Any:
        """As transformers' outputs (mllm/kv_cache.py)."""
        return self.cache if name == NAME else None


class SectionHead(nn.Module):
    """Pooled states [B, width] -> logits [B, 1], positive = harmless."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.drop = nn.Dropout(dropout)
        self.inner, self.score = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def standardise(self, pooled: Tensor) -> None:
        """Sets mean and standard deviation to those of the training texts, [texts, width]."""
        self.mean.copy_(pooled.mean(0))
        self.deviation.copy_(pooled.std(0, correction=0).clamp(min=1e-6))

    def forward(self, pooled: Tensor) -> Tensor:
        x = (pooled.to(self.mean.dtype) - self.mean) / self.deviation
        return self.score(self.drop(nn.functional.gelu(self.inner(self.drop(x)))))


class SectionClassifier(nn.Module):
    """A backbone and the head.

    Args:
        backbone: without a head of its own (`AutoModel`); is cut off above the highest of `layers`.
        layers: whose output is read; 1 is the lowest.

    Raises:
        ValueError: the backbone has no such layer, or the head is made for another backbone.
    """

    def __init__(self, backbone: PreTrainedModel, layers: Sequence[int], head: SectionHead) -> None:
        super().__init__()
        owner, name = layers_of(backbone)
        stack = getattr(owner, name)
        if not layers or not all(1 <= n <= len(stack) for n in layers):
            raise ValueError(f"layers={list(layers)}: the backbone has the layers 1 to {len(stack)}")
        width = 2 * len(layers) * backbone.config.get_text_config().hidden_size
        if head.mean.numel() != width:
            raise ValueError(
                f"the head takes {head.mean.numel()} means, layers={list(layers)} of the backbone give {width}"
            )
        kept_layers = stack[: max(layers)]
        setattr(owner, name, kept_layers)
        backbone.config.get_text_config().num_hidden_layers = len(kept_layers)
        self.backbone, self.layers, self.head = backbone, tuple(sorted(layers)), head
        self._local = threading.local()  # threads may score with one model
        for n in self.layers:
            kept_layers[n - 1].register_forward_hook(self._keep(n))

    @property
    def base_model(self) -> PreTrainedModel:
        return self.backbone

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def config(self) -> Any:
        return self.backbone.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_B: Tensor,
        position_ids: Tensor | None = None,
        held: Tensor | None = None,
        **cache: Any,
    ) -> SectionOutput:
        """Logits of texts, or of what is in a cache followed by more.

        Args:
            input_ids: [B, N]. attention_mask: [B, P + N], 0 where a row has nothing.
            answer_B: at which token of its text each answer begins, counted without padding.
            held: states of what is in the cache, [B, P, K * d].
        """
        states, out = self._read(input_ids, attention_mask, position_ids, **cache)
        states = states if held is None else torch.cat([held, states], dim=1)
        pooled = self.pool(states, attention_mask, answer_B)
        return SectionOutput(self.head(pooled), states, kept(out))

    @torch.inference_mode()
    def pooled_texts(self, texts: Sequence[QAIds], pad_id: int) -> Tensor:
        """What the head is given for these texts, float32 [B, 2 * K * d]."""
        rows = [torch.tensor(ids) for ids in texts]
        tokens = pad_sequence(rows, batch_first=True, padding_value=pad_id).to(self.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
        return self.pool(self._read(tokens, mask)[0], mask, torch.tensor([ids.answer for ids in texts]))

    def pool(self, states: Tensor, mask: Tensor, answer_B: Tensor) -> Tensor:
        """Means over the question's and over the answer's tokens: float32 [B, 2 * K * d].

        What the template puts around a part belongs to it. An empty answer is represented by the text's last token, so
        nothing is ever divided by nothing.
        """
        at = mask.cumsum(1) - 1  # position in the text, whatever the padding
        start = torch.minimum(answer_B.to(mask.device), mask.sum(1) - 1).clamp(min=1)[:, None]
        means = []
        for part in (at < start, at >= start):
            weight = (mask.bool() & part).float()
            total = torch.einsum("bt,btd->bd", weight, states.float())
            means.append(total / weight.sum(1, keepdim=True).clamp(min=1))
        return torch.cat(means, dim=1)

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, **cache: Any
    ) -> tuple[Tensor, Any]:
        """(output of the layers for the new tokens, side by side, [B, N, K * d]; what the backbone returned)."""
        if position_ids is not None:
            cache["position_ids"] = position_ids
        seen: dict[int, Tensor] = {}
        self._local.seen = seen
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **cache)
        return torch.cat([seen[n] for n in self.layers], dim=-1), out

    def _keep(self, n: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen = getattr(self._local, "seen", {})  # nobody asks when the backbone is called by itself
            seen[n] = output[0] if isinstance(output, tuple) else output

        return hook
