"""Limits of the server, and the queue that keeps them: so many at once, so many behind them, then 429."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from mllm.guard_metrics import Metrics
from mllm.guard_protocol import RequestError


@dataclass(frozen=True)
class Settings:
    """Limits of the server.

    Attributes:
        api_key: what clients must send as bearer token; None: no key.
        max_body: bytes of a request.
        max_active, max_waiting: requests answered at once, and in the queue behind them; more get a 429.
        timeout: seconds for a request, from its start to the end of its answer.
        grace: seconds that running answers get when the server is told to stop.
    """

    api_key: str | None = field(default=None, repr=False)
    max_body: int = 20 << 20
    max_active: int = 64
    max_waiting: int = 256
    timeout: float = 120.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        if min(self.max_body, self.max_active, self.timeout, self.grace) <= 0 or self.max_waiting < 0:
            raise ValueError(f"limits must be above 0 (max_waiting: 0 or more), got {self}")


class Queue:
    """At most `max_active` requests at once and `max_waiting` behind them."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._free = asyncio.Semaphore(settings.max_active)
        self._limit, self.inside = settings.max_active + settings.max_waiting, 0
        self.metrics = metrics

    async def enter(self, deadline: float) -> Place:
        """Raises RequestError: 429 when the queue is full, 503 when the deadline passes in it."""
        if self.inside >= self._limit:
            raise RequestError(429, "the guard is busy; try again later", retry_after=1)
        self.inside += 1
        self.metrics.waiting.inc()
        try:
            await asyncio.wait_for(self._free.acquire(), max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            self.inside -= 1
            if isinstance(error, asyncio.TimeoutError):
                raise RequestError(503, "the guard is busy; try again later", retry_after=1) from None
            raise
        finally:
            self.metrics.waiting.dec()
        return Place(self)

    def leave(self) -> None:
        self.inside -= 1
        self._free.release()


class Place:
    """One request's place among the active ones; given back once, however the request ends."""

    def __init__(self, queue: Queue) -> None:
        self._queue: Queue | None = queue
        self._start = time.perf_counter()
        queue.metrics.active.inc()

    def leave(self) -> None:
        if self._queue is not None:
            self._queue.metrics.active.dec()
            self._queue.metrics.seconds.observe(time.perf_counter() - self._start)
            self._queue.leave()
            self._queue = None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()
