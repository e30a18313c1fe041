"""Runs a step on a model without weights, and counts what it would take: forward, backward, optimiser, generation.

The decoder is the family's own code, and so are losses and optimisers; the anchor's work around it (projector, scatter
of the media tokens, gather of the targets, mllm/branches.py) is repeated here without its checks, which look at values.
All of it runs under `outline.mode` with a `LiveBytes` on top. R: rows, S: their length, T: targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from mllm.branches import BranchLogits, last_mlp, mlp_at
from mllm.items import Item
from mllm.outline import Outline
from mllm.packing import Rows, packed_rows, plain_rows
from mllm.prefix_layout import PrefixLayout
from mllm.recomputing import checkpointing_layers, recomputes

Form = Literal["packed", "plain"]


def logits_of(outline: Outline, items: Sequence[Item], form: Form, E: Mapping[str, Tensor] | None) -> BranchLogits:
    """One forward of these items, as `BranchForward` runs it. E: all items concatenated on dim 0."""
    base = outline.model
    with unset_fake_temporarily():  # where the tokens stand is known
        packed = form == "packed"
        layouts = [PrefixLayout(torch.arange(0), 0)] * len(items)
        rows: Rows = packed_rows(items, layouts, 0) if packed else plain_rows(items, 0)
        padded = bool((rows.length < rows.ids.shape[1]).any())
        targets = len(set((rows.row * rows.ids.shape[1] + rows.column).tolist()))
    (R, S), dtype = rows.ids.shape, base.get_input_embeddings().weight.dtype
    ids = torch.zeros(R, S, dtype=torch.long)
    embedded = base.get_input_embeddings()(ids)
    if E is not None:
        n = len(items)
        if form == "plain" and n != R:  # the rows of an item share its E
            E = {path: e.unflatten(0, (n, -1))[rows.row_item].flatten(0, 1) for path, e in E.items()}
        embedded = scattered(outline, embedded, E)
    positions = torch.zeros(R, S, dtype=torch.long) if packed or padded else None
    mask = torch.zeros(R, 1, S, S, dtype=dtype if packed else torch.bool) if packed or padded else None
    mlp = None if recomputes(checkpointing_layers(base)) else last_mlp(base)
    with contextlib.nullcontext() if mlp is None else mlp_at(mlp, torch.arange(targets), (R, S)):
        hidden = base.get_decoder()(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        )[0]
        logits = base.get_output_embeddings()(hidden[rows.row, rows.column][None])[0]
    return BranchLogits(logits, rows.labels, rows.item, rows.branch)


def scattered(outline: Outline, embedded: Tensor, E: Mapping[str, Tensor]) -> Tensor:
    """The projector's output in the place of media tokens, [R, S, width]. Where it has not as many rows as there are
    tokens (a family joins or pads them afterwards), the count is the same but for that."""
    width = embedded.shape[-1]
    parts = [outline.model.get_submodule(path)(e.to(embedded.dtype)) for path, e in E.items()]
    features = parts[-1].reshape(-1, width)  # of several projectors the last one feeds the token embeddings
    media = torch.zeros(*embedded.shape[:2], 1, dtype=torch.bool).expand_as(embedded)
    return embedded.masked_scatter(media, features)


def generated(outline: Outline, batch: int, prompt: int, new: int, autograd: bool = False) -> None:
    """Greedy answers of `new` tokens to `batch` prompts of `prompt` tokens: the first pass, then the last one, when
    the cache is at its longest."""
    base = outline.model
    dtype = base.get_input_embeddings().weight.dtype
    with torch.inference_mode() if not autograd else contextlib.nullcontext():
        cache = DynamicCache()
        for length, before in ((prompt, 0), (max(1, new - 1), prompt), (1, prompt + new - 1)):
            embedded = base.get_input_embeddings()(torch.zeros(batch, length, dtype=torch.long))
            if before and length > 1:  # the steps in between, as one: only what they leave in the cache counts
                for layer in range(len(cache.layers)):
                    keys = cache.layers[layer].keys
                    more = keys.new_empty(*keys.shape[:2], length, keys.shape[3])
                    cache.update(more, more, layer)
                continue
            mask = torch.zeros(batch, 1, length, before + length, dtype=torch.bool)
            positions = torch.zeros(batch, length, dtype=torch.long)
            hidden = base.get_decoder()(
                inputs_embeds=embedded,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,
                use_cache=True,
            )[0]
            base.get_output_embeddings()(hidden[:, -1:]).float().to(dtype)
