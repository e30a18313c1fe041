"""Batches of questions with all their answers: each text once, like lengths together, the order a function of the step.

In preference data one answer stands in several pairs (better than one, worse than another: 406 of the 3,916 answers of
the SafeRLHF sample carry both labels). A batch holds questions with their answers, encodes each
distinct answer once, and keeps the labels and pairs as indices into the texts: a third less to compute, and the same
loss.

Buckets: an epoch's shuffled questions are cut into spans of `SPAN` batches, sorted by length inside a span, cut into
batches, and the batches shuffled. Batch `step` depends on (seed, step) alone, so a resumed run continues exactly.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import lightning as L
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from datamodules.qa_pairs import QAPair
from mllm.qa_text import QAIds

T = TypeVar("T")

SPAN = 16
MOST = 6
"""Distinct pairs of one question that stay together: one with 30 would make a batch ten times the others."""


@dataclass(frozen=True)
class QuestionTexts:
    """One question, encoded.

    ids: of each distinct answer. labels: (index of the text, harmless), one for each answer of each pair, so a text in
    two pairs counts twice. pairs: (index of the harmless, index of the harmful answer), where a pair has both.
    group: what is never divided between training and test.
    """

    ids: tuple[QAIds, ...]
    labels: tuple[tuple[int, bool], ...]
    pairs: tuple[tuple[int, int], ...]
    group: str = ""

    @property
    def length(self) -> int:
        return max(map(len, self.ids))


@dataclass(frozen=True)
class TextBatch:
    """ids, mask: [N, T], right-padded. text_L, harmless_L: index of a text, its label. pairs_P2: (harmless, harmful).

    positions: where each text stands among all texts (for cached features), [N]. harmless, harmful, pairs: how many
    labels and pairs the whole batch has, over all ranks: what means are taken over.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    text_L: torch.Tensor
    harmless_L: torch.Tensor
    pairs_P2: torch.Tensor
    positions: torch.Tensor
    harmless: int
    harmful: int
    pairs: int


def encode_questions(pairs: Sequence[QAPair], encode: Callable[[str, str], QAIds]) -> list[QuestionTexts]:
    """The pairs gathered by question (at most `MOST` distinct ones together), in the order in which they first come.

    Equal pairs are votes: they stay together, with as many labels as votes and one text to compute.
    """
    by_question: dict[tuple[str, str], Counter[QAPair]] = {}
    for pair in pairs:
        votes = by_question.setdefault((pair.group, pair.question), Counter())
        votes[replace(pair, source="")] += 1
    out = []
    for (group, question), votes in by_question.items():
        for members in batched(votes.items(), MOST):
            texts = list(dict.fromkeys(a.text for p, _ in members for a in p.answers))
            at = {text: i for i, text in enumerate(texts)}
            labels = [(at[a.text], a.harmless) for p, n in members for a in p.answers * n]
            preferred = [
                (at[p.better.text], at[p.worse.text])
                for p, n in members
                for _ in range(n)
                if p.worse is not None and p.contrast
            ]
            ids = tuple(encode(question, text) for text in texts)
            out.append(QuestionTexts(ids, tuple(labels), tuple(preferred), group))
    return out


def batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of n items (itertools.batched comes with Python 3.12 only)."""
    walk = iter(items)
    while part := list(islice(walk, n)):
        yield part


class Buckets:
    """Indices of the items of batch `step`, for items of the given lengths."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if not lengths:
            raise ValueError("no training example")
        self.lengths, self.batch_size, self.seed = lengths, min(batch_size, len(lengths)), seed
        self.per_epoch = len(lengths) // self.batch_size
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __call__(self, step: int) -> list[int]:
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(random.Random(f"{self.seed}/{epoch}"))
        return self._batches[number]

    def _shuffled(self, rng: random.Random) -> list[list[int]]:
        order, n, batches = list(range(len(self.lengths))), self.batch_size, []
        rng.shuffle(order)
        del order[self.per_epoch * n :]  # the rest waits for another epoch's order
        for at in range(0, len(order), n * SPAN):
            span = sorted(order[at : at + n * SPAN], key=lambda i: self.lengths[i])
            batches += [span[i : i + n] for i in range(0, len(span), n)]
        rng.shuffle(batches)
        return batches


class QuestionBatches(IterableDataset[TextBatch]):
    """Batches of `batch_size` questions, from `start` to `steps`; of several ranks each takes its share of each."""

    def __init__(self, questions: Sequence[QuestionTexts], batch_size: int, steps: int, seed: int, pad_id: int) -> None:
        self.questions, self.steps, self.pad_id, self.start = questions, steps, pad_id, 0
        self.rank, self.world = 0, 1
        self.buckets = Buckets([q.length for q in questions], batch_size, seed)
        self.first = [0]  # where each question's texts begin among all texts
        for q in questions:
            self.first.append(self.first[-1] + len(q.ids))

    def __iter__(self) -> Iterator[TextBatch]:
        for step in range(self.start, self.steps):
            whole = self.buckets(step)
            yield self.collate(whole[self.rank :: self.world], whole)

    def collate(self, indices: Sequence[int], whole: Sequence[int] | None = None) -> TextBatch:
        """The batch of these questions, a share of the `whole` one."""
        together = [self.questions[i] for i in (indices if whole is None else whole)]
        all_labels = [harmless for q in together for _, harmless in q.labels]
        rows: list[torch.Tensor] = []
        labels: list[tuple[int, bool]] = []
        pairs: list[tuple[int, int]] = []
        positions: list[int] = []
        for i in indices:
            q, offset = self.questions[i], len(rows)
            rows += [torch.tensor(ids) for ids in q.ids]
            labels += [(offset + text, harmless) for text, harmless in q.labels]
            pairs += [(offset + better, offset + worse) for better, worse in q.pairs]
            positions += range(self.first[i], self.first[i] + len(q.ids))
        return TextBatch(
            ids=pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            text_L=torch.tensor([text for text, _ in labels]),
            harmless_L=torch.tensor([float(harmless) for _, harmless in labels]),
            pairs_P2=torch.tensor(pairs, dtype=torch.long).view(-1, 2),
            positions=torch.tensor(positions),
            harmless=sum(all_labels),
            harmful=len(all_labels) - sum(all_labels),
            pairs=sum(len(q.pairs) for q in together),
        )


class Steps(Protocol):
    """Batches of an optimiser's steps: iterating begins at `start` and yields the share of `rank` among `world`."""

    start: int
    rank: int
    world: int
    buckets: Buckets

    def __iter__(self) -> Iterator[Any]: ...


class StepDataModule(L.LightningDataModule):
    """Hands batches to Lightning; a resumed fit begins at its checkpoint's step, each rank takes its share."""

    def __init__(self, batches: Steps) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        self.batches.rank, self.batches.world = trainer.global_rank, trainer.world_size
        self.batches.start = trainer.global_step
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]
