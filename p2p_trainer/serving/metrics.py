"""Numbers for Prometheus. Labels are routes and statuses, never what a client wrote."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


if TYPE_CHECKING:
    from .engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """
    Counts what one server does, in a registry of its own.

    Args:
        engine ([`Engine`]):
            The engine, whose numbers are read when they are asked for.
    """

    def __init__(self, engine: "Engine") -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "p2p_requests", "Requests, by route and HTTP status.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "p2p_request_seconds",
            "Time from a request's head to the end of its response.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answers = Counter("p2p_answers", "Rows answered.", registry=self.registry)
        self.unprefixed = Counter("p2p_answers_unprefixed", "Answers without the prefix.", registry=self.registry)
        self.withheld = Counter("p2p_answers_withheld", "Answers withheld.", registry=self.registry)
        self.registry.register(_EngineNumbers(engine))

    def request(self, route: str, status: int, seconds: float) -> None:
        """
        Count a request.

        Args:
            route (`str`):
                One of the server's routes, or `"other"`.
            status (`int`):
                HTTP status; 499 if the client left before there was one.
            seconds (`float`):
                How long it took.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answer(self, prefixed: bool | None, withheld: bool) -> None:
        """
        Count an answer.

        Args:
            prefixed (`bool` or `None`):
                Whether it began with the prefix; `None` where none is expected.
            withheld (`bool`):
                Whether the client does not get it.
        """
        self.answers.inc()
        if prefixed is False:
            self.unprefixed.inc()
        if withheld:
            self.withheld.inc()

    def text(self) -> bytes:
        """
        Return all numbers.

        Returns:
            `bytes`: Prometheus' text format.
        """
        return generate_latest(self.registry)


class _EngineNumbers:
    """What the engine counts itself."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily("p2p_rows_waiting", "Rows in the queue.", stats.waiting)
        yield GaugeMetricFamily("p2p_rows_running", "Rows of the running batch.", stats.running)
        yield CounterMetricFamily("p2p_batches", "Batches begun.", value=stats.batches)
        yield CounterMetricFamily("p2p_batch_rows", "Rows in these batches.", value=stats.rows)
        yield CounterMetricFamily("p2p_batch_failures", "Batches that failed.", value=stats.failures)
        yield CounterMetricFamily(
            "p2p_answers_redacted", "Written answers out of which the key was taken.", value=stats.redacted
        )
