"""Batches of questions: each text once, every label and pair kept, the order a function of seed and step."""

from __future__ import annotations

import pytest
import torch

from datamodules.qa_batches import MOST, Buckets, QuestionBatches, encode_questions
from datamodules.qa_pairs import Answer, QAPair
from mllm.qa_text import QAIds


def pair(question: str, better: str, worse: str | None, worse_harmless: bool = False) -> QAPair:
    return QAPair(question, Answer(better, True), None if worse is None else Answer(worse, worse_harmless), question)


def encode(question: str, answer: str) -> QAIds:
    return QAIds([len(question), *(ord(c) for c in answer)], 1)


def test_an_answer_in_two_pairs_is_encoded_once_and_keeps_both_labels() -> None:
    pairs = [pair("q", "a", "b"), pair("q", "b", "c"), pair("r", "d", None), pair("r", "e", "f", worse_harmless=True)]
    first, second = encode_questions(pairs, encode)
    assert first.ids == ([1, 97], [1, 98], [1, 99])
    assert first.labels == ((0, True), (1, False), (1, True), (2, False))
    assert first.pairs == ((0, 1), (1, 2))
    assert second.labels == ((0, True), (1, True), (2, True))
    assert second.pairs == ()  # nothing to compare: no harmful answer


def test_equal_pairs_are_votes_on_one_text() -> None:
    (item,) = encode_questions([pair("q", "a", "b"), pair("q", "c", "b"), pair("q", "a", "b")], encode)
    assert item.ids == ([1, 97], [1, 98], [1, 99])
    assert item.labels == ((0, True), (1, False), (0, True), (1, False), (2, True), (1, False))
    assert item.pairs == ((0, 1), (0, 1), (2, 1))


def test_one_question_with_many_pairs_is_cut_into_items_that_lose_nothing() -> None:
    pairs = [pair("q", f"good {i}", f"bad {i}") for i in range(3 * MOST + 1)]
    items = encode_questions(pairs, encode)
    assert len(items) == 4
    assert max(len(item.pairs) for item in items) == MOST
    assert sum(len(item.pairs) for item in items) == len(pairs)


def test_a_batch_pads_right_and_points_at_the_right_texts() -> None:
    items = encode_questions([pair("q", "a", "bcd"), pair("rr", "ef", "g")], encode)
    batch = QuestionBatches(items, 2, 1, seed=0, pad_id=0).collate([1, 0])
    assert batch.ids.tolist() == [[2, 101, 102, 0], [2, 103, 0, 0], [1, 97, 0, 0], [1, 98, 99, 100]]
    assert batch.mask.sum(1).tolist() == [3, 2, 2, 4]
    assert batch.text_L.tolist() == [0, 1, 2, 3]
    assert batch.harmless_L.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch.pairs_P2.tolist() == [[0, 1], [2, 3]]
    assert batch.positions.tolist() == [2, 3, 0, 1]


def test_an_epoch_shows_every_item_once_and_a_resumed_run_the_same_batches() -> None:
    lengths = [(i * 37) % 91 + 1 for i in range(103)]
    buckets = Buckets(lengths, batch_size=8, seed=1)
    epoch = [buckets(step) for step in range(buckets.per_epoch)]
    shown = [i for batch in epoch for i in batch]
    assert len(shown) == len(set(shown)) == 96
    assert [Buckets(lengths, 8, 1)(step) for step in (11, 3, 17)] == [epoch[11], epoch[3], buckets(17)]
    assert {i for batch in (buckets(s) for s in range(12, 24)) for i in batch} != set(shown)


def test_buckets_waste_less_padding_than_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (512,), generator=generator).tolist()

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    buckets = Buckets(lengths, 8, 0)
    random = [list(range(at, at + 8)) for at in range(0, 512, 8)]
    assert padding([buckets(s) for s in range(64)]) < 0.3 * padding(random)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training example"):
        Buckets([], 8, 0)
