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
#: More observations of a kind than this between two flushes are sampled, so that a stalled flush
#: is no leak.
_OBSERVATIONS_MAX = 10_000

_Key = tuple[str, tuple[tuple[str, str], ...]]


class RayMetrics:
    """A `lakebus.telemetry.Metrics`; may be used from any thread. `flush` hands on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counter_keys = _Keys(MetricKind.COUNTER)
        self._gauge_keys = _Keys(MetricKind.GAUGE)
        self._histogram_keys = _Keys(MetricKind.HISTOGRAM)
        self._counts: dict[_Key, float] = {}
        self._gauges: dict[_Key, float] = {}
        self._observed: dict[_Key, list[float]] = {}
        self._counters = {m.name: _counter(m) for m in METRICS if m.kind is MetricKind.COUNTER}
        self._gauge_of = {m.name: _gauge(m) for m in METRICS if m.kind is MetricKind.GAUGE}
        self._histograms = {
            m.name: _histogram(m) for m in METRICS if m.kind is MetricKind.HISTOGRAM
        }

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        key = self._counter_keys.of(name, labels)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0.0) + amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        key = self._gauge_keys.of(name, labels)
        with self._lock:
            self._gauges[key] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = self._histogram_keys.of(name, labels)
        with self._lock:
            values = self._observed.setdefault(key, [])
            if len(values) < _OBSERVATIONS_MAX:
                values.append(value)

    def flush(self) -> None:
        """Hands what gathered to Ray."""

        with self._lock:
            counts, self._counts = self._counts, {}
            gauges, self._gauges = self._gauges, {}
            observed, self._observed = self._observed, {}
        for (name, labels), amount in counts.items():
            if amount > 0:  # Ray refuses a zero
                self._counters[name].inc(amount, tags=dict(labels))
        for (name, labels), value in gauges.items():
            self._gauge_of[name].set(value, tags=dict(labels))
        for (name, labels), values in observed.items():
            observe, tags = self._histograms[name].observe, dict(labels)
            for value in values:
                observe(value, tags)

    async def keep_flushing(self) -> None:
        """Flushes every second until cancelled, and once more then."""

        try:
            while True:
                await asyncio.sleep(_FLUSH_S)
                self.flush()
        finally:
            self.flush()


class _Keys:
    """Names with labels, as they are given and as they are kept. Each is judged once: there are few
    of them, and a request uses several."""

    def __init__(self, kind: MetricKind) -> None:
        self._kind = kind
        self._known: dict[tuple[object, ...], _Key] = {}

    def of(self, name: str, labels: dict[str, str]) -> _Key:
        """Raises ValueError."""

        given: tuple[object, ...] = (name, *labels.items())
        key = self._known.get(given)
        if key is None:
            metric_named(name, self._kind, labels)
            key = self._known[given] = name, tuple(sorted(labels.items()))
        return key


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
