"""Metrics through Ray: what a process counts is exported by its node's agent.

`ray.util.metrics` costs tens of microseconds a call, so counts and gauges are kept here and handed
on once a second; what is not handed on when a process dies is lost, as counters are anyway. Ray
adds the prefix `ray_`, and `_total` to counters, so the latter is cut off here.
"""

from __future__ import annotations

import asyncio
import threading

from ray.util import metrics as ray_metrics

from lakebus.telemetry import METRICS, Metric, MetricKind, metric_named

_FLUSH_S = 1.0
#: More observations than this between two flushes are sampled, so that a stalled flush is no leak.
_OBSERVATIONS_MAX = 10_000

_Key = tuple[str, tuple[tuple[str, str], ...]]


class RayMetrics:
    """A `lakebus.telemetry.Metrics`; may be used from any thread. `flush` hands on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[_Key, float] = {}
        self._gauges: dict[_Key, float] = {}
        self._observed: list[tuple[_Key, float]] = []
        self._counters = {m.name: _counter(m) for m in METRICS if m.kind is MetricKind.COUNTER}
        self._gauge_of = {m.name: _gauge(m) for m in METRICS if m.kind is MetricKind.GAUGE}
        self._histograms = {
            m.name: _histogram(m) for m in METRICS if m.kind is MetricKind.HISTOGRAM
        }

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        key = _key(name, MetricKind.COUNTER, labels)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0.0) + amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        key = _key(name, MetricKind.GAUGE, labels)
        with self._lock:
            self._gauges[key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = _key(name, MetricKind.HISTOGRAM, labels)
        with self._lock:
            if len(self._observed) < _OBSERVATIONS_MAX:
                self._observed.append((key, value))

    def flush(self) -> None:
        """Hands what gathered to Ray."""

        with self._lock:
            counts, self._counts = self._counts, {}
            gauges, self._gauges = self._gauges, {}
            observed, self._observed = self._observed, []
        for (name, labels), amount in counts.items():
            if amount > 0:  # Ray refuses a zero
                self._counters[name].inc(amount, tags=dict(labels))
        for (name, labels), value in gauges.items():
            self._gauge_of[name].set(value, tags=dict(labels))
        for (name, labels), value in observed:
            self._histograms[name].observe(value, tags=dict(labels))

    async def keep_flushing(self) -> None:
        """Flushes every second until cancelled, and once more then."""

        try:
            while True:
                await asyncio.sleep(_FLUSH_S)
                self.flush()
        finally:
            self.flush()


def _key(name: str, kind: MetricKind, labels: dict[str, str]) -> _Key:
    metric_named(name, kind, labels)
    return name, tuple(sorted(labels.items()))


def _counter(metric: Metric) -> ray_metrics.Counter:
    name = metric.name.removesuffix("_total")
    return ray_metrics.Counter(name, description=metric.help, tag_keys=metric.labels)


def _gauge(metric: Metric) -> ray_metrics.Gauge:
    return ray_metrics.Gauge(metric.name, description=metric.help, tag_keys=metric.labels)


def _histogram(metric: Metric) -> ray_metrics.Histogram:
    return ray_metrics.Histogram(
        metric.name,
        description=metric.help,
        boundaries=list(metric.bounds),
        tag_keys=metric.labels,
    )
