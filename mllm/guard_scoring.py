"""The detector as the guard asks it: whole answers in batches, growing answers by reading on from a key-value cache.

A decoder's state at a token depends on nothing to the right of it, so the score of a longer text costs only its new
tokens. Many streams are read on in one forward: their caches, of different lengths, are padded on the left and their
new tokens on the right, with positions given outright. The cache is kept for the longest common beginning of the ids,
so a tokenizer that merges differently at the old end, or a template with words after the answer, costs a few tokens and
no error. The plain forward is the oracle: `tests/mllm/test_guard_scoring.py` compares every score with a full re-read.

Encoders, and decoders whose state is no plain key-value cache, re-read the text each time.

Legend. B streams in one forward, P longest cache, N most new tokens, H key-value heads, D their width.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mllm.detector import Detector
from mllm.guard_checks import Check, Reader
from mllm.kv_cache import given, kept
from mllm.qa_text import QAIds
from mllm.sections import SectionOutput


class Scoring:
    """`score` is to be called from one thread at a time (guard_batching.py).

    Args:
        batch_size: texts in one forward.
        max_cached_tokens: beyond this many over all streams, the caches longest unused are dropped and read anew. The
            default is 3 GB for 30 layers of 3 x 64 in float32.
    """

    def __init__(self, detector: Detector, batch_size: int = 16, max_cached_tokens: int = 65536) -> None:
        self._detector, self._batch_size, self._max_cached_tokens = detector, batch_size, max_cached_tokens
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._turns = itertools.count()
        self.tokens_read = 0  # by cached reading: what a benchmark compares with the tokens of full re-reads
        parameters = inspect.signature(detector.model.forward).parameters
        self.reads_on = detector.causal and "position_ids" in parameters and _plain_cache(detector)
        detector.encode("", "warm-up")  # sets the tokenizer's options now, not from two threads at once
        self._backend = detector.tokenizer.backend_tokenizer

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def score(self, checks: list[Check]) -> list[float]:
        """harmless_score of each answer from its start; NaN where the model gave none."""
        growing = [i for i, c in enumerate(checks) if c.reader is not None and self.reads_on]
        whole = [i for i in range(len(checks)) if i not in set(growing)]
        scores = dict.fromkeys(range(len(checks)), math.nan)
        if whole:
            asked = [checks[i].question for i in whole], [checks[i].answer for i in whole]
            scores.update(zip(whole, self._detector.score(*asked, batch_size=self._batch_size).tolist(), strict=True))
        if growing:
            scores.update(zip(growing, self._score_growing([checks[i] for i in growing]), strict=True))
        return [scores[i] for i in range(len(checks))]

    def _score_growing(self, checks: Sequence[Check]) -> list[float]:
        """As `Detector.score`: an answer too long for one text is read in windows, and the lowest score counts."""
        windows = [self._detector.template.windows(c.question, c.answer) for c in checks]
        readers = [c.reader for c in checks if c.reader is not None]
        lowest = [1.0] * len(checks)
        for turn in range(max(len(w) for w in windows)):  # one window of each stream at a time: they share its cache
            due = [i for i, w in enumerate(windows) if turn < len(w)]
            for i, score in zip(
                due, self._windows([readers[i] for i in due], [windows[i][turn] for i in due]), strict=True
            ):
                if turn < len(windows[i]) - 1:
                    readers[i].full[tuple(windows[i][turn])] = score
                lowest[i] = score if math.isnan(score) or score < lowest[i] else lowest[i]  # a NaN wins, wherever it is
        return lowest

    def _windows(self, readers: Sequence[Reader], texts: Sequence[QAIds]) -> list[float]:
        scores = {i: readers[i].full[tuple(ids)] for i, ids in enumerate(texts) if tuple(ids) in readers[i].full}
        starts = {i: _shared(readers[i].ids, ids) for i, ids in enumerate(texts) if i not in scores}
        order = sorted(starts, key=lambda i: len(texts[i]) - starts[i])
        for at in range(0, len(order), self._batch_size):
            part = order[at : at + self._batch_size]
            new = self._read_on([readers[i] for i in part], [starts[i] for i in part], [texts[i] for i in part])
            scores.update(zip(part, new, strict=True))
        self._forget()
        return [scores[i] for i in range(len(texts))]

    @torch.inference_mode()
    def _read_on(self, readers: Sequence[Reader], starts: Sequence[int], texts: Sequence[QAIds]) -> list[float]:
        """One forward over the tokens after `starts`; the readers then hold their whole texts."""
        device, pad = self._detector.device, self._detector.tokenizer.pad_token_id
        new = [torch.tensor(ids[start:]) for ids, start in zip(texts, starts, strict=True)]
        tokens = pad_sequence(new, batch_first=True, padding_value=pad).to(device)  # [B, N]
        P, N = max(starts), tokens.shape[1]
        mask = torch.zeros(len(texts), P + N, dtype=torch.long)
        for row, (start, added) in enumerate(zip(starts, new, strict=True)):
            mask[row, P - start : P + len(added)] = 1
        positions = torch.tensor(starts)[:, None] + torch.arange(N)
        past = DynamicCache()
        if P:
            layers = max(len(r.cache) for r in readers)
            for layer in range(layers):
                past.update(*(_left_padded(readers, starts, layer, side, P) for side in (0, 1)), layer)
        more: dict[str, Any] = {**given(past), "use_cache": True, "position_ids": positions.to(device)}
        held = _held(readers, starts, P)
        if held is not None:
            more["held"] = held
        out = self._detector.forward(tokens, mask.to(device), texts, **more)
        scores = self._detector.calibrated(out.logits[:, 0].float().cpu()).tolist()
        for row, (reader, start, ids) in enumerate(zip(readers, starts, texts, strict=True)):
            # A copy: a view would keep the whole batch alive.
            reader.cache = [
                (la.keys[row, :, P - start : P - start + len(ids)].clone(),
                 la.values[row, :, P - start : P - start + len(ids)].clone())
                for la in kept(out).layers
            ]  # fmt: skip
            if isinstance(out, SectionOutput):
                reader.states = out.states[row, P - start : P - start + len(ids)].clone()
            reader.ids, reader.used = list(ids), next(self._turns)
            self._readers.add(reader)
            self.tokens_read += len(ids) - start
        return scores

    def _forget(self) -> None:
        held = sorted(self._readers, key=lambda r: r.used)
        tokens = sum(len(r.ids) for r in held)
        for reader in held:
            if tokens <= self._max_cached_tokens:
                return
            tokens -= len(reader.ids)
            reader.ids, reader.cache, reader.states = [], [], None
            self._readers.discard(reader)


def _shared(read: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens that need not be read again; the last one always is, its state makes the score."""
    same = 0
    for old, new in zip(read, ids, strict=False):
        if old != new:
            break
        same += 1
    return min(same, len(ids) - 1)


