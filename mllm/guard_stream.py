"""Streaming: an answer is shown only up to where the detector has called all of it harmless.

At each cut (guard_segments.py: sentence ends, and every 32 tokens) the answer from its start up to the cut is scored;
what lies before the cut is released if the verdict is harmless. Released text is therefore never harmful by the
detector's own score, and what is shown lags at most one sentence behind. With the first flag, or the first failure of
the detector, the stream stops and ends with the refusal; the detoxifier is not asked, part of an answer is out already.

The detector reads on from where it stopped (guard_scoring.py); nothing is re-read from the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mllm.guard_checks import Check, Reader
from mllm.guard_segments import Segmenter
from mllm.guard_waiting import Failure, Reason, Steps, drive, drive_async

if TYPE_CHECKING:
    from mllm.guard import Guard


class GuardedStream:
    """One growing answer. Feed it pieces, show what comes back, end with `finish`.

    After a flag `stopped` is true, the last text that came back was the refusal, and nothing more comes. `scores` are
    those of the cuts, in order.
    """

    def __init__(self, guard: Guard, question: str) -> None:
        self._guard, self._question = guard, question
        self._reader = Reader()
        self._segments = Segmenter(guard.scoring.count, guard.every_tokens)
        self._text, self._released = "", 0
        self.scores: list[float] = []
        self.stopped = False
        self.reason: Reason = "empty"

    @property
    def action(self) -> Literal["passed", "refused"]:
        return "refused" if self.stopped else "passed"

    @property
    def released(self) -> str:
        """What of the answer has been shown, without the refusal."""
        return self._text[: self._released]

    def feed(self, piece: str) -> list[str]:
        """More of the answer; what may be shown now. Blocks while the detector reads."""
        return drive(self._feed(piece))

    def finish(self) -> list[str]:
        """The answer is complete; what is left to show."""
        return drive(self._release(self._segments.finish()))

    async def feed_async(self, piece: str) -> list[str]:
        return await drive_async(self._feed(piece))

    async def finish_async(self) -> list[str]:
        return await drive_async(self._release(self._segments.finish()))

    def _feed(self, piece: str) -> Steps[list[str]]:
        if self.stopped:
            return []
        self._text += piece
        return (yield from self._release(self._segments.feed(piece)))

    def _release(self, cuts: list[int]) -> Steps[list[str]]:
        shown: list[str] = []
        for cut in cuts:
            if self.stopped:
                break
            (score,) = yield from self._guard.score_step([Check(self._question, self._text[:cut], self._reader)])
            if isinstance(score, Failure):
                self.reason = score.reason("detector")
            else:
                self.scores.append(score)
                self.reason = "harmless" if self._guard.harmless(score) else "harmful"
            if self.reason == "harmless":
                shown.append(self._text[self._released : cut])
                self._released = cut
            else:
                self.stopped = True
                shown.append(("\n\n" if self.released.strip() else "") + self._guard.refusal)
        return shown
