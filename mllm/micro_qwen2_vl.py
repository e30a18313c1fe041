"""The blueprint of the embedded video model: a genuine Qwen2-VL architecture of 1.0 M parameters, random weights.

A tower with 2-D rotary positions that reads two frames of a clip at a time, the ordinary merger of 2 x 2 patches, a
three-layer Qwen2 with multimodal rotary positions, a word-level tokenizer. `experiment=pretrain_micro_video` trains it;
the trained weights ship in assets/micro_qwen2_vl and load with plain `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.vision_utils import get_vision_position_ids

from mllm.video_processing import register, video_processor_class

SIDE, PATCH, MERGE, FRAMES = 64, 8, 2, 8  # px, px, patches, frames of a clip
GRID = SIDE // PATCH
MEAN_STD = [0.5, 0.5, 0.5]  # pixels in -1..1
SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<user>", "<assistant>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('video', 'image') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|> "
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_processor(vocabulary: Iterable[str]) -> Qwen2VLProcessor:
    """A real Qwen2-VL processor: clips of 64 x 64 px, two frames = 64 patches = 16 placeholders."""
    register()
    ids = {word: i for i, word in enumerate([*SPECIAL, *vocabulary])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.add_special_tokens([AddedToken(t, special=True, lstrip=True, rstrip=True) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "user_token": "<user>",
            "assistant_token": "<assistant>",
        },
    )
    shape = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": MEAN_STD,
        "image_std": MEAN_STD,
        "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    }
    videos = video_processor_class()(**shape, cap_pixels_per_frame=False)
    return Qwen2VLProcessor(Qwen2VLImageProcessorPil(**shape), tokenizer, videos, chat_template=CHAT_TEMPLATE)


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
        first.weight.copy_(0.1 * mix)  # GELU is nearly linear at such inputs
        last.weight.copy_(torch.cat([sums, differences], 1) * 1.0)
    for linear in (first, last):
        nn.init.zeros_(linear.bias)


class PairTower(nn.Module):
    """The tower of a Qwen2-VL without its merger, for many pairs of frames of one size: one attention for all of them.

    The model's own forward gives the same (tested) but loops over the pairs, which costs half of the time in training.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.config = visual.config

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = True) -> BaseModelOutput:
        """pixel_values: [B, 3, 2, SIDE, SIDE] in -1..1 -> hidden_states after every block, each [B, patches, d]; the
        patches of one merge stand one after another."""
        v, b = self.visual, len(pixel_values)
        rows = to_rows(pixel_values)
        h = v.patch_embed(rows)
        n = len(rows) // b
        cos, sin = v.rotary_pos_emb(h[:n], get_vision_position_ids(torch.tensor([[1, GRID, GRID]]), MERGE))
        states = [h.view(b, n, -1)]
        for block in v.blocks:
            attention = block.attn
            q, k, value = attention.qkv(block.norm1(h)).view(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k = (x * cos + rotated(x) * sin for x in (q, k))
            mixed = F.scaled_dot_product_attention(q, k, value).transpose(1, 2).reshape(b * n, -1)
            h = h + attention.proj(mixed)
            h = h + block.mlp(block.norm2(h))
            states.append(h.view(b, n, -1))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


def to_rows(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, 2, SIDE, SIDE] -> [B * patches, 3 * 2 * PATCH * PATCH], as the video processor lays patches out."""
    b, c, t, _, _ = pixels.shape
    half = GRID // MERGE
    parts = pixels.reshape(b, c, t, half, MERGE, PATCH, half, MERGE, PATCH)
    return parts.permute(0, 3, 6, 4, 7, 1, 2, 5, 8).reshape(b * GRID * GRID, c * t * PATCH * PATCH)


def rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)
