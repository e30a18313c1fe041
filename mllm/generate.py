"""Greedy generation in batches, for prompts with real media, with injected embeddings, or with text alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mllm.loading import MLLM, to_device
from mllm.media import media_arguments
from mllm.prompts import encode_text

Progress = Callable[[int], None]


@torch.inference_mode()
def answer(
    mllm: MLLM,
    questions: Sequence[str],
    media: Sequence[Any] | None = None,
    max_new_tokens: int = 64,
    model: torch.nn.Module | None = None,
) -> list[str]:
    """One batch of answers, in order.

    Args:
        questions: the user's texts.
        media: one real item for each question (the encoder runs), or None for text alone.
        model: the same model under an adapter; default the bare one.
    """
    texts = [mllm.prompts.text(q, media is not None) for q in questions]
    argument = media_arguments(mllm.spec, mllm.processor, media) if media is not None else {}
    inputs = to_device(encode_text(mllm.processor, texts, argument), mllm.model.device)
    for key, value in inputs.items():  # pixels come as float32 whatever the weights are
        if torch.is_tensor(value) and value.is_floating_point():
            inputs[key] = value.to(mllm.model.dtype)
    return _generate(mllm, model or mllm.model, inputs, max_new_tokens)


@torch.inference_mode()
def answer_embedded(
    mllm: MLLM,
    questions: Sequence[str],
    E: Mapping[str, torch.Tensor],
    max_new_tokens: int = 64,
    model: torch.nn.Module | None = None,
) -> list[str]:
    """One batch of answers over injected embeddings: E[path] is [len(questions) * rows of one item, ...]."""
    ids = [mllm.prompts.prompt(q, True) for q in questions]
    pad = mllm.processor.tokenizer.pad_token_id or 0
    tokens = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
    device = mllm.model.device
    inputs = {
        "input_ids": tokens.to(device),
        "attention_mask": mask.to(device),
        **mllm.anchor.type_inputs(tokens.to(device)),
        **mllm.anchor.media_inputs(len(ids)),
    }
    with mllm.anchor.inject(E, batch_size=len(ids)):
        return _generate(mllm, model or mllm.model, inputs, max_new_tokens)


def _generate(mllm: MLLM, model: torch.nn.Module, inputs: Mapping[str, Any], max_new_tokens: int) -> list[str]:
    out = model.generate(  # type: ignore[operator]  # Hugging Face's: a plain Module has no such method
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=mllm.processor.tokenizer.pad_token_id or mllm.prompts.end_ids[0],
    )
    return [mllm.prompts.decode(row) for row in out[:, inputs["input_ids"].shape[1] :]]
