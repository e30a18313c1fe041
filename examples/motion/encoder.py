"""An encoder M for a motion sensor's time series, and the processor before it; both are registered with transformers.

A recording: float32 [6, samples], 50 samples a second; acceleration without gravity (x, y, z), then angular velocity
(x, y, z), both in units of their usual size. Three convolutions over time (a quarter of the samples is left, each with
1.1 s around it in view), then ordinary transformer layers. `LlavaForConditionalGeneration` takes any registered encoder
as its `vision_config` and calls what the encoder reads `pixel_values`; projector and language model are its own.

    B: recordings, C: channels (6), T: samples (128), N: positions (T / 4 = 32), d: width (96)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutput

STRIDE = 4  # samples for each position


class MotionEncoderConfig(PreTrainedConfig):
    model_type = "motion_encoder"

    channels: int = 6
    samples: int = 128
    hidden_size: int = 96
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    initializer_range: float = 0.06


class MotionEncoder(PreTrainedModel):
    """[B, C, T] -> [B, N, d]."""

    config_class = MotionEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MotionEncoderConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.stem = nn.ModuleList(
            nn.Conv1d(channels, d, kernel_size=9, stride=stride, padding=4)
            for channels, stride in ((config.channels, 2), (d, 2), (d, 1))
        )
        self.positions = nn.Embedding(config.samples // STRIDE, d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d,
                config.num_attention_heads,
                config.intermediate_size,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """hidden_states: the state before the first layer, and after each."""
        x = pixel_values
        for convolution in self.stem:
            x = F.gelu(convolution(x))
        x = x.transpose(1, 2)
        states = [x + self.positions.weight[: x.shape[1]]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


class MotionProcessor(ProcessorMixin):
    """Text with `<motion>` in it, and recordings -> what the model reads.

    Args:
        samples: of a recording; a shorter one is filled up with rest (zeros), a longer one is an error.
    """

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, samples: int = 128) -> None:
        self.samples = samples
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: str | Sequence[str],
        motion: Sequence[np.ndarray] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Raises ValueError for recordings that no placeholder stands for, and for one that is too long."""
        texts, token = [text] if isinstance(text, str) else list(text), self.tokenizer.motion_token
        media = list(motion or [])
        if (found := sum(each.count(token) for each in texts)) != len(media):
            raise ValueError(f"motion: {len(media)} recordings for {found} placeholders {token} in the texts")
        texts = [each.replace(token, " ".join([token] * (self.samples // STRIDE))) for each in texts]
        made = dict(self.tokenizer(texts, return_tensors=return_tensors, **kwargs))
        if media:
            made["pixel_values"] = torch.from_numpy(np.stack([self._filled(each) for each in media]))
        return BatchFeature(made, tensor_type=return_tensors)

    def _filled(self, recording: np.ndarray) -> np.ndarray:
        missing = self.samples - recording.shape[1]
        if missing < 0:
            raise ValueError(
                f"motion: {recording.shape[1]} samples, expected at most {self.samples}: cut the recording"
            )
        return np.pad(recording, ((0, 0), (0, missing)))


AutoConfig.register("motion_encoder", MotionEncoderConfig)
AutoModel.register(MotionEncoderConfig, MotionEncoder)
AutoProcessor.register(MotionEncoderConfig, MotionProcessor)
