"""Metrics, logs and traces: what is in the table, what a line looks like, and what off costs."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lakebus.errors import ConfigurationError
from lakebus.telemetry import (
    METRICS,
    NO_METRICS,
    NO_TRACING,
    JsonFormatter,
    MemoryMetrics,
    MetricKind,
    OpenTelemetryTracing,
    configure_logging,
    log_ids,
    open_tracing,
)


def test_names_say_what_they_are_and_their_unit() -> None:
    units = "seconds|bytes|total|count|entries|position|commits"
    for metric in METRICS:
        assert re.fullmatch(rf"lakebus_[a-z_]+_({units})", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
        assert bool(metric.bounds) == (metric.kind is MetricKind.HISTOGRAM)
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert metric.help
        assert set(metric.labels).isdisjoint({"table", "principal", "batch_id", "snapshot_id"})
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_memory_metrics_add_set_and_collect() -> None:
    metrics = MemoryMetrics()
    metrics.count("lakebus_ranges_ended_total", outcome="published")
    metrics.count("lakebus_ranges_ended_total", 2, outcome="published")
    metrics.gauge("lakebus_leases_held_count", 3)
    metrics.gauge("lakebus_leases_held_count", 1)
    metrics.observe("lakebus_stage_seconds", 0.5)
    assert metrics.value("lakebus_ranges_ended_total", outcome="published") == 3
    assert metrics.value("lakebus_ranges_ended_total", outcome="failed") == 0
    assert metrics.value("lakebus_leases_held_count") == 1
    assert metrics.observations("lakebus_stage_seconds") == [0.5]


def test_what_the_table_does_not_know_is_refused() -> None:
    metrics = MemoryMetrics()
    with pytest.raises(ValueError, match="not in METRICS"):
        metrics.count("lakebus_unheard_of_total")
    with pytest.raises(ValueError, match="not in METRICS"):
        metrics.count("lakebus_ranges_ended_total")
    with pytest.raises(ValueError, match="not in METRICS"):
        metrics.gauge("lakebus_stage_seconds", 1.0)
    with pytest.raises(ValueError, match="cannot be lowered"):
        metrics.count("lakebus_hints_sent_total", -1)
    NO_METRICS.count("lakebus_hints_sent_total")
    NO_METRICS.gauge("lakebus_leases_held_count", 1)
    NO_METRICS.observe("lakebus_stage_seconds", 1)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.level
    target = io.StringIO()
    handler = configure_logging(service="test", level="info", stream=target)
    yield target
    root.removeHandler(handler)
    root.setLevel(before)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_log_line_is_one_json_object_with_the_ids_of_its_context(stream: io.StringIO) -> None:
    log = logging.getLogger("lakebus.test")
    with log_ids(request_id="r1"):
        with log_ids(batch_id="b1-0-7", snapshot_id=12, skipped=None):
            log.info("two\nlines %s", "é", extra={"shard": 3})
        log.debug("below the level")
        log.warning("outer")
    log.info("outside")
    first, second, third = lines(stream)
    assert first["message"] == "two\nlines é"
    assert first["request_id"] == "r1"
    assert (first["batch_id"], first["snapshot_id"], first["shard"]) == ("b1-0-7", "12", 3)
    assert "skipped" not in first
    assert (first["level"], first["service"], first["logger"]) == ("info", "test", "lakebus.test")
    assert str(first["time"]).endswith("+00:00")
    assert "batch_id" not in second
    assert second["request_id"] == "r1"
    assert "request_id" not in third


def test_exceptions_and_odd_values_are_logged(stream: io.StringIO) -> None:
    log = logging.getLogger("lakebus.test")
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed", extra={"odd": {1, 2}})
    (line,) = lines(stream)
    assert "ValueError: no" in str(line["exception"])
    assert line["odd"] == "{1, 2}"


def test_configuring_again_replaces_only_its_own_handler(stream: io.StringIO) -> None:
    other = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(other)
    again = configure_logging(service="test", stream=io.StringIO())
    ours = [h for h in root.handlers if isinstance(h.formatter, JsonFormatter)]
    assert ours == [again]
    assert other in root.handlers
    root.removeHandler(other)
    root.removeHandler(again)
    with pytest.raises(ConfigurationError, match="no log level"):
        configure_logging(service="test", level="loud")


def test_tracing_that_is_off_is_one_shared_object_and_imports_nothing() -> None:
    assert open_tracing(exporter=None, service="x") is NO_TRACING
    with NO_TRACING.span("a") as one, NO_TRACING.span("b", attributes={"k": 1}) as two:
        assert one is two
        one.set("k", 1)
        assert one.traceparent is None
    program = (
        "import sys, lakebus.telemetry as t\n"
        "with t.open_tracing(exporter=None, service='x').span('a'): pass\n"
        "bad = {'opentelemetry', 'ray', 'pyarrow', 'duckdb'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_spans_nest_and_follow_a_traceparent() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = OpenTelemetryTracing(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with tracing.span("request", traceparent=parent, attributes={"lakebus.shard": 1}) as outer:
        assert (outer.traceparent or "").startswith("00-0af7651916cd43dd8448eb211c80319c-")
        with tracing.span("range") as inner:
            inner.set("lakebus.snapshot_id", 7)
    tracing.close()
    child, root = exporter.get_finished_spans()
    assert (child.name, root.name) == ("range", "request")
    assert child.parent is not None
    assert child.parent.span_id == root.context.span_id
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(child.attributes or {}) == {"lakebus.snapshot_id": 7}


def test_an_exporter_that_cannot_be_loaded_is_a_configuration_error() -> None:
    for name in ("no_such_module:thing", "json:thing", "otlp" if not _has_otlp() else "x:y"):
        with pytest.raises(ConfigurationError, match="trace exporter"):
            open_tracing(exporter=name, service="x")
    tracing = open_tracing(exporter="console", service="x", ratio=0.0)
    with tracing.span("never kept"):
        pass
    tracing.close()


def _has_otlp() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # a parent package is not there
        return False
