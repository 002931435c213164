"""What lakebus tells an operator about itself: metrics, logs and traces, each behind one facade.

Metrics: `METRICS` is the one table of them; the docs and every backend are made from it, and a
name or label that is not in it is refused, so that no dashboard waits for a metric nobody sends.
The backend is chosen where a process is wired (`actors.ray_metrics` under Ray, `MemoryMetrics` in
tests, `NO_METRICS` for none). Labels have few values each; tables and principals are never labels.

Logs: one JSON object a line; the ids of the request, batch and snapshot being worked on come from
context variables, so a log call anywhere below carries them.

Traces: OpenTelemetry, imported only when tracing is on. A bus entry carries no trace context; the
spans on both sides of the bus carry the same `lakebus.batch_id` or (shard, lo, hi) attributes, and
publish spans the snapshot id, which is how a trace is followed from the request to its snapshot.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from lakebus.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OpenTelemetrySpan

# --- metrics -------------------------------------------------------------------------------


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table of metrics. `bounds` are the upper bounds of a histogram's buckets."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_JOB_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_C, _G, _H = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM

METRICS: tuple[Metric, ...] = (
    Metric("lakebus_http_requests_total", _C, "HTTP requests answered", ("route", "status")),
    Metric("lakebus_http_seconds", _H, "One request, arrival to last byte", ("route",), _SECONDS),
    Metric("lakebus_accepted_rows_total", _C, "Rows accepted at the door, replays not counted"),
    Metric("lakebus_ranges_claimed_total", _C, "Ranges claimed from the bus", ("attempt",)),
    Metric(
        "lakebus_ranges_ended_total",
        _C,
        "Claimed ranges by how the work on them ended: published, released, failed, lease_lost, "
        "intent_lost, quarantine_stopped",
        ("outcome",),
    ),
    Metric("lakebus_published_entries_total", _C, "Entries that became terminal by publishing"),
    Metric("lakebus_published_rows_total", _C, "Rows in published data files"),
    Metric("lakebus_quarantined_entries_total", _C, "Entries quarantined", ("cause",)),
    Metric(
        "lakebus_quarantine_stopped_total",
        _C,
        "Quarantines refused because their rate rises (an alarm: somebody has to look)",
    ),
    Metric("lakebus_staged_files_total", _C, "Data files written before publishing"),
    Metric("lakebus_staged_bytes_total", _C, "Bytes of data files written before publishing"),
    Metric("lakebus_stage_seconds", _H, "From a claim to its staged files", (), _SECONDS),
    Metric("lakebus_publish_seconds", _H, "One publish transaction", (), _SECONDS),
    Metric("lakebus_publish_commits", _H, "Commits joined in one publish", (), _COUNTS),
    Metric(
        "lakebus_publish_unknown_total",
        _C,
        "Publishes whose reply was lost, by what reading back told",
        ("resolved",),
    ),
    Metric("lakebus_brake_linger_seconds", _G, "Pause between claims for too many small files"),
    Metric("lakebus_leases_held_count", _G, "Leases this process is working under"),
    Metric("lakebus_leases_lost_total", _C, "Leases found to be reclaimed by somebody else"),
    Metric("lakebus_backlog_entries", _G, "Entries accepted and not terminal", ("shard",)),
    Metric("lakebus_backlog_bytes", _G, "Bytes accepted and not terminal", ("shard",)),
    Metric("lakebus_backlog_age_seconds", _G, "Age of the oldest waiting entry", ("shard",)),
    Metric("lakebus_bus_end_position", _G, "Exclusive end of the shard", ("shard",)),
    Metric("lakebus_watermark_position", _G, "Watermark of the shard", ("shard",)),
    Metric("lakebus_purged_segments_total", _C, "Segment tables emptied by the purge"),
    Metric("lakebus_purge_refused_total", _C, "Purges that gave up waiting for a lock"),
    Metric("lakebus_drops_finished_total", _C, "Begun table drops that were finished here"),
    Metric("lakebus_validations_total", _C, "Validations that came to their end"),
    Metric(
        "lakebus_validation_findings_total",
        _C,
        "What validations found: error, warning or info",
        ("severity",),
    ),
    Metric("lakebus_hints_sent_total", _C, "Wake-up hints sent to coordinators"),
    Metric("lakebus_hints_received_total", _C, "Wake-up hints received"),
    Metric("lakebus_role_failures_total", _C, "Failed turns of a role's loop", ("role",)),
    Metric("lakebus_role_replaced_total", _C, "Roles started or replaced", ("role", "reason")),
    Metric("lakebus_role_tick_age_seconds", _G, "Time since a role last turned", ("role",)),
    Metric("lakebus_jobs_running_count", _G, "Maintenance jobs that run now"),
    Metric(
        "lakebus_jobs_ended_total",
        _C,
        "Runs of maintenance jobs by how they ended: done, failed, given_back, lease_lost, "
        "not_recorded",
        ("kind", "outcome"),
    ),
    Metric("lakebus_job_seconds", _H, "One run of a maintenance job", ("kind",), _JOB_SECONDS),
    Metric("lakebus_file_cache_hits_total", _C, "Files of queries that had a copy on disk already"),
    Metric("lakebus_file_cache_fetches_total", _C, "Files that were fetched from the store"),
    Metric("lakebus_file_cache_fetched_bytes_total", _C, "Bytes that were fetched from the store"),
    Metric("lakebus_file_cache_evictions_total", _C, "Copies that made room for others"),
    Metric("lakebus_file_cache_bytes", _G, "Size of the copies on disk"),
)
_BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def metric_named(name: str, kind: MetricKind, labels: Mapping[str, str]) -> Metric:
    """The metric of this name. Raises ValueError when the table does not know this use of it."""

    metric = _BY_NAME.get(name)
    if (
        metric is None
        or metric.kind is not kind
        or tuple(sorted(labels)) != tuple(sorted(metric.labels))
    ):
        raise ValueError(f"{kind} {name} with labels {sorted(labels)} is not in METRICS")
    return metric


class Metrics(Protocol):
    """The facade. Calls are cheap, never block and never fail for reasons outside the process."""

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None: ...

    def gauge(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class NoMetrics:
    """Keeps nothing."""

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        return

    def gauge(self, name: str, value: float, **labels: str) -> None:
        return

    def observe(self, name: str, value: float, **labels: str) -> None:
        return


NO_METRICS: Metrics = NoMetrics()

_Key = tuple[str, tuple[tuple[str, str], ...]]


class MemoryMetrics:
    """Keeps everything in dictionaries, for tests."""

    def __init__(self) -> None:
        self._values: dict[_Key, float] = {}
        self._observed: dict[_Key, list[float]] = {}

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        metric_named(name, MetricKind.COUNTER, labels)
        if amount < 0:
            raise ValueError(f"the counter {name} cannot be lowered")
        key = _key(name, labels)
        self._values[key] = self._values.get(key, 0.0) + amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        metric_named(name, MetricKind.GAUGE, labels)
        self._values[_key(name, labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        metric_named(name, MetricKind.HISTOGRAM, labels)
        self._observed.setdefault(_key(name, labels), []).append(value)

    def value(self, name: str, **labels: str) -> float:
        """The counter's or gauge's value; 0.0 when it was never touched."""

        return self._values.get(_key(name, labels), 0.0)

    def observations(self, name: str, **labels: str) -> list[float]:
        return list(self._observed.get(_key(name, labels), []))


def _key(name: str, labels: Mapping[str, str]) -> _Key:
    return name, tuple(sorted(labels.items()))


# --- logs ----------------------------------------------------------------------------------

_IDS: ContextVar[Mapping[str, str]] = ContextVar("lakebus_log_ids", default={})  # noqa: B039
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class log_ids:  # noqa: N801 - called like a function; as a generator it took twice the time
    """Adds ids (`request_id`, `batch_id`, `snapshot_id`) to every log line written inside."""

    __slots__ = ("_given", "_mark")

    def __init__(self, **ids: str | int | None) -> None:
        self._given = {name: str(value) for name, value in ids.items() if value is not None}

    def __enter__(self) -> None:
        self._mark = _IDS.set({**_IDS.get(), **self._given})

    def __exit__(self, *_: object) -> None:
        _IDS.reset(self._mark)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what was passed as `extra` becomes members beside the ids."""

    def __init__(self, *, service: str = "lakebus") -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(
                timespec="microseconds"
            ),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_IDS.get(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in _STANDARD_ATTRIBUTES}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure_logging(
    *, service: str, level: str = "INFO", stream: TextIO | None = None
) -> logging.Handler:
    """Sends the logs of this process as JSON lines to `stream` (stderr). Calling it again replaces
    its handler and no other. Raises ConfigurationError for a level that does not exist."""

    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigurationError(f"{level!r} is no log level; use debug, info, warning or error")
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, JsonFormatter):
            root.removeHandler(old)
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(service=service))
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler


