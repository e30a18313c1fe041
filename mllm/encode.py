"""Real media through the modality encoder M: E of a picture, in the place where a synthetic E would stand.

An injected E is read with the blank's sizes, grids and masks (mllm/anchor.py). A real item can therefore take a
synthetic one's place only if the processor describes it as it describes the blank; `prepare` proves that for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm.loading import MLLM, to_device
from mllm.media import media_arguments
from mllm.prompts import encode_text

_TEXT = "."  # M does not see it


class MediaEncoder:
    """Encodes media of the model's modality in batches; the model's own processor prepares them."""

    def __init__(self, mllm: MLLM) -> None:
        self.mllm = mllm
        self.prompt = mllm.prompts.text(_TEXT, True)
        self.blank: dict[str, Any] = dict(mllm.prompts.blank_inputs(_TEXT))

    def prepare(self, medium: Any) -> dict[str, torch.Tensor]:
        """The processor's tensors for one item.

        Raises:
            ValueError: they differ from the blank's in shape, or in anything but the pixels (sizes, grids, masks).
        """
        argument = media_arguments(self.mllm.spec, self.mllm.processor, [medium])
        inputs = encode_text(self.mllm.processor, [self.prompt], argument)
        found = {key: value for key, value in inputs.items() if torch.is_tensor(value)}
        # Sizes and tiles first: they say more than the number of tokens that follows from them.
        for key in sorted(self.blank, key=("attention_mask", "input_ids").__contains__):
            expected = self.blank[key]
            if not torch.is_tensor(expected):
                continue
            got = found.get(key)
            if got is None or got.shape != expected.shape:
                raise ValueError(
                    f"the processor makes {key} of shape {None if got is None else tuple(got.shape)} of it, expected "
                    f"{tuple(expected.shape)} as of the blank"
                )
            if not got.is_floating_point() and not torch.equal(got, expected):
                raise ValueError(f"the processor gives it the {key} {_brief(got)}, expected {_brief(expected)}")
        return found

    def encode(self, prepared: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Projector path -> E of every item, [n, *shape of one item], on the CPU.

        Raises:
            ValueError: M's output is not n items of the blank's shape.
        """
        inputs = {key: torch.cat([item[key] for item in prepared]) for key in prepared[0]}
        for key, value in inputs.items():  # pixels come as float32 whatever the weights are
            if value.is_floating_point():
                inputs[key] = value.to(self.mllm.model.dtype)
        observed = self.mllm.anchor.observe(**to_device(inputs, self.mllm.model.device))
        out = {}
        for path, shape in self.mllm.shapes.items():
            e, expected = observed[path], (len(prepared) * shape[0], *shape[1:])
            if tuple(e.shape) != expected:
                raise ValueError(
                    f"{len(prepared)} items are encoded as {tuple(e.shape)} at {path}, expected {expected}: "
                    f"{shape} for each, as the blank"
                )
            out[path] = e.cpu().unflatten(0, (len(prepared), shape[0]))
        return out


def _brief(values: torch.Tensor) -> str:
    text = str(values.tolist())
    return text if len(text) <= 60 else text[:57] + "..."
