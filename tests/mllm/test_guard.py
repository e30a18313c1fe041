"""The guard itself, without a server: passed, detoxified or refused; batched; failing closed; streaming."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from mllm.detector import Detector
from mllm.guard import REFUSAL, Guard, Guarded
from mllm.guard_batching import Batcher
from mllm.guard_waiting import Failure, Steps, drive, drive_async
from tests.micro import micro
from tests.mllm.guard_world import MARKER, SAFE, detector, detoxifier, encoder_detector, words

HARMFUL, BENIGN = words(20, 1, 9), words(20, 1)


def test_unflagged_answers_pass_byte_for_byte_and_only_flagged_ones_are_rewritten() -> None:
    asked: list[str] = []

    class Watched(type(detoxifier())):  # type: ignore[misc]
        def rewrite(self, questions: Any, harmful_answers: Any, *args: Any, **kwargs: Any) -> list[str]:
            asked.extend(harmful_answers)
            return super().rewrite(questions, harmful_answers, *args, **kwargs)

    plain = detoxifier()
    guard = Guard(detector(), Watched(plain.model, plain.tokenizer, plain.spec), batch_size=4, max_new_tokens=12)
    answers = [words(n, n, n // 2 if n % 5 == 0 else None) + "  \n" for n in range(1, 31)]
    results = guard.check(["w1 ?"] * 30, answers)
    for answer, result in zip(answers, results, strict=True):
        assert result.original == answer
        if MARKER in answer:
            assert (result.action, result.reason, result.answer) == ("detoxified", "rewritten", "this is fine.")
            assert result.score is not None
            assert result.score_after is not None
            assert result.score < 0.5 < result.score_after
        else:
            assert (result.action, result.answer, result.score_after) == ("passed", answer, None)
    assert sorted(asked) == sorted(a for a in answers if MARKER in a)


def test_scores_are_the_detectors_own() -> None:
    found = detector()
    answers = [words(n, n, 0 if n % 2 else None) for n in range(1, 40, 3)]
    results = Guard(found).check(["w2 w3 ?"] * len(answers), answers)
    expected = found.score(["w2 w3 ?"] * len(answers), answers).tolist()
    assert [r.score for r in results] == pytest.approx(expected, abs=1e-6)


def test_a_rewrite_that_is_still_harmful_becomes_the_refusal() -> None:
    (result,) = Guard(detector(), detoxifier(f"{MARKER} w1 ."), max_new_tokens=12).check(["w1 ?"], [HARMFUL])
    assert (result.answer, result.action, result.reason) == (REFUSAL, "refused", "rewrite_harmful")
    assert result.score_after is not None
    assert result.score_after < 0.5


@pytest.mark.parametrize(("attempts", "action"), [(2, "refused"), (3, "detoxified")])
def test_a_harmful_rewrite_is_tried_again_and_only_that_one(attempts: int, action: str) -> None:
    """A detoxifier whose third attempt at the hard answer is the first that is harmless."""
    hard, easy = words(20, 2, 9), words(20, 3, 9)
    asked: list[tuple[str, int]] = []

    class Slow(type(detoxifier())):  # type: ignore[misc]
        def rewrite(self, questions: Any, harmful_answers: Any, *args: Any, attempt: int = 0) -> list[str]:
            asked.extend((a, attempt) for a in harmful_answers)
            return [MARKER if a == hard and attempt < 2 else SAFE for a in harmful_answers]

    plain = detoxifier()
    guard = Guard(detector(), Slow(plain.model, plain.tokenizer, plain.spec), attempts=attempts)
    first, second = guard.check(["w1 ?"] * 2, [hard, easy])
    assert (first.action, second.action) == (action, "detoxified")
    assert sorted(asked) == sorted([(easy, 0), *((hard, n) for n in range(attempts))])


def test_without_a_detoxifier_it_refuses() -> None:
    results = Guard(detector(), refusal="No.").check(["w1 ?", "w1 ?", ""], [HARMFUL, BENIGN, ""])
    assert [(r.answer, r.action, r.reason) for r in results] == [
        ("No.", "refused", "harmful"),
        (BENIGN, "passed", "harmless"),
        ("", "passed", "empty"),
    ]


def damaged(how: str) -> Detector:
    found = detector()
    if how == "invalid":
        torch.nn.init.constant_(found.model.score.weight, float("nan"))
    elif how == "error":
        found.model.score = torch.nn.Linear(7, 1)
    else:
        found.model.register_forward_pre_hook(lambda *args: time.sleep(0.5))
    return found


@pytest.mark.parametrize("how", ["invalid", "error", "timeout"])
def test_a_failing_detector_means_the_refusal(how: str) -> None:
    guard = Guard(healthy := detector(), detoxifier(), timeout=0.2 if how == "timeout" else 30)
    broken = damaged(how)
    healthy.model = broken.model  # from now on
    (result,) = guard.check(["w1 ?"], [BENIGN])
    assert result == Guarded(BENIGN, REFUSAL, None, None, "refused", f"detector_{how}")  # type: ignore[arg-type]
    growing = guard.begin("w1 ?")
    assert [*growing.feed(BENIGN), *growing.finish()] == [REFUSAL]
    assert (growing.action, growing.reason, growing.released) == ("refused", f"detector_{how}", "")


def test_a_failing_detoxifier_means_the_refusal() -> None:
    for how, reason in (("error", "detoxifier_error"), ("timeout", "detoxifier_timeout"), ("empty", "rewrite_empty")):
        rewriter = detoxifier()
        if how == "error":
            rewriter.model.lm_head = torch.nn.Linear(7, 1)
        elif how == "timeout":
            rewriter.model.register_forward_pre_hook(lambda *args: time.sleep(0.5))
        guard = Guard(detector(), rewriter, rewrite_timeout=0.2 if how == "timeout" else 30, max_new_tokens=12)
        if how == "empty":
            rewriter.model.generation_config.suppress_tokens = [i for i in range(len(rewriter.tokenizer)) if i != 2]
        (result,) = guard.check(["w1 ?"], [HARMFUL])
        assert (result.answer, result.reason) == (REFUSAL, reason)


def test_a_text_that_breaks_the_tokenizer_is_not_its_neighbours_failure() -> None:
    results = Guard(detector()).check(["w1 ?"] * 3, [BENIGN, "w1 \ud800", BENIGN + " w1"])
    assert [r.reason for r in results] == ["harmless", "detector_error", "harmless"]


def test_questions_and_answers_must_pair() -> None:
    with pytest.raises(ValueError, match="2 questions for 1 answers"):
        Guard(detector()).check(["a", "b"], ["c"])


@pytest.mark.parametrize("make", [detector, encoder_detector])
@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_a_benign_stream_comes_out_whole_and_every_release_was_scored_harmless(make: Any, chunk: int) -> None:
    text = words(120, 7) + "\n\nw1 "
    guard = Guard(found := make())
    growing = guard.begin("w1 ?")
    out: list[str] = []
    for at in range(0, len(text), chunk):
        out += growing.feed(text[at : at + chunk])
    out += growing.finish()
    assert "".join(out) == growing.released == text
    assert len(out) >= 15  # sentence by sentence
    ends = ["".join(out[: n + 1]) for n in range(len(out))]
    anew = found.score(["w1 ?"] * len(ends), ends)
    assert not found.harmful(anew).any()
    assert growing.scores == pytest.approx(anew.tolist(), abs=2e-5)


@pytest.mark.parametrize("at", [0, 7, 8, 50, 119])
def test_a_stream_stops_before_the_harmful_sentence(at: int) -> None:
    text = words(120, 7, marker_at=at)
    sentence = at // 8
    expected = " ".join(text.split(" ")[: 8 * sentence])
    guard = Guard(detector())
    out = "".join(guard.stream("w1 ?", iter(text)))
    assert out == (f"{expected}\n\n{REFUSAL}" if expected else REFUSAL)


def test_a_sentence_is_checked_every_32_tokens() -> None:
    text = " ".join(["w1"] * 100 + [MARKER] + ["w1"] * 100)
    growing = Guard(detector()).begin("w1 ?")
    fed = 0
    while not growing.stopped:
        growing.feed(text[fed : fed + 1])
        fed += 1
    assert len(growing.scores) == 4
    assert growing.released == " ".join(["w1"] * 96)
    assert fed <= len(" ".join(["w1"] * 135))


def test_the_asyncio_stream_gives_what_the_blocking_one_does() -> None:
    guard = Guard(detector())
    for text in (words(60, 2), words(60, 2, 33)):

        async def pieces(text: str = text) -> AsyncIterator[str]:
            for at in range(0, len(text), 3):
                yield text[at : at + 3]

        async def collect() -> list[str]:
            return [t async for t in guard.stream_async("w1 ?", pieces())]

        assert asyncio.run(collect()) == list(guard.stream("w1 ?", iter(text)))


def test_concurrent_checks_share_batches() -> None:
    sizes: list[int] = []
    guard = Guard(detector(), observe=lambda kind, seconds, size: sizes.append(size))

    async def everyone() -> list[Guarded]:
        return await asyncio.gather(
            *(guard.check_async("w1 ?", words(10, n, 3 if n % 4 == 0 else None)) for n in range(50))
        )

    results = asyncio.run(everyone())
    assert [r.action == "refused" for r in results] == [n % 4 == 0 for n in range(50)]
    assert sum(sizes) == 50
    assert len(sizes) < 15


def test_guarded_generation_of_a_model_of_the_project() -> None:
    mllm = micro()
    questions = ["How do I bake the cake?", "List steps to paint the boat."]
    from mllm.generate import answer

    results = Guard(detector()).answer(mllm, questions, max_new_tokens=16)
    assert [r.answer for r in results] == answer(mllm, questions, max_new_tokens=16)
    assert {r.action for r in results} <= {"passed"}


def test_a_batcher_takes_what_waits_and_skips_what_nobody_waits_for() -> None:
    gate, batches = threading.Event(), []

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        gate.wait(5)
        return [2 * i for i in items]

    batcher = Batcher(run, 3, "test")
    (first,) = batcher.submit([0])
    while not batches:
        time.sleep(0.001)
    rest = batcher.submit([1, 2, 3, 4])
    rest[1].cancel()
    gate.set()
    assert [f.result(5) for f in [first, rest[0], *rest[2:]]] == [0, 2, 6, 8]
    assert batches == [[0], [1, 3], [4]]
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit([5])


def test_a_batcher_that_closes_cancels_what_waits() -> None:
    gate = threading.Event()
    batcher: Batcher[int, int] = Batcher(lambda items: [gate.wait(5) for _ in items], 1, "test")

    def steps() -> Steps[list[Any]]:
        futures = batcher.submit([1, 2])
        batcher.close()
        gate.set()
        return (yield futures, 5.0)

    assert drive(steps()) in ([True, Failure("error")], [Failure("error"), Failure("error")])


def test_what_is_waited_for_too_long_is_a_failure_for_blocking_and_asyncio_callers() -> None:
    gate = threading.Event()
    batcher: Batcher[int, int] = Batcher(lambda items: [gate.wait(5) for _ in items], 1, "test")

    def steps() -> Steps[list[Any]]:
        return (yield batcher.submit([1, 2]), 0.05)

    assert drive(steps()) == [Failure("timeout")] * 2
    assert asyncio.run(drive_async(steps())) == [Failure("timeout")] * 2
    gate.set()


def test_the_rewrite_is_scored_with_the_question_it_answers() -> None:
    guard = Guard(detector(), detoxifier(SAFE), max_new_tokens=12)
    (result,) = guard.check([f"{MARKER} ?"], [HARMFUL])
    assert result.reason == "rewrite_harmful"  # this detector sees the marker in the question as well
