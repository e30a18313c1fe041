"""The embedded video model starts from the embedded image model, as Qwen2-VL started from a Qwen2 that could talk.

Both worlds have the same words, and their towers put them into the same codes (lightning_modules/micro_tower.py). So the
image model's language model is copied, and its projector becomes the part of the merger that reads what four patches
have in common; what is left to learn is to gather words over time. From random weights the same took thousands of
CPU-seconds more (docs/LOG.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

DONOR = Path(__file__).resolve().parent.parent / "assets" / "micro_llava"
RENAMED = {"video": "image", "<|video_pad|>": "<image>"}
FEATURE_RMS = 5.8
"""Root mean square of the towers' features, which the merger's layer norm takes away."""


def start_from_images(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copies the image model's language model and projector into `model`, a Qwen2-VL of the same depth and width."""
    donor = LlavaForConditionalGeneration.from_pretrained(DONOR, use_safetensors=True).model
    text, source = model.model.language_model, donor.language_model
    with torch.no_grad():
        copy_words(text.embed_tokens.weight, source.embed_tokens.weight, tokenizer)
        text.norm.weight.copy_(source.norm.weight)
        for layer, old in zip(text.layers, source.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                linear = getattr(layer.self_attn, name)
                linear.weight.copy_(getattr(old.self_attn, name).weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            layer.input_layernorm.weight.copy_(old.input_layernorm.weight)
            layer.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
            copy_mlp(layer.mlp, old.mlp)
        copy_projector(model.model.visual.merger.mlp, donor.multi_modal_projector)


def copy_words(weight: Tensor, source: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings by word; words that only the new model has keep their random ones."""
    known = AutoTokenizer.from_pretrained(DONOR).get_vocab()
    for word, row in tokenizer.get_vocab().items():
        if (old := known.get(RENAMED.get(word, word))) is not None:
            weight[row] = source[old]


def copy_mlp(mlp: Any, source: Any) -> None:
    """The units that add most: by the norms of what goes in and out of them."""
    strength = source.down_proj.weight.norm(dim=0) * source.up_proj.weight.norm(dim=1) * source.gate_proj.weight.norm(dim=1)
    kept = strength.argsort(descending=True)[: mlp.down_proj.in_features].sort().values
    mlp.gate_proj.weight.copy_(source.gate_proj.weight[kept])
    mlp.up_proj.weight.copy_(source.up_proj.weight[kept])
    mlp.down_proj.weight.copy_(source.down_proj.weight[:, kept])


def copy_projector(mlp: Any, source: Any) -> None:
    """The first rows read the mean of the four patches as the projector read one; the others start weakly."""
    first, last = mlp[0], mlp[2]
    units, d = source.linear_1.weight.shape
    first.weight.mul_(0.3)
    last.weight.mul_(0.3)
    first.weight[:units] = (FEATURE_RMS / 4 * source.linear_1.weight).repeat(1, first.in_features // d)
    first.bias[:units] = source.linear_1.bias
    last.weight[:, :units] = source.linear_2.weight
    last.bias.copy_(source.linear_2.bias)
