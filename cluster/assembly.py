"""Puts the components of one process together: a role process, an ingest or a query replica.

Each function is given the path of the stack's private settings file (`cluster.components`), opens
what the process needs on the running loop, and closes it again in reverse order.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from actors.hints import HintSender
from cluster import components, replica_components
from lakebus.clock import SystemClock
from lakebus.settings import Settings
from lakebus.telemetry import (
    NO_METRICS,
    Metrics,
    configure_logging,
)
from serve_app.dependencies import Dependencies
from serve_app.limits import Admission
from serve_app.limits_bytes import ByteBudget
from serve_app.running import QueryDirectory, RunningQueries
from storage.catalog.interface import Head
from storage.engine.engine import QueryEngine
from storage.files.objects import OpenedStore
from storage.ingesting.batches import BatchService
from storage.ingesting.deletes import DeleteService
from storage.ingesting.erasures import ErasureService
from storage.ingesting.keyring import KeyRing
from storage.ingesting.quarantine import QuarantineService
from storage.ingesting.service import IngestService
from storage.ingesting.table_cache import TableCache
from storage.ingesting.table_service import TableService
from storage.maintenance.service import MaintenanceService
from storage.postgres import PostgresLake
from storage.reading.barrier import Barrier
from storage.reading.changes import ChangeReader
from storage.reading.manifest import Manifest
from storage.reading.pins import PinKeeper
from storage.reading.planning import Planner
from storage.reading.postgres_listener import PostgresHeadListener
from storage.reading.predicates import PredicateChecker
from storage.reading.query import QueryService
from storage.reading.resolve import Resolver
from storage.reading.watcher import HeadWatcher

_log = logging.getLogger(__name__)

#: An object that is never there: asking for it shows whether the store answers.
_PROBE_KEY = "probe/readyz"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What every replica reads with."""

    settings: Settings
    store: OpenedStore
    lake: PostgresLake
    watcher: HeadWatcher
    barrier: Barrier
    manifest: Manifest
    resolver: Resolver


@asynccontextmanager
async def api_dependencies(
    path: str,
    *,
    metrics: Metrics = NO_METRICS,
    status: Callable[[], Awaitable[Mapping[str, object]]] | None = None,
    directory: QueryDirectory | None = None,
) -> AsyncIterator[Dependencies]:
    """Everything but SQL."""

    async with AsyncExitStack() as stack:
        reading = await _open_reading(stack, path, "ingest")
        yield await _api(stack, reading, metrics=metrics, status=status, directory=directory)


@asynccontextmanager
async def query_dependencies(
    path: str, *, metrics: Metrics = NO_METRICS
) -> AsyncIterator[Dependencies]:
    """SQL alone."""

    async with AsyncExitStack() as stack:
        reading = await _open_reading(stack, path, "query")
        yield await _query(stack, reading, metrics=metrics)


@asynccontextmanager
async def all_dependencies(
    path: str, *, metrics: Metrics = NO_METRICS
) -> AsyncIterator[Dependencies]:
    """The whole API in one process."""

    async with AsyncExitStack() as stack:
        reading = await _open_reading(stack, path, "server")
        queries = await _query(stack, reading, metrics=metrics)
        api = await _api(stack, reading, metrics=metrics, directory=queries.running)
        yield dataclasses.replace(
            api,
            ready=queries.ready,
            queries=queries.queries,
            changes=queries.changes,
            predicates=queries.predicates,
            running=queries.running,
            health=queries.health,
        )


async def _open_reading(stack: AsyncExitStack, path: str, service: str) -> _Reading:
    settings = components.read_settings(path)
    if settings.log.json_lines:
        configure_logging(service=service, level=settings.log.level)
    store = components.object_store(settings)
    lake = await components.open_lake(settings, store)
    stack.push_async_callback(lake.close)
    manifest = Manifest(lake.catalog)
    stack.push_async_callback(manifest.close)
    listener = PostgresHeadListener(components.dsn_of(settings))
    watcher = HeadWatcher(
        lake.catalog,
        listen=listener.wake_ups,
        on_head=manifest.prefetch,
        refuse=lake.guard.refuse,
    )
    watcher.start()
    stack.push_async_callback(watcher.stop)
    barrier = Barrier(catalog=lake.catalog, bus=lake.bus, watcher=watcher, codec=lake.codec)
    stack.push_async_callback(barrier.close)
    resolver = Resolver(catalog=lake.catalog, barrier=barrier)
    return _Reading(settings, store, lake, watcher, barrier, manifest, resolver)