# --- traces --------------------------------------------------------------------------------


class Span(Protocol):
    def set(self, name: str, value: str | int | float | bool) -> None:
        """Adds an attribute that became known during the span."""
        ...

    @property
    def traceparent(self) -> str | None:
        """The W3C trace context to hand on, or None when tracing is off."""
        ...


class Tracing(Protocol):
    def span(
        self,
        name: str,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, str | int | float | bool] | None = None,
    ) -> AbstractContextManager[Span]:
        """A span around a piece of work, below the current one or below `traceparent`."""
        ...

    def close(self) -> None:
        """Sends what is still held back."""
        ...


class _NoSpan:
    """Its own context manager, and always the same one: tracing that is off allocates nothing."""

    traceparent: str | None = None

    def set(self, name: str, value: str | int | float | bool) -> None:
        return

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *_: object) -> None:
        return


_NO_SPAN = _NoSpan()


class NoTracing:
    def span(
        self,
        name: str,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, str | int | float | bool] | None = None,
    ) -> AbstractContextManager[Span]:
        return _NO_SPAN

    def close(self) -> None:
        return


NO_TRACING: Tracing = NoTracing()


@dataclass(frozen=True, slots=True)
class _LiveSpan:
    _span: OpenTelemetrySpan = field(repr=False)

    def set(self, name: str, value: str | int | float | bool) -> None:
        self._span.set_attribute(name, value)

    @property
    def traceparent(self) -> str | None:
        context = self._span.get_span_context()
        flags = int(context.trace_flags)
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"


