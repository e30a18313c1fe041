"""Embedded models of other media start from the embedded image model, as Qwen2-VL started from a Qwen that could talk.

The micro world has the same words in every medium, and the towers put them into the same codes (mllm/micro_codes.py).
So the image model's language model is copied word by word; what a family's projector takes over is the family's own.
What is left to learn is little: from random weights the same took many times as long (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration

DONOR = Path(__file__).resolve().parent.parent / "assets" / "micro_llava"


@torch.no_grad()
def start_from_images(text: Any, ids: Mapping[str, int], renamed: Mapping[str, str]) -> nn.Module:
    """Copies the image model's decoder into `text`, of the same depth and width and at most as wide inside.

    Args:
        ids: word -> row of `text`'s token embeddings; words that the image model lacks keep their random ones.
        renamed: word -> the image model's word in whose place it comes.

    Returns:
        The image model's projector.
    """
    donor = LlavaForConditionalGeneration.from_pretrained(DONOR, use_safetensors=True).model
    known = AutoTokenizer.from_pretrained(DONOR).get_vocab()
    weights = donor.language_model.state_dict()
    words = weights.pop("embed_tokens.weight")
    for i, layer in enumerate(text.layers):
        keep_strongest(weights, f"layers.{i}.mlp.", layer.mlp.down_proj.in_features)
    missing, unexpected = text.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    for name, weight in text.named_parameters():
        if name in missing and name.endswith(".bias"):  # Qwen has biases where Llama has none
            weight.zero_()
    for word, row in ids.items():
        if (old := known.get(renamed.get(word, word))) is not None:
            text.embed_tokens.weight[row] = words[old]
    return donor.multi_modal_projector


def keep_strongest(weights: dict[str, torch.Tensor], mlp: str, units: int) -> None:
    """Leaves the `units` that add most, by the norms of what goes into and out of each."""
    gate, up, down = (weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
    strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = strength.argsort(descending=True)[:units].sort().values
    weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"] = gate[kept], up[kept]
    weights[f"{mlp}down_proj.weight"] = down[:, kept]
