"""From words to token ids, the same way everywhere: synthesis, alignment, verification, evaluation.

The text goes through the model's own chat template, and the processor expands the media placeholder with a *blank*
image, video or audio, so that the ids hold as many media tokens as E has positions. No model family is special-cased.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin


def conversation(question: str, media: str | None, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of one user turn; `media` is the modality of an item put before the text, or None."""
    parts: list[dict[str, str]] = [{"type": media}] if media else []
    parts.append({"type": "text", "text": question})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return messages


class PromptEncoder:
    """Token ids of prompts and answers for one processor.

    Args:
        blank: the processor's arguments for the blank medium that stands in for E (mllm/media.py).
        end_ids: the ids that end an answer (the model's `generation_config.eos_token_id`).
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        modality: str,
        blank: Mapping[str, Any],
        end_ids: Sequence[int],
        system: str | None = None,
    ) -> None:
        self.processor, self.modality, self.blank = processor, modality, blank
        self.end_ids, self.system = tuple(end_ids), system
        self.tokenizer = processor.tokenizer
        # Records repeat their prompts (branches, epochs, variants) and the processor costs about a millisecond.
        self._encode = functools.lru_cache(maxsize=65536)(self._encode_uncached)

    def text(self, question: str, media: bool) -> str:
        """The prompt as text, ready for the answer."""
        messages = conversation(question, self.modality if media else None, self.system)
        return self._rendered(messages, add_generation_prompt=True)

    def prompt(self, question: str, media: bool) -> torch.Tensor:
        """Prompt ids, int64 [L]."""
        return self._encode(self.text(question, media), media)

    def example(self, question: str, answer: str, media: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of prompt + answer, int64 [L], and a mask, bool [L], True on the answer and the token ending it."""
        messages = conversation(question, self.modality if media else None, self.system)
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        whole = self._rendered(messages + completion)
        # A template may begin an answer in another way than it shows one: what both share is the prompt.
        begun = os.path.commonprefix(  # noqa: RUF071 (of characters, as it should be)
            [self._rendered(messages, add_generation_prompt=True), whole]
        )
        prompt, full = self._encode(begun, media), self._encode(whole, media)
        # A tokenizer may merge across the border: the prompt is what both share.
        n = min(len(prompt), len(full))
        different = (prompt[:n] != full[:n]).nonzero()
        start = int(different[0]) if len(different) else n
        ends = [i for i in range(start, len(full)) if int(full[i]) in self.end_ids]
        if ends:  # templates put a line feed after the end token: the model never has to say it
            full = full[: ends[0] + 1]
        else:
            full = torch.cat([full, full.new_tensor([self.end_ids[0]])])
        target = torch.zeros(len(full), dtype=torch.bool)
        target[start:] = True
        return full, target

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def blank_inputs(self, question: str) -> dict[str, torch.Tensor]:
        """What the processor makes of a prompt over the blank: the input of `Anchor.record`."""
        return dict(self._processed(self.text(question, True), True))

    def decode(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _processed(self, text: str, media: bool) -> Any:
        return encode_text(self.processor, [text], self.blank if media else {})

    def _encode_uncached(self, text: str, media: bool) -> torch.Tensor:
        return self._processed(text, media)["input_ids"][0]


def encode_text(processor: ProcessorMixin, texts: list[str], media: Mapping[str, Any]) -> Any:
    """Processor call on templated texts and `media_arguments`, left-padded.

    The template has written BOS already, if there is one.
    """
    bos = processor.tokenizer.bos_token
    kwargs = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
    return processor(text=texts, **media, return_tensors="pt", padding=True, padding_side="left", **kwargs)