class OpenTelemetryTracing:
    """Spans through an OpenTelemetry provider of our own; the global one is left alone."""

    def __init__(self, provider: TracerProvider) -> None:
        # Here and not above, so that a process without tracing never loads OpenTelemetry.
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("lakebus")
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, str | int | float | bool] | None = None,
    ) -> Iterator[Span]:
        parent = (
            None if traceparent is None else self._propagator.extract({"traceparent": traceparent})
        )
        with self._tracer.start_as_current_span(
            name, context=parent, attributes=attributes
        ) as span:
            yield _LiveSpan(span)

    def close(self) -> None:
        self._provider.shutdown()


def open_tracing(*, exporter: str | None, service: str, ratio: float = 1.0) -> Tracing:
    """Tracing to `exporter`: None (off), `console`, `otlp` (configured by the OTEL_… variables), or
    `module:function` giving a SpanExporter. `ratio` of the traces that begin here are kept.

    Raises ConfigurationError when the exporter cannot be loaded.
    """

    if exporter is None:
        return NO_TRACING
    # Here and not above, so that a process without tracing never loads OpenTelemetry.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    path = _EXPORTERS.get(exporter, exporter)
    module, _, attribute = path.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"the trace exporter {exporter!r} cannot be loaded ({error}); use console, otlp (needs "
            "the package opentelemetry-exporter-otlp-proto-http) or module:function"
        ) from error
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}),
        sampler=ParentBasedTraceIdRatio(ratio),
    )
    provider.add_span_processor(BatchSpanProcessor(made))
    return OpenTelemetryTracing(provider)


_EXPORTERS = {
    "console": "opentelemetry.sdk.trace.export:ConsoleSpanExporter",
    "otlp": "opentelemetry.exporter.otlp.proto.http.trace_exporter:OTLPSpanExporter",
}
