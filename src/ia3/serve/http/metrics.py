"""What the server counts, for Prometheus and for the page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.interface import Engine
from .registry import Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Of the rates on the page.
WINDOW = 10.0

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Rate:
    """How much comes in a second, of the last ten."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        self._seen.append((time.monotonic(), count))
        self._sum += count
        self._forget()

    def a_second(self) -> float:
        self._forget()
        return round(self._sum / WINDOW, 2)

    def _forget(self) -> None:
        while self._seen and self._seen[0][0] < time.monotonic() - WINDOW:
            self._sum -= self._seen.popleft()[1]


class Metrics:
    """The server's counters; those of the engine and of the banks are read when they are asked for.

    Labels are routes, methods and statuses: no name of a client's makes a new one.
    """

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._all = CollectorRegistry()
        self._requests = Counter(
            "ia3_requests", "Answers.", ["route", "method", "status"], registry=self._all
        )
        self._seconds = Histogram(
            "ia3_request_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._all,
        )
        self._tokens = Counter(
            "ia3_tokens", "Tokens, of prompts and generated.", ["kind"], registry=self._all
        )
        self._texts = Counter("ia3_texts", "Texts that were classified.", registry=self._all)
        self._all.register(_OfTheEngine(engine, registry))
        self.tokens_rate, self.texts_rate = Rate(), Rate()

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def prompt(self, tokens: int) -> None:
        self._tokens.labels("prompt").inc(tokens)

    def generated(self, tokens: int) -> None:
        self._tokens.labels("generated").inc(tokens)
        self.tokens_rate.add(tokens)

    def classified(self, texts: int) -> None:
        self._texts.inc(texts)
        self.texts_rate.add(texts)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._all)


class _OfTheEngine(Collector):
    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        load, registry = self._engine.load(), self._registry
        yield _gauge("ia3_running", "Texts that are being computed.", load.running)
        yield _gauge("ia3_waiting", "Texts that wait.", load.waiting)
        # A batch's mean size is one divided by the other.
        yield CounterMetricFamily("ia3_batches", "Batches computed.", value=load.batches)
        yield CounterMetricFamily("ia3_batched", "Texts in all batches.", value=load.batched)
        yield _gauge("ia3_adapters", "Adapters that are served.", len(registry))
        yield _gauge("ia3_resident", "Adapters on the device.", len(registry.resident()))
        for name in ("hits", "misses", "evictions"):
            count = sum(getattr(base.bank, name) for base in registry.bases)
            yield CounterMetricFamily(f"ia3_bank_{name}", f"The banks' {name}.", value=count)

    def describe(self) -> Iterable[Metric]:
        return ()


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)
