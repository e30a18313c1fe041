"""The blueprint of the embedded image model: a genuine Llava architecture of 0.9 M parameters, random weights.

An MLCD tower (CLIP with 2-D rotary positions: learned position tables read three times slower, see docs/LOG.md),
the ordinary two-layer projector, a three-layer Llama, a word-level tokenizer. `experiment=pretrain_micro` trains it;
the trained weights ship in assets/micro_llava and load with plain `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MLCDVisionConfig,
    PreTrainedModel,
)

from mllm.micro_tokenizer import chat_template, word_tokenizer

SIDE, PATCH = 64, 8  # px
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")


def build_processor(vocabulary: Iterable[str]) -> LlavaProcessor:
    """A real Llava processor: 64 x 64 px, an image = 64 placeholders; PIL, with and without torchvision."""
    tokenizer = word_tokenizer(
        SPECIAL,
        vocabulary,
        {"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" then drops
        chat_template=chat_template("image", "<image>"),
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Random weights; seed torch before.

    They start large: the language model at 1 / sqrt(width), the projector as an isometry. From the usual 0.02 training
    finds a map of low rank, in which words whose features are orthogonal end up with cosines of 0.9 (docs/LOG.md).
    """
    ids = processor.tokenizer.get_vocab()
    tower = MLCDVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_groups=1,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector
    for linear, gain in ((projector.linear_1, 0.1), (projector.linear_2, 2.0)):  # GELU is nearly linear at such inputs
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, key, getattr(text, key))
    return model


def tower(model: LlavaForConditionalGeneration) -> PreTrainedModel:
    return model.model.vision_tower


def states(tower: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """pixels: [B, 3, H, W] in -1..1 -> patches before and after the last layer, each [B, patches, d] (no CLS)."""
    found = tower(pixel_values=inputs["pixels"], output_hidden_states=True).hidden_states
    return found[-2][:, 1:], found[-1][:, 1:]