async def _api(
    stack: AsyncExitStack,
    reading: _Reading,
    *,
    metrics: Metrics,
    status: Callable[[], Awaitable[Mapping[str, object]]] | None = None,
    directory: QueryDirectory | None = None,
) -> Dependencies:
    settings, lake = reading.settings, reading.lake
    hints = HintSender(
        stack=lake.identity.lake_id.hex,
        directory=lake.hints,
        settings=components.role_settings(settings),
        clock=SystemClock(),
        metrics=metrics,
        # Hints are hints: without them rows become visible a poll interval later.
        on_fatal=lambda role, error: _log.error("%s ended: %s", role, error),
    )
    await hints.start()
    stack.push_async_callback(hints.stop)
    tables = TableCache(lake.catalog)
    ingesting = replica_components.ingest_settings(settings)
    return dataclasses.replace(
        _shared(reading, metrics=metrics, service="ingest"),
        ingest=IngestService(
            bus=lake.bus,
            catalog=lake.catalog,
            barrier=reading.barrier,
            tables=tables,
            settings=ingesting,
            on_accepted=hints.hint,
            keys=lake.keys,
        ),
        tables=TableService(
            catalog=lake.catalog, barrier=reading.barrier, tables=tables, keys=lake.keys
        ),
        deletes=DeleteService(
            jobs=lake.jobs,
            tables=tables,
            resolver=reading.resolver,
            codec=lake.codec,
            keys=lake.keys,
        ),
        erasures=ErasureService(
            jobs=lake.jobs,
            tables=tables,
            resolver=reading.resolver,
            codec=lake.codec,
            keys=lake.keys,
            bus=lake.bus,
        ),
        batches=BatchService(bus=lake.bus, watcher=reading.watcher),
        quarantine=QuarantineService(
            bus=lake.bus, catalog=lake.catalog, keys=lake.keys, settings=ingesting
        ),
        maintenance=MaintenanceService(
            jobs=lake.jobs, upkeep=lake.upkeep, catalog=lake.catalog, keys=lake.keys
        ),
        directory=directory,
        status=status,
        traces=lake.traces,
    )


async def _query(stack: AsyncExitStack, reading: _Reading, *, metrics: Metrics) -> Dependencies:
    settings, lake = reading.settings, reading.lake
    cache = replica_components.file_cache(
        settings, reading.store, needed=reading.manifest.needs, metrics=metrics
    )
    if cache is not None:
        stack.push_async_callback(cache.close)
        reading.manifest.on_load = cache.sweep
    engine = QueryEngine(replica_components.engine_settings(settings, cache))
    await engine.start()
    stack.push_async_callback(engine.stop)
    planner = Planner(reading.store, cache=cache)
    pins = await _open_pins(stack, reading)
    shared = _shared(reading, metrics=metrics, service="query")
    return dataclasses.replace(
        shared,
        ready={**shared.ready, "pins": pins.check},
        health={"engine": engine.ping},
        queries=QueryService(
            resolver=reading.resolver,
            manifest=reading.manifest,
            planner=planner,
            engine=engine,
            codec=lake.codec,
            pins=pins,
            limits=replica_components.query_limits(settings),
        ),
        changes=ChangeReader(
            catalog=lake.catalog,
            resolver=reading.resolver,
            manifest=reading.manifest,
            planner=planner,
            engine=engine,
            pins=pins,
        ),
        predicates=PredicateChecker(engine),
        running=RunningQueries(),
    )


async def _open_pins(stack: AsyncExitStack, reading: _Reading) -> PinKeeper:
    """The claim of this process on the files it reads. Queries wait for the first grant."""

    settings, watcher = replica_components.pin_settings(reading.settings), reading.watcher

    async def head() -> Head:
        known = watcher.head_within(settings.renew_s)
        return await watcher.fresh_head() if known is None else known

    note = f"queries of process {os.getpid()} on {socket.gethostname()}"
    pins = PinKeeper(upkeep=reading.lake.upkeep, head=head, settings=settings, note=note)
    pins.start()
    stack.push_async_callback(pins.stop)
    return pins


def _shared(reading: _Reading, *, metrics: Metrics, service: str) -> Dependencies:
    """What both kinds of replica stand on."""

    lake = reading.lake
    limits = replica_components.http_limits(reading.settings)
    return Dependencies(
        keyring=KeyRing(lake.keys),
        catalog=lake.catalog,
        bus=lake.bus,
        codec=lake.codec,
        resolver=reading.resolver,
        manifest=reading.manifest,
        limits=limits,
        budget=ByteBudget(limits.inflight_bytes_max, share=reading.settings.limits.inflight_share),
        admission=Admission(replica_components.limit_settings(reading.settings, service)),
        ready=_ready_checks(reading),
        metrics=metrics,
        tracing=components.tracing(reading.settings, service),
    )


def _ready_checks(reading: _Reading) -> dict[str, Callable[[], Awaitable[object]]]:
    return {
        "catalog": reading.lake.catalog.head,
        "bus": reading.lake.bus.ends,
        "object_store": lambda: reading.store.size(_PROBE_KEY),
    }
