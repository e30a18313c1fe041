"""The blueprint of the embedded video model: a genuine Qwen2-VL architecture of 1.0 M parameters.

A tower with 2-D rotary positions that reads two frames of a clip at a time, the ordinary merger of 2 x 2 patches, a
three-layer Qwen2 with multimodal rotary positions, a word-level tokenizer. The tower starts at random, the rest from
the embedded image model (mllm/micro_donor.py). `experiment=pretrain_micro_video` trains it; the trained weights ship in
assets/micro_qwen2_vl and load with plain `from_pretrained`.
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

from mllm.micro_codes import like_captions
from mllm.micro_donor import start_from_images
from mllm.micro_tokenizer import chat_template, word_tokenizer
from mllm.video_processing import register, video_processor_class

SIDE, PATCH, MERGE = 64, 8, 2  # px, px, patches
GRID = SIDE // PATCH
RENAMED = {"video": "image", "<|video_pad|>": "<image>"}  # words, and the image model's in whose place they come
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
    """A random tower before the image model's projector and language model; seed torch before."""
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
    for module in model.model.visual.modules():  # the library's 0.02 for the tower, not the 0.08 of small decoders
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    start(model, ids)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, key, text[key])
    return model


@torch.no_grad()
def start(model: Qwen2VLForConditionalGeneration, ids: Mapping[str, int]) -> None:
    """The image model's language model; its projector reads what the four patches of a merge have in common.

    The merger's other rows start weakly. Its layer norm takes the size from the features, so the projector's first
    layer gets it.
    """
    old: Any = start_from_images(model.model.language_model, ids, RENAMED)
    mlp: Any = model.model.visual.merger.mlp
    first, last = mlp[0], mlp[2]
    units, d = old.linear_1.weight.shape
    size = float(like_captions(4096, d).square().mean().sqrt())
    for linear in (first, last):
        nn.init.orthogonal_(linear.weight, 0.1)
        nn.init.zeros_(linear.bias)
    first.weight[:units] = (size / MERGE**2 * old.linear_1.weight).repeat(1, MERGE**2)
    first.bias[:units] = old.linear_1.bias
    last.weight[:, :units] = old.linear_2.weight
    last.bias.copy_(old.linear_2.bias)


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
