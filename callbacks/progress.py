"""One way to show how far a long part is: a bar with rate and time left on a terminal, occasional lines elsewhere.

    with Progress("synthesize", total=72, unit="embeddings", done=already_stored) as progress:
        progress.advance(3, osr=0.97)

All bars share one display, so they may be nested. Without a terminal (a log file, SLURM, CI) a line is logged at the
start, soon after it, every `every` seconds from then on, and at the end. A part that finds all done says nothing.
Other ranks than the first show nothing (`console.quiet`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

T = TypeVar("T")
log = logging.getLogger(__name__)

console = Console(stderr=True, highlight=False)
"""The terminal, shared with log messages so that they do not tear a running bar."""

_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]}"),
    TimeElapsedColumn(),
    TextColumn("{task.fields[facts]}", style="dim"),
)
FIRST = 2.0
"""Seconds until the first line in between: whoever has just started a run wants to see that it moves."""

_bars = Bars(*_COLUMNS, console=console, transient=True)


class Progress:
    """Progress of one part, from `__enter__` to `__exit__`.

    Args:
        title: what is being done, one or two words.
        total: number of units; None if unknown.
        unit: plural noun of what is counted.
        done: units finished before (by an earlier process); they do not count for the rate.
        every: seconds between lines where there is no terminal.
        estimate: says how many seconds are left, None while nobody can know; in place of the rate, for units that run
            side by side: dozens of them are half done before the first is finished.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "items",
        done: int = 0,
        every: float = 10.0,
        estimate: Callable[[], float | None] | None = None,
    ) -> None:
        self.title, self.total, self.unit, self.done, self.every = title, total, unit, done, every
        self.estimate = estimate
        self._idle = total is not None and done >= total
        self._wait = min(FIRST, every)
        self._first = done
        self._facts = ""
        self._task: TaskID | None = None
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        self._began = self._told = time.monotonic()
        if self._idle:
            return self
        if console.is_terminal and not console.quiet:
            if not _bars.tasks:
                _bars.start()
            self._task = _bars.add_task(self.title, total=self.total, completed=self.done, rate="", facts="")
        else:
            log.info("%s: begins at %s", self.title, self._count())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            _bars.remove_task(self._task)
            self._task = None
            if not _bars.tasks:
                _bars.stop()
        if self._idle and kind is None:
            return
        verb = "stopped at " if kind else ""
        elapsed = clock(time.monotonic() - self._began)
        log.info("%s: %s%s in %s%s", self.title, verb, self._count(), elapsed, self._tail(ended=True))

    def advance(self, n: int = 1, **facts: float | str) -> None:
        """`n` more units are finished; `facts` (for instance `loss=0.1`) stand beside the bar."""
        self.set(self.done + n, **facts)

    def set(self, done: int, **facts: float | str) -> None:
        """`done` units are finished by now."""
        self.done = done
        if facts:
            shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items())
            self._facts = " ".join(shown)
        if self._task is not None:
            _bars.update(self._task, completed=done, rate=self._pace(), facts=self._facts)
            return
        now = time.monotonic()
        if not self._idle and now - self._told >= self._wait:
            self._told, self._wait = now, self.every
            log.info("%s: %s%s", self.title, self._count(), self._tail())

    def _count(self) -> str:
        return f"{self.done}{f'/{self.total}' if self.total is not None else ''} {self.unit}"

    def _pace(self, ended: bool = False) -> str:
        """`3.2/s, 0:41 left`; slow parts read `12 s each`. Nothing in the first second: it would be noise."""
        seconds, finished = time.monotonic() - self._began, self.done - self._first
        if seconds < 1:
            return ""
        if self.estimate is not None and not ended:
            left = self.estimate()
            return "" if left is None else f"{clock(left)} left"
        if finished <= 0:
            return ""
        speed = finished / seconds
        told = (
            f"{speed:.3g}/s" if 0.1 <= speed < 1000 else f"{speed:,.0f}/s" if speed > 1 else f"{1 / speed:.3g} s each"
        )
        if ended or not self.total or self.total <= self.done:
            return told
        return f"{told}, {clock((self.total - self.done) / speed)} left"

    def _tail(self, ended: bool = False) -> str:
        return "".join(f", {part}" for part in (self._pace(ended), self._facts) if part)


def track(items: Iterable[T], title: str, total: int | None = None, unit: str = "items") -> Iterator[T]:
    """Pass `items` through and show how many went by; `total` defaults to their length if they have one."""
    if total is None and isinstance(items, (list, tuple)):
        total = len(items)
    with Progress(title, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
