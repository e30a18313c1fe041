"""Micro-batching: many callers, one model, one thread.

While a batch runs, further work queues up and becomes the next batch; nobody waits for a batch to fill. A batch that
fails is tried once more item by item, so that one text which breaks a tokenizer is not the failure of its neighbours.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


class Batcher(Generic[Work, Result]):
    """Runs `run(items)` in a thread of its own, on at most `size` items at once.

    Args:
        run: one result for each item, in order. It may raise: the item's future then holds the exception.
        size: largest batch.
        observe: called with the seconds and the size of each batch.
    """

    def __init__(
        self,
        run: Callable[[list[Work]], Sequence[Result]],
        size: int,
        name: str,
        observe: Callable[[float, int], None] = lambda seconds, size: None,
    ) -> None:
        if size < 1:
            raise ValueError(f"batch size {size}: expected 1 or more")
        self._run, self._size, self._observe = run, size, observe
        self._waiting: deque[tuple[Work, Future[Result]]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        # A daemon: a detector that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, items: Sequence[Work]) -> list[Future[Result]]:
        """A future for each item; items given together start together. A cancelled future's item is not run.

        Raises:
            RuntimeError: closed.
        """
        made: list[tuple[Work, Future[Result]]] = [(item, Future()) for item in items]
        with self._wake:
            if self._closed:
                raise RuntimeError(f"{self._thread.name}: closed, takes no more work")
            self._waiting.extend(made)
            self._wake.notify()
        return [future for _, future in made]

    @property
    def alive(self) -> bool:
        """Whether it takes work."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Take no more work; what waits is cancelled, what runs is not waited for."""
        with self._wake:
            self._closed = True
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                taken = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            batch = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]
            if batch:
                self._serve(batch)

    def _serve(self, batch: list[tuple[Work, Future[Result]]]) -> None:
        start = time.perf_counter()
        try:
            results = self._run([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{self._thread.name}: {len(results)} results for {len(batch)} items")
        except Exception as error:  # whatever a model raises: it becomes the future's, whose owner fails closed
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for one in batch:
                    self._serve([one])
            return
        self._observe(time.perf_counter() - start, len(batch))
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
