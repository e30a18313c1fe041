"""Reading on from a cache scores as reading everything anew does: alone, in batches, in windows, after eviction."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, MistralConfig, PreTrainedConfig, Qwen2Config

from mllm.detector import Detector
from mllm.guard_checks import Check, Reader
from mllm.guard_scoring import Scoring
from tests.mllm.guard_world import SHAPE, detector, encoder_detector, random_detector, section_detector, words

QUESTIONS = ["w1 ?", "w2 w3 w4 w5 ?", "", "w6 " * 50]


def grown(text: str, seed: int) -> list[str]:
    """Beginnings of a text, each longer than the one before, ending with all of it; cut anywhere, in words too."""
    rng = random.Random(seed)
    return [text[:n] for n in sorted({*rng.choices(range(1, len(text)), k=6), len(text)})]


def compare(found: Detector, scoring: Scoring, lengths: list[int]) -> None:
    """Several streams at once, each at its own pace, against full re-reads."""
    streams = [grown(words(n, n, n // 2), n) for n in lengths]
    readers = [Reader() for _ in streams]
    turns = max(map(len, streams))
    for turn in range(turns):
        checks = [
            Check(QUESTIONS[i % 4], s[turn], readers[i]) for i, s in enumerate(streams) if turn < len(s)
        ]  # fmt: skip
        anew = found.score([c.question for c in checks], [c.answer for c in checks])
        torch.testing.assert_close(torch.tensor(scoring.score(checks)), anew, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("error::FutureWarning")  # of transformers, about the cache's old name
@pytest.mark.parametrize("make", [random_detector, section_detector])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_streams_read_on_together_score_as_if_read_anew(batch_size: int, make: Callable[[], Detector]) -> None:
    found = make()
    scoring = Scoring(found, batch_size)
    assert scoring.reads_on
    compare(found, scoring, [5, 12, 30, 31, 64])


def test_an_answer_longer_than_the_detector_reads_is_scored_in_windows() -> None:
    found = detector()
    long = [Check("w1 ?", words(400, 1, at), Reader()) for at in (0, 140, 290, 399)]
    scores = Scoring(found).score([*long, Check("w1 ?", words(400, 1), Reader())])
    assert max(scores[:4]) < 0.1  # wherever the marker is
    assert scores[4] > 0.9
    for found in (random_detector(), section_detector()):
        compare(found, Scoring(found), [150, 260])


def test_what_was_read_is_not_read_again() -> None:
    found = detector()
    scoring, reader = Scoring(found), Reader()
    text = words(90)
    beginnings = [text[:n] for n in range(1, len(text) + 1) if text[n - 1] == "."] + [text]
    for beginning in beginnings:
        scoring.score([Check("w1 ?", beginning, reader)])
    assert scoring.tokens_read <= len(found.encode("w1 ?", text)) + len(beginnings)
    assert sum(len(found.encode("w1 ?", b)) for b in beginnings) > 5 * scoring.tokens_read


def test_text_that_is_shortened_or_replaced_is_read_from_where_it_differs() -> None:
    for found in (random_detector(), section_detector()):
        scoring, reader = Scoring(found), Reader()
        for answer in (words(20), words(10), words(20, 5, 3), words(20)):
            (score,) = scoring.score([Check("w1 ?", answer, reader)])
            assert score == pytest.approx(float(found.score(["w1 ?"], [answer])), abs=2e-5)


def test_caches_beyond_the_limit_are_dropped_and_read_anew() -> None:
    found = random_detector()
    scoring = Scoring(found, max_cached_tokens=100)
    compare(found, scoring, [30, 40, 50, 60])
    readers = [Reader() for _ in range(5)]
    for n, reader in enumerate(readers):
        scoring.score([Check("w1 ?", words(40, n), reader)])
    assert [bool(r.cache) for r in readers] == [False, False, False, False, True]


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(num_key_value_heads=2, **SHAPE),
        MistralConfig(num_key_value_heads=2, sliding_window=16, **SHAPE),
        GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=256),
    ],
    ids=lambda c: c.model_type,
)
def test_other_decoders(config: PreTrainedConfig) -> None:
    found = random_detector(config)
    scoring = Scoring(found)
    assert scoring.reads_on
    compare(found, scoring, [5, 30, 64])


def test_an_encoder_reads_anew() -> None:
    found = encoder_detector()
    scoring = Scoring(found)
    assert not scoring.reads_on
    compare(found, scoring, [5, 30, 150])


def test_a_score_that_is_no_number_stays_none_in_every_window() -> None:
    found = detector()
    found.model.score.weight.fill_(float("nan"))
    scores = Scoring(found).score([Check("w1 ?", words(300), Reader()), Check("w1 ?", words(300))])
    assert all(s != s for s in scores)
