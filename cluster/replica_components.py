"""From settings to the components that only replicas have (`cluster.components`)."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from cluster import components
from lakebus.settings import Settings
from lakebus.telemetry import NO_METRICS, Metrics
from serve_app.dependencies import HttpLimits
from serve_app.limits import LimitSettings
from storage.engine.settings import EngineSettings
from storage.files.cache import FileCache
from storage.files.objects import ObjectStore
from storage.ingesting.requests import IngestSettings
from storage.reading.pins import PinSettings
from storage.reading.query import QueryLimits


def ingest_settings(settings: Settings) -> IngestSettings:
    return IngestSettings(rows_max=settings.http.rows_max)


def query_limits(settings: Settings) -> QueryLimits:
    query = settings.query
    return QueryLimits(
        rows_max=query.rows_max,
        bytes_max=query.result_bytes_max,
        timeout_ms=query.timeout_ms_default,
    )


def pin_settings(settings: Settings) -> PinSettings:
    """A short life is renewed more often: some renewals may fail before queries are stopped."""

    ttl_s = settings.query.pin_ttl_s
    return PinSettings(
        renew_s=min(5.0, ttl_s / 5),
        ttl_s=ttl_s,
        margin_s=min(10.0, ttl_s / 5),
        call_s=min(10.0, ttl_s / 4),
    )


def http_limits(settings: Settings) -> HttpLimits:
    return HttpLimits(
        body_bytes_max=settings.http.body_bytes_max,
        inflight_bytes_max=settings.bus.inflight_bytes_max,
    )


def limit_settings(settings: Settings, service: str) -> LimitSettings:
    """A replica's part of the quotas. Query replicas that are added under load add to a quota: how
    many run is not known to each other, and nobody should wait for a part that no replica gives."""

    limits, http = settings.limits, settings.http
    replicas = {"ingest": http.ingest_replicas, "query": http.query_replicas_min}
    return LimitSettings(
        requests_per_s=limits.requests_per_s,
        ingest_bytes_per_s=limits.ingest_bytes_per_s,
        burst_s=limits.burst_s,
        queries_at_once=limits.queries_at_once,
        requests_at_once=min(limits.requests_at_once, max(1, http.ongoing_requests_max * 7 // 8)),
        requests_all=http.ongoing_requests_max,
        ingest_at_once=limits.ingest_at_once,
        presence_s=limits.presence_s,
        replicas=replicas.get(service, 1),
    )


def file_cache(
    settings: Settings,
    store: ObjectStore,
    *,
    needed: Callable[[uuid.UUID], bool],
    metrics: Metrics = NO_METRICS,
) -> FileCache | None:
    """The copies of one replica; None where the store itself keeps files on this machine."""

    if store.local_path("probe") is not None:
        return None
    return FileCache.open(
        store,
        components.cache_dir(settings),
        bytes_max=settings.store.cache_max_bytes,
        fetches_at_once=settings.store.cache_fetches,
        needed=needed,
        metrics=metrics,
    )


def engine_settings(settings: Settings, cache: FileCache | None = None) -> EngineSettings:
    """Each replica spills into a folder of its own, made anew at its start."""

    parent = Path(settings.data_dir).resolve() / "spill"
    parent.mkdir(mode=0o700, exist_ok=True)
    spill = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent)
    made = components.engine_settings_at(settings, spill)
    if cache is None:
        return made
    return dataclasses.replace(made, allowed_directory=str(cache.folder))
