"""The blueprint of the embedded audio model: a genuine Qwen2-Audio architecture of 0.9 M parameters.

A Whisper-like tower of four layers over 64 mel bands (20 ms a frame, 80 ms an audio token), the ordinary linear
projector, a three-layer Qwen2, a word-level tokenizer. Clips of up to 5 s: 62 audio tokens.
`experiment=pretrain_micro_audio` trains it; the trained weights ship in assets/ and load with plain `from_pretrained`.

The tower starts at random. The language model starts from the embedded image model, as Qwen2-Audio started from a
Qwen that could talk: the micro world has the same words in every medium, and the towers put them into the same codes
(lightning_modules/micro_tower.py), so that what is left to learn is little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import sinusoids

from mllm.micro_codes import like_captions
from mllm.micro_donor import start_from_images
from mllm.micro_tokenizer import chat_template, word_tokenizer

RATE, SECONDS, HOP, MELS, WIDTH = 16000, 5, 320, 64, 96  # Hz, s, samples, bands, d
# Words of the audio model, and the image model's in whose place they come: the placeholder, the senses, the styles.
RENAMED = {
    "<|AUDIO|>": "<image>", "audio": "image", "hear": "see", "repeat": "read",
    "slow": "dark", "quick": "bright", "distant": "neon", "telephone": "sepia",
}  # fmt: skip
FRAMES = SECONDS * RATE // HOP  # mel frames of a full clip; the tower has half as many positions, the LLM a quarter
SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<user>", "<assistant>",
)  # fmt: skip


def feature_extractor() -> WhisperFeatureExtractor:
    """Waveforms at `RATE` -> log-mel features [B, MELS, FRAMES]."""
    return WhisperFeatureExtractor(feature_size=MELS, hop_length=HOP, chunk_length=SECONDS, n_fft=400)


def build_processor(vocabulary: Iterable[str]) -> Qwen2AudioProcessor:
    """A real Qwen2-Audio processor."""
    named = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "user_token": "<user>",
        "assistant_token": "<assistant>",
    }
    return Qwen2AudioProcessor(
        feature_extractor=feature_extractor(),
        tokenizer=word_tokenizer(SPECIAL, vocabulary, named),
        chat_template=chat_template("audio", "<|audio_bos|> <|AUDIO|> <|audio_eos|>"),
    )


def build_model(processor: Qwen2AudioProcessor) -> Qwen2AudioForConditionalGeneration:
    """A random tower before the image model's language model; seed torch before.

    The table of positions is drawn at random by the library and never trained: it gets the sinusoids of Whisper.
    """
    ids = processor.tokenizer.get_vocab()
    tower = Qwen2AudioEncoderConfig(
        num_mel_bins=MELS,
        d_model=WIDTH,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        max_source_positions=FRAMES // 2,
    )
    text = Qwen2Config(
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
        initializer_range=0.08,
    )
    config = Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=ids["<|AUDIO|>"])
    model = Qwen2AudioForConditionalGeneration(config)
    start(model, ids)
    with torch.no_grad():
        # Audio tokens are as large as the captions they shall carry (lightning_modules/micro_tower.py): a norm's weight
        # moves by no more than the learning rate a step.
        model.model.audio_tower.layer_norm.weight.fill_(6.0)
        positions = model.model.audio_tower.embed_positions.weight
        positions.copy_(0.3 * sinusoids(*positions.shape))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, key, getattr(text, key))
    return model


@torch.no_grad()
def start(model: Qwen2AudioForConditionalGeneration, ids: Mapping[str, int]) -> None:
    """The image model's language model, and the best linear fit of its projector."""
    old = start_from_images(model.model.language_model, ids, RENAMED)
    model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight)  # the image model's are tied
    E = like_captions(4096, WIDTH)
    wanted = old(E)
    # In double precision: LAPACK's rounding depends on where its arrays lie in memory, and a run must be repeatable.
    fitted = torch.linalg.lstsq(torch.cat([E, torch.ones(len(E), 1)], 1).double(), wanted.double()).solution.float()
    projector = model.model.multi_modal_projector.linear
    projector.weight.copy_(fitted[:-1].T)
    projector.bias.copy_(fitted[-1])


def tower(model: Qwen2AudioForConditionalGeneration) -> PreTrainedModel:
    return model.model.audio_tower


def states(tower: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tower's forward, for clips of any length up to a full one: half of the training is on short ones.

    Args:
        inputs: features, [B, MELS, T] with T <= FRAMES; lengths, int64 [B]: mel frames that are heard.

    Returns:
        Frames before the last layer, [B, T / 2, d], and audio tokens, [B, T / 4, d]. What is not heard is not attended
        to, but has states too.
    """
    features = inputs["features"]
    x = F.gelu(tower.conv1(features))
    x = F.gelu(tower.conv2(x)).transpose(1, 2)
    x = x + tower.embed_positions.weight[: x.shape[1]]
    heard = torch.arange(x.shape[1], device=x.device)[None] < ((inputs["lengths"] - 1) // 2 + 1)[:, None]
    mask = heard[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    for layer in tower.layers[:-1]:
        x = layer(x, mask)
    whole = tower.layers[-1](x, mask)
    return x, tower.layer_norm(tower.avg_pooler(whole.transpose(1, 2)).transpose(1, 2))
