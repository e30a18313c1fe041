"""The blueprint of the embedded video model: a genuine Qwen2-VL architecture of 1.0 M parameters, random weights.

A tower with 2-D rotary positions that reads two frames of a clip at a time, the ordinary merger of 2 x 2 patches, a
three-layer Qwen2 with multimodal rotary positions, a word-level tokenizer. `experiment=pretrain_micro_video` trains it;
the trained weights ship in assets/micro_qwen2_vl and load with plain `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from transformers.vision_utils import get_vision_position_ids

from mllm.micro_donor import start_from_images
from mllm.micro_tokenizer import chat_template, word_tokenizer
from mllm.video_processing import register, video_processor_class

SIDE, PATCH, MERGE = 64, 8, 2  # px, px, patches
GRID = SIDE // PATCH
MEAN_STD = [0.5, 0.5, 0.5]  # pixels in -1..1
SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<user>", "<assistant>",
)  # fmt: skip


def build_processor(vocabulary: Iterable[str]) -> Qwen2VLProcessor:
    """A real Qwen2-VL processor: clips of 64 x 64 px, two frames = 64 patches = 16 placeholders."""
    register()
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "user_token": "<user>",
        "assistant_token": "<assistant>",
    }
    tokenizer = word_tokenizer(SPECIAL, vocabulary, named)
    shape = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": MEAN_STD,
        "image_std": MEAN_STD,
        "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    }
    videos = video_processor_class()(**shape, cap_pixels_per_frame=False)
    template = chat_template("video", "<|vision_start|><|video_pad|><|vision_end|>")
    return Qwen2VLProcessor(Qwen2VLImageProcessorPil(**shape), tokenizer, videos, chat_template=template)


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """Random weights; seed torch before.

    They start large: the language model at 1 / sqrt(width), the merger as an isometry of what its four patches have in
    common. From the usual 0.02 training finds a map of low rank, in which words whose features are orthogonal end up
    with cosines of 0.9 (docs/LOG.md).
    """
    ids = processor.tokenizer.get_vocab()
    tower = {
        "depth": 4,
        "embed_dim": 96,
        "hidden_size": 128,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    text = {
        "vocab_size": len(ids),
        "hidden_size": 128,
        "intermediate_size": 208,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "rms_norm_eps": 1e-6,
    }
    config = Qwen2VLConfig(
        vision_config=tower,
        text_config=text,
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = Qwen2VLForConditionalGeneration(config)
    for module in model.model.visual.modules():  # the tower starts as usual
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    start_merger(model.model.visual.merger)
    start_from_images(model, processor.tokenizer)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, key, text[key])
    return model


def start_merger(merger: nn.Module) -> None:
    """Sums and differences of the four patches (orthogonal), then sums into an isometry, differences weakly."""
    first, last = merger.mlp[0], merger.mlp[2]  # type: ignore[index]
    d, out = first.in_features // MERGE**2, last.out_features
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    mix = torch.kron(torch.kron(two, two) / 2, torch.eye(d))
    sums, differences = torch.empty(out, d), torch.empty(out, first.in_features - d)
    nn.init.orthogonal_(sums, 2.0)
    nn.init.orthogonal_(differences, 0.5)
    with torch.no_grad():
        first.weight.copy_(0.3 * mix)  # GELU is nearly linear at such inputs
        last.weight.copy_(torch.cat([sums, differences], 1))
    for linear in (first, last):
        nn.init.zeros_(linear.bias)


def tower(model: Qwen2VLForConditionalGeneration) -> nn.Module:
    """With the merger, which is P and stays as it starts while the tower is trained."""
    return model.model.visual


def states(tower: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """pixels: [B, 3, frames, SIDE, SIDE] in -1..1 -> patches before and after the last layer, each [B, positions, d].

    All pairs of frames go through one attention. The tower's own forward gives the same (tested), but loops over the
    pairs, which takes half of the time in training.
    """
    pixels = inputs["pixels"]
    n, pairs = GRID * GRID, len(pixels) * pixels.shape[2] // 2
    h = before = tower.patch_embed(to_rows(pixels))
    cos, sin = tower.rotary_pos_emb(h[:n], get_vision_position_ids(torch.tensor([[1, GRID, GRID]]), MERGE))
    for block in tower.blocks:
        before, attention = h, block.attn
        q, k, v = attention.qkv(block.norm1(h)).view(pairs, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (x * cos + rotated(x) * sin for x in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(pairs * n, -1)
        h = h + attention.proj(mixed)
        h = h + block.mlp(block.norm2(h))
    return before.view(len(pixels), -1, h.shape[-1]), h.view(len(pixels), -1, h.shape[-1])


def to_rows(pixels: Tensor) -> Tensor:
    """[B, 3, frames, SIDE, SIDE] -> [B * pairs * patches, 3 * 2 * PATCH * PATCH], as the processor has them."""
    b, c, frames, _, _ = pixels.shape
    half = GRID // MERGE
    parts = pixels.reshape(b, c, frames // 2, 2, half, MERGE, PATCH, half, MERGE, PATCH)
    rows = parts.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9)
    return rows.reshape(b * frames // 2 * GRID * GRID, c * 2 * PATCH * PATCH)


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)
