"""Composition of a stack: which actors and which deployments, made from the settings.

Runs in the Ray host, after Ray and Serve have started and the database has its schema. What the
processes are told is the path of the settings file, never a secret; what they make of it is in
`cluster/assembly.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from ray import serve

from actors import runtime
from actors.runtime_settings import RuntimeSettings
from cluster import assembly, components, doors
from cluster.deployed import Deployed
from cluster.ray_environment import NAMESPACE
from lakebus.errors import Unauthenticated
from lakebus.settings import Settings
from lakebus.telemetry import Metrics
from serve_app import deployments
from serve_app.dependencies import Dependencies
from storage.ingesting.grants import SCOPES, Grant
from storage.ingesting.keyring import KeyRing

LOCAL_PRINCIPAL = "local"


async def deploy(settings: Settings, *, api_key: str | None) -> Deployed:
    """Start the roles and the deployments, and wait until all of them run.

    :param api_key: the local key of an earlier start; a new one is made if it is not valid.
    """
    settings_path = components.keep_settings(settings)
    # First and alone: it makes the lake on an empty database, and meets any reason to refuse.
    key = await _local_key(settings, api_key)
    roles = runtime_settings(settings, settings_path)
    applications = deployments.build(
        settings.http,
        settings_path=str(settings_path),
        api_factory=f"{__name__}:api_dependencies",
        query_factory="cluster.doors:query_dependencies",
        env={},  # all of this stack's Ray has it already
    )
    await asyncio.gather(
        runtime.start(roles, timeout_s=settings.ray.start_timeout_s),
        asyncio.to_thread(serve.run_many, applications),
    )
    return Deployed(
        url=_here(settings.http.host, settings.http.port),
        ingest_url=_door_url(settings, settings.direct.url, settings.direct.port),
        query_url=_door_url(settings, settings.direct.query_url, settings.direct.query_port),
        api_key=key,
        tend=functools.partial(runtime.tend, roles),
        tend_s=settings.actors.supervisor_tick_ms / 1000,
    )


def _door_url(settings: Settings, url: str | None, port: int) -> str | None:
    """A direct door as seen from this machine, or where the setting says that it is."""
    direct = settings.direct
    if not direct.enabled or not (url or port):
        return None
    return url or _here(direct.host, port)


def _here(host: str, port: int) -> str:
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def runtime_settings(settings: Settings, settings_path: Path) -> RuntimeSettings:
    """What the actors' runtime is told."""
    return RuntimeSettings(
        namespace=NAMESPACE,
        factory="cluster.backend:open_backend",
        config=str(settings_path),
        placement=settings.actors.placement,
        coordinators=settings.actors.coordinators,
        tick_age_s_max=settings.actors.stall_s,
        log_level=settings.log.level.upper(),
    )


@asynccontextmanager
async def api_dependencies(path: str, *, metrics: Metrics) -> AsyncIterator[Dependencies]:
    """What an ingest replica stands on: the components, its direct door, and the actors for its
    status."""
    settings = components.read_settings(path)
    roles = runtime_settings(settings, Path(path))

    async def status() -> Mapping[str, object]:
        return {"actors": [_actor_json(found) for found in await runtime.status(roles)]}

    async with assembly.api_dependencies(path, metrics=metrics, status=status) as opened:
        yield dataclasses.replace(
            opened,
            door=await doors.ingest_door(settings, opened),
            query_place=await doors.query_place(settings, opened),
        )


def _actor_json(found: runtime.ActorStatus) -> dict[str, object]:
    ping = found.ping
    return {
        "role": found.role,
        "version": found.version,
        "state": "missing" if ping is None else "ready" if ping.ready else "starting",
        "process_id": None if ping is None else ping.process_id,
        "tick_age_s": None if ping is None else round(ping.age_s, 3),
    }


async def _local_key(settings: Settings, known: str | None) -> str | None:
    store = components.object_store(settings)
    await components.check_object_store(store)
    lake = await components.open_lake(settings, store)
    try:
        lake.guard.refuse()  # a database that went back in time: say it now, start nothing
        if settings.profile == "production":
            return None
        keyring = KeyRing(lake.keys)
        if known is not None:
            try:
                await keyring.authenticate(known)
                return known
            except Unauthenticated:
                pass  # another database than last time
        issued = await keyring.issue(
            principal=LOCAL_PRINCIPAL,
            grants=[Grant(scope) for scope in SCOPES],
            label="made at the first start",
        )
        return issued.text
    finally:
        await lake.close()
