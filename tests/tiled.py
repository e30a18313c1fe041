"""A tiny random model whose processor cuts pictures into tiles by their size, with the embedded model's vocabulary."""

from __future__ import annotations

import transformers as hf

from mllm.loading import MLLM, assemble
from tests.micro import micro

GRID = [[64, 64], [128, 64], [64, 128]]


def tiled() -> MLLM:
    """One tile and the whole for 64 x 64 px, two and the whole for 128 x 64."""
    base = micro()
    old = base.processor
    image_processor = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=GRID
    )
    processor = hf.LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=old.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token=old.image_token,
        num_additional_image_tokens=1,
        chat_template=old.chat_template,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8
    )
    text = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(old.tokenizer),
        max_position_embeddings=512,
    )
    config = hf.LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=base.model.config.image_token_id,
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return assemble(hf.LlavaNextForConditionalGeneration(config), processor, base.spec)
