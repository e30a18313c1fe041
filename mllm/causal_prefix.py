"""Attention of packed rows in two parts, because what comes first in every row needs no mask.

The first n tokens of every row (n: length of the shortest prefix) see what stands before them and nothing else. A
causal kernel skips half of that work, and on a GPU takes no mask (flash attention). Only the tokens after them see a
part of what stands before them, and need one.

    with causal_prefix(config, n, mask):    # config: of the decoder
        model(attention_mask=mask)          # the mask of whole rows, [R, 1, S, S]

A layer that gives attention another mask than this (of its own making, or for other keys) attends as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "seawall_causal_prefix"
WORTH_SPLITTING = 256
"""Tokens from which on two calls cost less than one; with 66 of 106 they took 12 % longer (docs/performance.md)."""
_plan: ContextVar[tuple[int, Tensor | None]] = ContextVar("tokens that need no mask, and the mask", default=(0, None))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' functions: query, key, value: [R, heads, S, width]; gives [R, S, heads, width]."""
    n, mask = _plan.get()
    whole = attention_mask is mask and query.shape[2] == key.shape[2] and kwargs.get("position_bias") is None
    if not whole or not 0 < n < query.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("is_causal", None)
    first, _ = sdpa_attention_forward(
        module, query[:, :, :n], key[:, :, :n], value[:, :, :n], None, is_causal=True, **kwargs
    )
    assert mask is not None
    rest, _ = sdpa_attention_forward(module, query[:, :, n:], key, value, mask[:, :, n:], **kwargs)
    return torch.cat([first, rest], 1), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def causal_prefix(config: Any, n: int, mask: Tensor) -> Iterator[None]:
    """Inside, layers of this configuration attend in two parts. Not under activation checkpointing, which runs a layer
    again after this context has ended."""
    # The property would set that of every configuration inside of this one as well.
    before, token = config._attn_implementation_internal, _plan.set((n, mask))
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        _plan.reset(token)
