"""What the detoxifier learns from: question, harmful answer -> harmless answer, as padded batches with a target mask.

Targets (arXiv 2401.02906, section 3.3, and the released code): the harmless answer of a pair; where both answers are
harmful, the fixed refusal. The prompt is what `mllm.detoxifier` encodes when it rewrites; the target follows, a space
between, and the token that ends an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from datamodules.qa_batches import Buckets
from datamodules.qa_pairs import QAPair
from mllm.qa_text import QATemplate


@dataclass(frozen=True)
class Rewriting:
    """One example."""

    question: str
    harmful: str
    target: str


@dataclass(frozen=True)
class RewriteBatch:
    """ids, mask: int64 [N, T], right-padded. target: bool [N, T], True on the answer and the token that ends it.
    targets: how many the whole batch has, over all ranks."""

    ids: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    targets: int


def rewritings(pairs: Sequence[QAPair], refusal: str) -> list[Rewriting]:
    """An example for every harmful answer that has a partner; each (question, harmful answer, target) once."""
    found = []
    for pair in pairs:
        if pair.worse is None or pair.worse.harmless:
            continue
        target = pair.better.text if pair.better.harmless else refusal
        found.append(Rewriting(pair.question, pair.worse.text, target or refusal))
    return list(dict.fromkeys(found))


def encode_rewriting(
    example: Rewriting, template: QATemplate, tokenizer: Any, max_answer: int
) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the target); a target over `max_answer` tokens is cut and then has no end token."""
    prompt = template.encode(example.question, example.harmful)
    target = tokenizer(" " + example.target, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    target = [*target, tokenizer.eos_token_id]
    return prompt, target[:max_answer]


class RewriteBatches(IterableDataset[RewriteBatch]):
    """Batches of encoded examples from `start` to `steps`, a pure function of (seed, step); like lengths together. Of
    several ranks each takes its share of each."""

    def __init__(
        self, examples: Sequence[tuple[list[int], list[int]]], batch_size: int, steps: int, seed: int, pad_id: int
    ) -> None:
        self.examples, self.steps, self.pad_id, self.start = examples, steps, pad_id, 0
        self.rank, self.world = 0, 1
        self.buckets = Buckets([len(prompt) + len(target) for prompt, target in examples], batch_size, seed)

    def __iter__(self) -> Iterator[RewriteBatch]:
        for step in range(self.start, self.steps):
            whole = self.buckets(step)
            yield self.collate(whole[self.rank :: self.world], whole)

    def collate(self, indices: Sequence[int], whole: Sequence[int] | None = None) -> RewriteBatch:
        """The batch of these examples, a share of the `whole` one."""
        chosen = [self.examples[i] for i in indices]
        rows = [torch.tensor(prompt + target) for prompt, target in chosen]
        targets = [torch.tensor([False] * len(prompt) + [True] * len(target)) for prompt, target in chosen]
        return RewriteBatch(
            ids=pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            target=pad_sequence(targets, batch_first=True),
            targets=sum(len(self.examples[i][1]) for i in (indices if whole is None else whole)),
        )
