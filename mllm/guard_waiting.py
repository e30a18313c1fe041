"""One way of an answer, two kinds of callers: generators that yield what they wait for, driven blocking or by asyncio.

A step yields (futures, seconds) and is sent one outcome for each future: its result, or a `Failure`. Nothing is raised
into the step, so that no failure of a model can be overlooked: a `Failure` is not a score.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast

log = logging.getLogger(__name__)

T = TypeVar("T")
Reason = Literal[
    "harmless", "empty", "rewritten", "harmful", "rewrite_harmful", "rewrite_empty", "detector_error",
    "detector_timeout", "detector_invalid", "detoxifier_error", "detoxifier_timeout",
]  # fmt: skip
"""Why the guard did what it did. `detector_invalid`: a score that is no number in 0..1."""


@dataclass(frozen=True)
class Failure:
    """A model call without a usable result."""

    what: Literal["error", "timeout", "invalid"]

    def reason(self, who: Literal["detector", "detoxifier"]) -> Reason:
        return cast(Reason, f"{who}_{self.what}")


Outcome: TypeAlias = "T | Failure"
Steps = Generator[tuple[Sequence[Future[Any]], float], list[Any], T]


def drive(steps: Steps[T]) -> T:
    """Run to the end, blocking."""
    outcomes: list[Any] | None = None
    while True:
        try:
            futures, seconds = next(steps) if outcomes is None else steps.send(outcomes)
        except StopIteration as end:
            return cast(T, end.value)
        concurrent.futures.wait(futures, timeout=seconds)
        outcomes = [_outcome(f) for f in futures]


async def drive_async(steps: Steps[T]) -> T:
    """Run to the end, on the event loop."""
    outcomes: list[Any] | None = None
    while True:
        try:
            futures, seconds = next(steps) if outcomes is None else steps.send(outcomes)
        except StopIteration as end:
            return cast(T, end.value)
        try:
            if futures:
                await asyncio.wait([asyncio.wrap_future(f) for f in futures], timeout=seconds)
        finally:
            outcomes = [_outcome(f) for f in futures]  # also when the client has gone: frees the place in the queue


def _outcome(future: Future[Any]) -> Any:
    """The result of a future that was waited for; one that is not done is cancelled."""
    if not future.done():
        future.cancel()
        return Failure("timeout")
    if future.cancelled():
        return Failure("error")
    error = future.exception()
    if error is not None:
        # Not its text: a tokenizer's or a template's message may quote what was asked or answered.
        log.error("guard: %s in a model call", type(error).__name__)
        return Failure("error")
    return future.result()
