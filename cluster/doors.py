"""The direct doors of the replicas, made from the settings.

Both have the bounds of Serve's route, from the same settings; they differ in port and address.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster import assembly, components
from lakebus.settings import Settings
from lakebus.telemetry import NO_METRICS, Metrics
from serve_app.dependencies import Dependencies
from serve_app.direct import DirectDoor, DoorSettings
from serve_app.direct_protocol import ConnectionLimits
from serve_app.direct_url import DoorPlace, IngestUrl, door_id


async def ingest_door(settings: Settings, opened: Dependencies) -> DirectDoor | None:
    """An ingest replica's door, unless the settings close it."""

    direct = settings.direct
    return await _door(settings, opened, direct.url, direct.port, "direct.port")


async def query_door(settings: Settings, opened: Dependencies) -> DirectDoor | None:
    """A query replica's door, unless the settings close it."""

    direct = settings.direct
    return await _door(settings, opened, direct.query_url, direct.query_port, "direct.query_port")


async def query_place(settings: Settings, opened: Dependencies) -> DoorPlace | None:
    """Where the query replicas' doors are, where that can be known from the settings."""

    direct = settings.direct
    if not direct.enabled or not (direct.query_url or direct.query_port):
        return None
    return DoorPlace(await _url(settings, opened, direct.query_url), direct.query_port)


@asynccontextmanager
async def query_dependencies(
    path: str, *, metrics: Metrics = NO_METRICS
) -> AsyncIterator[Dependencies]:
    """What a query replica stands on: the components, and its direct door."""

    settings = components.read_settings(path)
    async with assembly.query_dependencies(path, metrics=metrics) as opened:
        yield dataclasses.replace(opened, door=await query_door(settings, opened))


async def _url(settings: Settings, opened: Dependencies, told: str | None) -> IngestUrl:
    head = await opened.catalog.head()
    return IngestUrl(
        host=settings.direct.host,
        http_port=settings.http.port,
        url=told,
        door_id=door_id(head.history),
    )


async def _door(
    settings: Settings, opened: Dependencies, told: str | None, port: int, port_setting: str
) -> DirectDoor | None:
    http, direct = settings.http, settings.direct
    if not direct.enabled:
        return None
    return DirectDoor(
        DoorSettings(
            host=direct.host,
            port=port,
            port_setting=port_setting,
            connections=ConnectionLimits(
                connections_max=direct.connections_max,
                head_s=direct.head_timeout_s,
                request_s=settings.request_timeout_s,
                idle_s=direct.idle_timeout_s,
            ),
            running_max=http.ongoing_requests_max,
            waiting_max=http.queued_requests_max,
            drain_s=http.drain_s,
        ),
        await _url(settings, opened, told),
    )
