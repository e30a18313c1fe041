"""Alignment data: text records and synthetic (or real) embeddings become examples, then batches.

An example is a prompt with a chosen and perhaps a rejected answer. Its *part* says where it comes from:

    text       the record's own question, no media
    prefixed   E + SEA's prefix + neutral instruction     (what SEA trains on)
    plain      E + neutral instruction
    alone      E and no text: the medium is the whole request, as speech can be
    reading    E + the content question -> the description that E was optimised for (keeps the model reading)
    replay     E + another question -> what the unaligned model answers to it (keeps the model from drifting on it)

Batches are stratified: every cell (part, harmful or harmless) gets its share of every batch, so harmless embeddings
always stand beside harmful ones; harmful-only data teaches "an image means refuse". A batch is a pure function of
(seed, step), so a resumed run continues exactly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from configs.schema import Mixture, Prompts
from datamodules.control_samples import control_samples
from datamodules.records import Record
from mllm.branches import Item, split_shared
from mllm.prompts import PromptEncoder

Part = Literal["text", "prefixed", "plain", "alone", "reading", "replay"]
PARTS: tuple[Part, ...] = ("text", "prefixed", "plain", "alone", "reading", "replay")
Replays = Mapping[str, Sequence[tuple[str, str]]]
"""Id of an embedding -> (question, the unaligned model's answer)."""


class Embeddings(Protocol):
    """What a batch needs from the embedding store."""

    def batch(self, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """Projector path -> [len(ids), *shape of one item]."""
        ...


@dataclass(frozen=True)
class AlignmentExample:
    """One training example. `embedding` is the id in the store, None for text."""

    id: str
    part: Part
    harmful: bool
    question: str
    chosen: str
    rejected: str | None
    embedding: str | None


@dataclass(frozen=True)
class AlignmentBatch:
    """Examples with media first. `text` and `media` are disjoint; E[path]: the media items' on dim 0, concatenated.

    ids: of media, then of text. share: where each of `media` stands among those of the whole batch over all ranks, and
    how many those are; None: this is the whole batch.
    """

    step: int
    text: list[Item]
    media: list[Item]
    E: dict[str, torch.Tensor]
    ids: list[str]
    share: tuple[list[int], int] | None = None


def examples(
    records: Sequence[Record],
    available: set[str],
    mixture: Mixture,
    prompts: Prompts,
    modality: str,
    refusal: str,
    seed: int,
    replays: Replays | None = None,
) -> list[AlignmentExample]:
    """All examples that the mixture asks for. `available`: ids of embeddings that may be used; `refusal`: the answer
    that is rejected where the model should have described what it saw.

    Raises:
        ValueError: the mixture asks for embeddings and none is available.
    """
    out: list[AlignmentExample] = []
    wanted = [part for part in PARTS if getattr(mixture, part) > 0]
    for record in records:
        if "text" in wanted:
            chosen, rejected = record.chosen, record.rejected
            out.append(
                AlignmentExample(f"text/{record.id}", "text", record.harmful, record.question, chosen, rejected, None)
            )
        if record.id not in available or record.concept is None:
            continue
        concept = record.concept
        prefix = prompts.prefix_activity if concept.kind == "activity" else prompts.prefix_product
        asked: dict[Part, str] = {
            "prefixed": f"{prefix.format(modality=modality)} {concept.instruction}",
            "plain": concept.instruction,
            "alone": "",
        }
        for part, question in asked.items():
            if part in wanted:
                name = f"{part}/{record.id}"
                out.append(
                    AlignmentExample(name, part, record.harmful, question, record.chosen, record.rejected, record.id)
                )
        if "reading" in wanted:
            content = control_samples(concept, record.id, prompts, modality, seed).content
            out.append(
                AlignmentExample(
                    f"reading/{record.id}",
                    "reading",
                    record.harmful,
                    content.question,
                    content.answer,
                    refusal,
                    record.id,
                )
            )
        if "replay" in wanted:
            for k, (question, said) in enumerate((replays or {}).get(record.id, ())):
                name = f"replay/{record.id}/{k}"
                out.append(AlignmentExample(name, "replay", record.harmful, question, said, refusal, record.id))
    missing = [part for part in wanted if not any(e.part == part for e in out)]
    if missing:
        raise ValueError(
            f"no examples for {', '.join(missing)}: {len(records)} records, {len(available)} usable embeddings; "
            "run the stage synthesize first"
        )
    return out


def encode(example: AlignmentExample, encoder: PromptEncoder, media_ids: Sequence[int], pairs: bool) -> Item:
    """Token ids: one branch (SFT) or chosen and rejected (DPO) behind the shared prompt.

    Raises:
        ValueError: a pair is asked for and the record has no rejected answer.
    """
    answers = [example.chosen]
    if pairs:
        if example.rejected is None:
            raise ValueError(f"{example.id} has no rejected answer, which DPO needs; use method=sft or give `rejected`")
        answers.append(example.rejected)
    media = example.embedding is not None
    return split_shared([encoder.example(example.question, a, media) for a in answers], media_ids if media else ())


class MixtureSampler:
    """Chooses the examples of every step: cells in proportion to the mixture, each cell shuffled anew every pass."""

    def __init__(self, examples: Sequence[AlignmentExample], mixture: Mixture, batch_size: int, seed: int) -> None:
        cells: dict[tuple[Part, bool], list[int]] = {}
        for i, e in enumerate(examples):
            cells.setdefault((e.part, e.harmful), []).append(i)
        self.cells = dict(sorted(cells.items()))
        share = {True: mixture.harmful, False: 1 - mixture.harmful}
        both = {part: all((part, flag) in self.cells for flag in share) for part in PARTS}
        self.weights = [getattr(mixture, part) * (share[flag] if both[part] else 1) for part, flag in self.cells]
        self.batch_size, self.seed = batch_size, seed
        self._orders: dict[tuple[Part, bool], tuple[int, list[int]]] = {}  # of the pass that each cell is in

    def counts(self, step: int) -> list[int]:
        """Examples of each cell up to and including no step before `step` (cumulative, largest remainder)."""
        total = sum(self.weights)
        exact = [step * self.batch_size * w / total for w in self.weights]
        counts = [int(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: step * self.batch_size - sum(counts)]:
            counts[i] += 1
        return counts

    def step(self, step: int) -> list[int]:
        """Indices of the examples of one step."""
        out = []
        before, after = self.counts(step), self.counts(step + 1)
        for (key, members), start, stop in zip(self.cells.items(), before, after, strict=True):
            out += [self._draw(key, members, k) for k in range(start, stop)]
        random.Random(f"{self.seed}/{step}").shuffle(out)
        return out

    def _draw(self, key: tuple[Part, bool], members: list[int], k: int) -> int:
        epoch, position = divmod(k, len(members))
        if self._orders.get(key, (-1, []))[0] != epoch:
            order = list(members)
            random.Random(f"{self.seed}/{key}/{epoch}").shuffle(order)
            self._orders[key] = epoch, order
        return self._orders[key][1][position]


class Batches(IterableDataset[AlignmentBatch]):
    """Batches of steps `start` to `steps`. Under several ranks each rank takes its share of every batch."""

    def __init__(
        self,
        items: Sequence[Item],
        examples: Sequence[AlignmentExample],
        sampler: MixtureSampler,
        embeddings: Embeddings | None,
        steps: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.items, self.examples, self.sampler, self.embeddings = items, examples, sampler, embeddings
        self.steps, self.start, self.rank, self.world = steps, 0, rank, world

    def __iter__(self) -> Iterator[AlignmentBatch]:
        for step in range(self.start, self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> AlignmentBatch:
        whole = self.sampler.step(step)
        batch = self.collate(whole[self.rank :: self.world], step)
        media = [at for at, i in enumerate(whole) if self.examples[i].embedding is not None]
        places = [place for place, at in enumerate(media) if at % self.world == self.rank]
        return replace(batch, share=(places, len(media)))

    def collate(self, chosen: Sequence[int], step: int = 0) -> AlignmentBatch:
        """The batch of these examples."""
        media = [i for i in chosen if self.examples[i].embedding is not None]
        text = [i for i in chosen if self.examples[i].embedding is None]
        E: dict[str, torch.Tensor] = {}
        if media:
            assert self.embeddings is not None
            stacked = self.embeddings.batch([self.examples[i].embedding or "" for i in media])
            E = {path: e.float().flatten(0, 1) for path, e in stacked.items()}
        ids = [self.examples[i].id for i in media + text]
        return AlignmentBatch(step, [self.items[i] for i in text], [self.items[i] for i in media], E, ids)


class AlignmentDataModule(L.LightningDataModule):
    """Batches for an aligner. `batch_size` counts examples in one optimiser step over all devices."""

    def __init__(
        self,
        examples: Sequence[AlignmentExample],
        items: Sequence[Item],
        mixture: Mixture,
        embeddings: Embeddings | None,
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        sampler = MixtureSampler(examples, mixture, batch_size, seed)
        self.batches = Batches(items, examples, sampler, embeddings, steps)

    def train_dataloader(self) -> DataLoader[AlignmentBatch]:
        trainer = self.trainer
        assert trainer is not None
        self.batches.rank, self.batches.world = trainer.global_rank, trainer.world_size
        self.batches.start = trainer.global_step
        return DataLoader(self.batches, batch_size=None)


def chunks(
    batch: AlignmentBatch, size: int
) -> Iterator[tuple[list[Item], Mapping[str, torch.Tensor] | None, list[str]]]:
    """Micro-batches of at most `size` examples: all media or all text, with their E and ids."""
    n = len(batch.media)
    for at in range(0, n, size):
        items = batch.media[at : at + size]
        E = {path: rows_of(e, n, at, len(items)) for path, e in batch.E.items()}
        yield items, E, batch.ids[at : at + len(items)]
    for at in range(0, len(batch.text), size):
        yield batch.text[at : at + size], None, batch.ids[n + at : n + at + size]


def rows_of(e: torch.Tensor, n: int, start: int, count: int) -> torch.Tensor:
    """Rows of items start .. start + count in a tensor that holds n items on dim 0."""
    rows = e.shape[0] // n
    return e[start * rows : (start + count) * rows]
