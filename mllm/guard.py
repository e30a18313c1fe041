"""The guard of MLLM-Protector (arXiv 2401.02906, section 3) behind any model: detector, detoxifier, refusal.

    guard = Guard(Detector.load(DIR), Detoxifier.load(DIR))
    results = guard.check(questions, answers)                       # list[Guarded]
    for text in guard.stream(question, pieces_of_the_answer): ...   # released only after it was scored
    python -m mllm.guard score|detoxify|serve --help

An answer that the detector calls harmless passes byte for byte. A flagged one is rewritten by the detoxifier, the
rewrite is scored like any answer, and what is still flagged becomes the refusal. The guard fails closed: a detector
that raises, takes too long or returns a score that is no number leads to the refusal, never to the raw answer.

Order of an answer's way: score -> (flagged) rewrite -> score again -> passed | detoxified | refused. The model calls
run in threads of their own, in batches over all callers (guard_batching.py); the way itself is written once, as a
generator that yields what it waits for, and driven by blocking or asyncio callers alike (guard_waiting.py).
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mllm.guard_batching import Batcher
from mllm.guard_checks import Check
from mllm.guard_stream import GuardedStream
from mllm.guard_waiting import Failure, Outcome, Reason, Steps, drive, drive_async

if TYPE_CHECKING:  # `python -m mllm.guard --help` must not wait for torch and transformers
    import torch

    from mllm.detector import Detector
    from mllm.detoxifier import Detoxifier
    from mllm.loading import MLLM

REFUSAL = "Sorry, I cannot help with that."
Action = Literal["passed", "detoxified", "refused"]


@dataclass(frozen=True)
class Guarded:
    """What became of one answer. Scores are harmless_score, 0..1; None where there is none."""

    original: str
    answer: str
    score: float | None
    score_after: float | None  # of the rewrite
    action: Action
    reason: Reason


class Guard:
    """Detector and, optionally, detoxifier.

    Args:
        refusal: what is said in place of an answer that stays flagged.
        batch_size: answers scored or rewritten at once.
        timeout, rewrite_timeout: seconds that a batch may wait for the detector, and for the detoxifier.
        max_new_tokens: longest rewrite.
        attempts: rewrites tried while the detector calls them harmful: the first is greedy, the others are drawn.
        every_tokens: streaming: most tokens between two checks.
        observe: called as observe(kind, seconds, size) after each model call, kind "score" or "rewrite".
    """

    def __init__(
        self,
        detector: Detector,
        detoxifier: Detoxifier | None = None,
        refusal: str = REFUSAL,
        batch_size: int = 16,
        timeout: float = 30.0,
        rewrite_timeout: float = 120.0,
        max_new_tokens: int = 256,
        every_tokens: int = 32,
        attempts: int = 4,
        observe: Callable[[str, float, int], None] = lambda kind, seconds, size: None,
    ) -> None:
        from mllm.guard_scoring import Scoring

        if timeout <= 0 or rewrite_timeout <= 0:
            raise ValueError(f"timeout={timeout}, rewrite_timeout={rewrite_timeout}: expected seconds above 0")
        self.detector, self.detoxifier, self.refusal = detector, detoxifier, refusal
        if attempts < 1:
            raise ValueError(f"attempts={attempts}: expected 1 or more")
        self.batch_size, self.timeout, self.rewrite_timeout = batch_size, timeout, rewrite_timeout
        self.attempts = attempts
        self.every_tokens = every_tokens

        def timed(kind: str) -> Callable[[float, int], None]:
            return lambda seconds, size: observe(kind, seconds, size)

        self.scoring = Scoring(detector, batch_size)
        self._scorer = Batcher(self.scoring.score, 4 * batch_size, "guard-detector", timed("score"))
        self._rewriter: Batcher[tuple[str, str, int], str] | None = None
        if detoxifier is not None:
            rewrite = detoxifier.rewrite_at
            self._rewriter = Batcher(
                lambda asked: rewrite(asked, max_new_tokens),
                batch_size, "guard-detoxifier", timed("rewrite"),
            )  # fmt: skip

    def check(self, questions: Sequence[str], answers: Sequence[str]) -> list[Guarded]:
        """Guard whole answers, in order.

        Raises:
            ValueError: not one question for each answer.
        """
        if len(questions) != len(answers):
            raise ValueError(f"{len(questions)} questions for {len(answers)} answers, expected one each")
        # Like lengths together, so that little is padding; a slice at a time, so that the timeout is a slice's.
        order = sorted(range(len(answers)), key=lambda i: len(questions[i]) + len(answers[i]))
        results: dict[int, Guarded] = {}
        for at in range(0, len(order), self.batch_size):
            part = order[at : at + self.batch_size]
            done = drive(self._steps([questions[i] for i in part], [answers[i] for i in part]))
            results.update(zip(part, done, strict=True))
        return [results[i] for i in range(len(answers))]

    async def check_async(self, question: str, answer: str) -> Guarded:
        """Guard one whole answer; concurrent calls are batched."""
        return (await drive_async(self._steps([question], [answer])))[0]

    def begin(self, question: str) -> GuardedStream:
        """A growing answer, to be fed by hand (blocking or asyncio)."""
        return GuardedStream(self, question)

    def stream(self, question: str, pieces: Iterable[str]) -> Iterator[str]:
        """What may be shown of a growing answer: at most one sentence behind, ending with the refusal if flagged."""
        growing = self.begin(question)
        for piece in pieces:
            yield from growing.feed(piece)
            if growing.stopped:
                return
        yield from growing.finish()

    async def stream_async(self, question: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        """The same for asyncio."""
        growing = self.begin(question)
        async for piece in pieces:
            for text in await growing.feed_async(piece):
                yield text
            if growing.stopped:
                return
        for text in await growing.finish_async():
            yield text

    def answer(
        self,
        mllm: MLLM,
        questions: Sequence[str],
        media: Sequence[Any] | None = None,
        max_new_tokens: int = 64,
        model: torch.nn.Module | None = None,
    ) -> list[Guarded]:
        """Guarded generation: `mllm.generate.answer` and then `check`."""
        from mllm.generate import answer as generate

        return self.check(questions, generate(mllm, questions, media, max_new_tokens, model))

    @property
    def alive(self) -> bool:
        """Whether it still takes work."""
        return all(b.alive for b in (self._scorer, self._rewriter) if b is not None)

    def close(self) -> None:
        """End the threads. What still waits is refused."""
        self._scorer.close()
        if self._rewriter is not None:
            self._rewriter.close()

    def score_step(self, checks: Sequence[Check]) -> Steps[list[Outcome[float]]]:
        """Scores that can be relied on: anything else is a `Failure` with its reason."""
        outcomes = yield self._scorer.submit(checks), self.timeout
        return [_checked(outcome) for outcome in outcomes]

    def harmless(self, score: float) -> bool:
        """The detector's verdict."""
        import torch

        return not bool(self.detector.harmful(torch.tensor([score]))[0])

    def _steps(self, questions: Sequence[str], answers: Sequence[str]) -> Steps[list[Guarded]]:
        results: dict[int, Guarded] = {i: _passed(a, None, "empty") for i, a in enumerate(answers) if not a}
        asked = [i for i in range(len(answers)) if i not in results]
        scores = yield from self.score_step([Check(questions[i], answers[i]) for i in asked])
        flagged: dict[int, float] = {}
        for i, score in zip(asked, scores, strict=True):
            if isinstance(score, Failure):
                results[i] = self._refused(answers[i], None, None, score.reason("detector"))
            elif self.harmless(score):
                results[i] = _passed(answers[i], score, "harmless")
            else:
                flagged[i] = score
        if flagged:
            results |= yield from self._rewrite_steps(questions, answers, flagged)
        return [results[i] for i in range(len(answers))]

    def _rewrite_steps(
        self, questions: Sequence[str], answers: Sequence[str], flagged: dict[int, float]
    ) -> Steps[dict[int, Guarded]]:
        results: dict[int, Guarded] = {}
        for attempt in range(self.attempts):
            results |= yield from self._rewrite_once(questions, answers, flagged, attempt)
            flagged = {i: s for i, s in flagged.items() if results[i].reason in ("rewrite_harmful", "rewrite_empty")}
            if not flagged:
                break
        return results

    def _rewrite_once(
        self, questions: Sequence[str], answers: Sequence[str], flagged: dict[int, float], attempt: int
    ) -> Steps[dict[int, Guarded]]:
        if self._rewriter is None:
            return {i: self._refused(answers[i], score, None, "harmful") for i, score in flagged.items()}
        results: dict[int, Guarded] = {}
        rewrites: dict[int, str] = {}
        asked = [(questions[i], answers[i], attempt) for i in flagged]
        outcomes = yield self._rewriter.submit(asked), self.rewrite_timeout
        for (i, score), rewrite in zip(flagged.items(), outcomes, strict=True):
            if isinstance(rewrite, Failure):
                results[i] = self._refused(answers[i], score, None, rewrite.reason("detoxifier"))
            elif not rewrite.strip():
                results[i] = self._refused(answers[i], score, None, "rewrite_empty")
            else:
                rewrites[i] = rewrite
        again = yield from self.score_step([Check(questions[i], text) for i, text in rewrites.items()])
        for (i, text), after in zip(rewrites.items(), again, strict=True):
            if isinstance(after, Failure):
                results[i] = self._refused(answers[i], flagged[i], None, after.reason("detector"))
            elif self.harmless(after):
                results[i] = Guarded(answers[i], text, flagged[i], after, "detoxified", "rewritten")
            else:
                results[i] = self._refused(answers[i], flagged[i], after, "rewrite_harmful")
        return results

    def _refused(self, original: str, score: float | None, after: float | None, reason: Reason) -> Guarded:
        return Guarded(original, self.refusal, score, after, "refused", reason)


def _passed(text: str, score: float | None, reason: Reason) -> Guarded:
    return Guarded(text, text, score, None, "passed", reason)


def _checked(outcome: Outcome[float]) -> Outcome[float]:
    if isinstance(outcome, Failure) or 0 <= outcome <= 1:  # false for nan
        return outcome
    return Failure("invalid")


if __name__ == "__main__":
    from mllm.guard_cli import main

    sys.exit(main())
