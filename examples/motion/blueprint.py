"""What experiment=pretrain_motion trains: the motion encoder before the embedded image model's language model.

The four functions are those of `mllm.micro_blueprints.Blueprint`. The encoder starts at random and learns to put
gestures where the image model's tower puts the same words (mllm/micro_codes.py), so language model and projector start
from there. Who brings pretrained weights needs nothing of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm.micro_donor import DONOR, start_from_images
from mllm.micro_tokenizer import chat_template, word_tokenizer

from .encoder import MotionEncoder, MotionEncoderConfig, MotionProcessor

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<motion>", "<user>", "<assistant>")
# Words of the motion model, and the image model's in whose place they come: the placeholder, the medium, the styles.
RENAMED = {
    "<motion>": "<image>", "motion": "image", "smooth": "dark", "shaky": "bright", "jerky": "neon", "swaying": "sepia",
}  # fmt: skip


def build_processor(vocabulary: Iterable[str]) -> MotionProcessor:
    named = {"motion_token": "<motion>", "user_token": "<user>", "assistant_token": "<assistant>"}
    tokenizer = word_tokenizer(SPECIAL, vocabulary, named)
    return MotionProcessor(tokenizer, chat_template=chat_template("motion", "<motion>"))


def build_model(processor: Any) -> LlavaForConditionalGeneration:
    """A random encoder before the image model's projector and language model; seed torch before."""
    ids = processor.tokenizer.get_vocab()
    text = AutoConfig.from_pretrained(DONOR).text_config
    text.vocab_size = len(ids)
    for name in ("pad", "bos", "eos"):
        setattr(text, f"{name}_token_id", ids[f"<{name}>"])
    config = LlavaConfig(
        vision_config=MotionEncoderConfig(samples=processor.samples),
        text_config=text,
        image_token_index=ids["<motion>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",  # there is no CLS to drop
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    projector = start_from_images(model.model.language_model, ids, RENAMED)
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", ids[f"<{name}>"])
    return model


def tower(model: Any) -> MotionEncoder:
    encoder: MotionEncoder = model.model.vision_tower
    return encoder


def states(tower: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """motion, [B, 6, T] -> positions before and after the last layer, each [B, T / 4, d]."""
    found = tower(inputs["motion"]).hidden_states
    return found[-2], found[-1]
