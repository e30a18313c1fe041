"""A guard server on a real port of loopback, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mllm.guard import Guard
from mllm.guard_backends import Backend
from mllm.guard_metrics import Metrics
from mllm.guard_queue import Settings
from mllm.guard_server import make_app, make_server


@dataclass(frozen=True)
class Running:
    """base_url: up to /v1. root: without it."""

    base_url: str
    metrics: Metrics

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")


@contextmanager
def running(guard: Guard, backend: Backend, **settings: Any) -> Iterator[Running]:
    limits = Settings(**{"timeout": 20.0, "grace": 1.0, **settings})
    metrics = Metrics()
    server = make_server(make_app(guard, backend, limits, metrics), limits, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Running(server.addresses()[0], metrics)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
