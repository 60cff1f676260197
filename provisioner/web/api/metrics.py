"""`/metrics` for Prometheus: operations by phase, hosts by state, request latency."""

import time
from collections.abc import Callable, Iterable
from typing import Final

from flask import Flask, Response, g, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from provisioner.core.contracts import Store
from provisioner.core.model import HostState, Phase

from .auth import Verb, needs

# Hosts are counted by reading them, so at most so many, and not at every scrape.
HOSTS_COUNTED_MAX: Final = 100_000
COUNTED_FOR_S: Final = 10.0
_BUCKETS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def install_metrics(app: Flask, store: Store) -> None:
    """Add `/metrics` to `app`, and measure its requests from here on."""
    registry = CollectorRegistry()
    registry.register(_Counts(store, time.monotonic))
    latency = Histogram(
        "provisioner_request_seconds",
        "Seconds from a request to its answer, by route.",
        ["method", "route", "status"],
        buckets=_BUCKETS,
        registry=registry,
    )

    @app.before_request
    def begin() -> None:
        g.begun_at = time.monotonic()

    @app.after_request
    def measure(response: Response) -> Response:
        begun_at = g.pop("begun_at", None)
        if begun_at is not None:
            route = request.url_rule.rule if request.url_rule else "(none)"
            labels = latency.labels(request.method, route, response.status_code)
            labels.observe(time.monotonic() - begun_at)
        return response

    @needs(Verb.PUBLIC)
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    app.add_url_rule("/metrics", view_func=metrics)


class _Counts(Collector):
    """Counts rows when it is asked, and remembers for a little while."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._counted_at: float | None = None
        self._counted: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is counted before the first scrape

    def collect(self) -> Iterable[Metric]:
        now = self._clock()
        if self._counted_at is None or now - self._counted_at > COUNTED_FOR_S:
            self._counted, self._counted_at = self._count(), now
        return self._counted

    def _count(self) -> list[Metric]:
        operations = GaugeMetricFamily(
            "provisioner_operations", "Operations by phase.", labels=["phase"]
        )
        hosts = GaugeMetricFamily("provisioner_hosts", "Hosts by state.", labels=["state"])
        with self._store.read() as tx:
            for phase in Phase:
                operations.add_metric([phase], tx.count_operations([phase]))
            states = dict.fromkeys(HostState, 0)
            for host in tx.hosts(limit=HOSTS_COUNTED_MAX):
                states[host.state] += 1
        for state, count in states.items():
            hosts.add_metric([state], count)
        return [operations, hosts]
