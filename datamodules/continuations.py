"""How likely a language model finds texts: many continuations of one context, or pairs of a context and a text.

For continuations the fixed head (the few-shot examples) is computed once and its keys and values kept, the rest of
the context once for each call, and the continuations are rows behind it. Continuations that are beginnings of one
another share a row, so all spans of a text cost about one row for each first word.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.kv_cache import given, kept


class ContinuationScorer:
    """Log-probabilities under a causal language model of `transformers`, in nats.

    Args:
        model, tokenizer: any causal LM; put into evaluation mode, used without gradients on the device it is on.
        head: text in front of every context of `score` (not of `score_pairs`).
        max_rows: rows in one forward (memory grows with it).
        share_prefix: keep keys and values; False for models whose cache cannot be repeated over rows.
    """

    def __init__(self, model: Any, tokenizer: Any, head: str = "", max_rows: int = 32, share_prefix: bool = True):
        self.model, self.tokenizer, self.head = model.eval(), tokenizer, head
        self.max_rows, self.share_prefix = max_rows, share_prefix
        self._head_cache: Any = None

    @torch.inference_mode()
    def score(self, context: str, continuations: Sequence[str], end: str = "") -> Tensor:
        """log p(continuation, then the first token of `end` if given | head + context), [len(continuations)].

        Raises:
            ValueError: head, context and continuation exceed the model's positions, or the context is empty.
        """
        if not self.share_prefix:
            return self.score_pairs([(self.head + context, text) for text in continuations], end)
        head = list(self.tokenizer(self.head).input_ids) if self.head else []
        base = self._tokens_after(self.head[-1:], context) if head else self._fresh(context)
        spans = [self._tokens_after(context[-1:], text) for text in continuations]
        rows = _longest(spans)
        self._check(len(head) + len(base) + max(map(len, rows)))
        stop = self._tokens_after("x", end)[0] if end else None
        cache = self._context_cache(head, base[:-1])
        scores = torch.full((len(spans),), float("nan"), dtype=torch.float64)
        for first in range(0, len(rows), self.max_rows):
            part = rows[first : first + self.max_rows]
            past = copy.deepcopy(cache)
            if past is not None:
                past.batch_repeat_interleave(len(part))
            # The context's last token goes in again: its logits are those of every first token.
            logps = self._log_probs([base[-1:] + row for row in part], past)
            for i, span in enumerate(spans):
                row = next((r for r, tokens in enumerate(part) if tokens[: len(span)] == span), None)
                if row is not None:
                    scores[i] = _path(logps[row], span, stop)
        return scores

    @torch.inference_mode()
    def score_pairs(self, pairs: Sequence[tuple[str, str]], end: str = "") -> Tensor:
        """log p(text, then the first token of `end` if given | context) for (context, text), [len(pairs)].

        Raises:
            ValueError: a pair exceeds the model's positions, or a context is empty.
        """
        stop = self._tokens_after("x", end)[0] if end else None
        scores: list[Tensor] = []
        for first in range(0, len(pairs), self.max_rows):
            part = [(self._fresh(a), self._tokens_after(a[-1:], b)) for a, b in pairs[first : first + self.max_rows]]
            self._check(max(len(a) + len(b) for a, b in part))
            logps = self._log_probs([a + b for a, b in part], None)
            scores += [_path(logps[i, len(a) - 1 :], b, stop) for i, (a, b) in enumerate(part)]
        return torch.stack(scores)

    def _log_probs(self, rows: Sequence[list[int]], past: Any) -> Tensor:
        """[len(rows), longest, V], on the CPU. Right padding: under a causal mask nothing sees it."""
        width = max(map(len, rows))
        ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], device=self.model.device)
        logits = self.model(input_ids=ids, **given(past), use_cache=past is not None).logits
        return logits.float().log_softmax(-1).cpu()

    def _context_cache(self, head: list[int], front: list[int]) -> Any:
        """Keys and values of head and context; None where both are empty."""
        if head and self._head_cache is None:
            self._head_cache = self._extend(None, head)
        return self._extend(copy.deepcopy(self._head_cache), front) if front else self._head_cache

    def _extend(self, past: Any, tokens: list[int]) -> Any:
        ids = torch.tensor([tokens], device=self.model.device)
        return kept(self.model(input_ids=ids, **given(past), use_cache=True))

    def _check(self, length: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"the question is too long: {length} tokens with the prompt, the model takes {limit}")

    def _fresh(self, text: str) -> list[int]:
        if not text:
            raise ValueError("context: got an empty text, expected at least one character")
        return list(self.tokenizer(text).input_ids)  # with the tokens that the model expects at a beginning

    def _tokens_after(self, left: str, text: str) -> list[int]:
        """Tokens of `text` where it follows `left` (tokenizers treat a beginning differently)."""
        alone = list(self.tokenizer(left, add_special_tokens=False).input_ids)
        both = list(self.tokenizer(left + text, add_special_tokens=False).input_ids)
        if both[: len(alone)] != alone:  # merged across the seam: the text as a beginning comes nearest
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return both[len(alone) :]


def _longest(spans: Sequence[list[int]]) -> list[list[int]]:
    """The spans that are not a beginning of another one, the longest first."""
    rows: list[list[int]] = []
    for span in sorted(spans, key=len, reverse=True):
        if not any(row[: len(span)] == span for row in rows):
            rows.append(span)
    return rows


def _path(logps: Tensor, tokens: list[int], stop: int | None) -> Tensor:
    """Sum of the tokens' log-probabilities; `logps[k]` predicts `tokens[k]`. Then that of `stop`."""
    ids = torch.tensor(tokens if stop is None else [*tokens, stop])
    return logps[: len(ids)].gather(1, ids[:, None]).double().sum()