def _left_padded(readers: Sequence[Reader], starts: Sequence[int], layer: int, side: int, length: int) -> Tensor:
    """Keys (side 0) or values (side 1) of the first `starts` tokens, [B, H, P, D]; zeros where there are none."""
    example = next(r.cache[layer][side] for r in readers if r.cache)
    out = example.new_zeros(len(readers), example.shape[0], length, example.shape[2])
    for row, (reader, start) in enumerate(zip(readers, starts, strict=True)):
        if start:
            out[row, :, length - start :] = reader.cache[layer][side][:, :start]
    return out


def _held(readers: Sequence[Reader], starts: Sequence[int], length: int) -> Tensor | None:
    """The states of the first `starts` tokens, [B, P, c], as `_left_padded`; None where none were kept."""
    example = next((r.states for r in readers if r.states is not None), None)
    if example is None:
        return None
    out = example.new_zeros(len(readers), length, example.shape[1])
    for row, (reader, start) in enumerate(zip(readers, starts, strict=True)):
        if reader.states is not None and start:
            out[row, length - start :] = reader.states[:start]
    return out


@torch.inference_mode()
def _plain_cache(detector: Detector) -> bool:
    """Whether the model keeps keys and values for every token, and nothing else."""
    cache = DynamicCache()
    ids = torch.tensor([[0, 1]], device=detector.device)
    out = detector.model.base_model(input_ids=ids, **given(cache), use_cache=True)
    past = kept(out)
    layers = past.layers if isinstance(past, DynamicCache) else []
    return bool(layers) and all(type(la) is DynamicLayer and la.keys.shape[2] == 2 for la in layers)
