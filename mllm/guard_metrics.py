"""What the server counts, for Prometheus (`/metrics`). Numbers only: no question, no answer, no key."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self.answers = Counter(
            "seawall_guard_answers", "Answers sent, by action and reason", ["action", "reason"], registry=r
        )
        self.errors = Counter("seawall_guard_errors", "Requests that ended in an error", ["status"], registry=r)
        self.active = Gauge("seawall_guard_active", "Requests being answered", registry=r)
        self.waiting = Gauge("seawall_guard_waiting", "Requests in the queue", registry=r)
        self.seconds = Histogram(
            "seawall_guard_request_seconds", "From a request to the end of its answer", buckets=SECONDS, registry=r
        )
        self._call_seconds = Histogram(
            "seawall_guard_model_seconds",
            "One batch of the detector or detoxifier",
            ["call"],
            buckets=SECONDS,
            registry=r,
        )
        self._call_size = Histogram(
            "seawall_guard_batch_size", "Texts in one batch", ["call"], buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )

    def model_call(self, kind: str, seconds: float, size: int) -> None:
        """Given to the guard as `observe`."""
        self._call_seconds.labels(kind).observe(seconds)
        self._call_size.labels(kind).observe(size)

    def page(self) -> bytes:
        return generate_latest(self._registry)
