"""The inputs that an anchor was recorded with, and what can be made of them: media inputs for n items, token types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.replay import constant, tile

# One value for each token, which says what kind of token it is. Gemma3 without them raises nothing and is wrong.
TYPE_INPUTS = ("mm_token_type_ids", "token_type_ids")
# Inputs that describe the text or the call. All others describe the media.
_TEXT_INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", *TYPE_INPUTS}
_CALL_INPUTS = {"use_cache", "cache", "past_key_values", "cache_position", "logits_to_keep", "return_dict"}
_MEDIA_TOKEN = r"(image|video|audio|speech{own})_token_(id|index)"


@dataclass(frozen=True)
class _TokenTypes:
    of_text: int
    of_media: dict[int, int]  # media token id -> type


class Blank:
    """One blank item with a prompt.

    Args:
        inputs: what the processor returned for it.
        config: the model's; it names the media tokens: `image_token_id`, `audio_token_index` and the like.
        modality: one more word that may stand there (`motion` for `motion_token_id`); "" for none.

    Raises:
        ValueError: not exactly one row of `input_ids`, or text tokens of several types (a prompt with its answer).
    """

    def __init__(self, inputs: Mapping[str, Any], config: Any, modality: str = "") -> None:
        ids = inputs.get("input_ids")
        if ids is None or ids.dim() != 2 or len(ids) != 1:
            got = "nothing" if ids is None else tuple(ids.shape)
            raise ValueError(f"record: input_ids must be of shape (1, length), one blank item; got {got}")
        self.ids: Tensor = ids[0].cpu()
        self.media = {k: v for k, v in inputs.items() if k not in _TEXT_INPUTS | _CALL_INPUTS}
        self.text = {k: v for k, v in inputs.items() if k not in self.media}
        # Not every `*_token_id`: those of pad, bos and eos, and of marks around the media, stand for no media.
        attribute = re.compile(_MEDIA_TOKEN.format(own=f"|{re.escape(modality)}" if modality else ""))
        named = {v for k, v in vars(config).items() if attribute.fullmatch(k) and isinstance(v, int)}
        self.media_token_ids = frozenset(named & set(self.ids.tolist()))
        self._types = {name: self._learn(name, inputs[name][0].cpu()) for name in TYPE_INPUTS if name in inputs}
        self._constant = False
        self._tiled: tuple[Any, dict[str, Any]] = (None, {})

    def make_media_constant(self, yes: bool) -> None:
        """Whether `media_inputs` gives constants of the right shape for pixels and the like."""
        self._constant, self._tiled = yes, (None, {})

    def media_inputs(self, n: int, device: torch.device) -> dict[str, Any]:
        if self._tiled[0] != (n, device):
            media = {k: constant(v) if self._constant else v for k, v in self.media.items()}
            self._tiled = (n, device), {k: tile(v, n, device) for k, v in media.items()}
        return dict(self._tiled[1])

    def type_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        made = {}
        for name, types in self._types.items():
            made[name] = torch.full_like(input_ids, types.of_text)
            for token, kind in types.of_media.items():
                made[name].masked_fill_(input_ids == token, kind)
        return made

    def _learn(self, name: str, types: Tensor) -> _TokenTypes:
        media = torch.isin(self.ids, torch.tensor(sorted(self.media_token_ids), dtype=torch.long))
        of_text = set(types[~media].tolist())
        if len(of_text) > 1:
            raise ValueError(
                f"record: the text tokens have the {name} {sorted(of_text)}, expected one kind; record a prompt "
                "without an answer"
            )
        of_media = dict(zip(self.ids[media].tolist(), types[media].tolist(), strict=True))
        return _TokenTypes(of_text.pop() if of_text else 0, of_media)
