"""Databases that go back in time for real: a cold copy put back, or a standby promoted.

A `Machine` is one PostgreSQL server with a data folder of its own. The objects (and so the marker)
lie elsewhere, as they do where a database is rolled back and its object store is not.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import httpx

from cluster import assembly, components
from cluster.embedded_postgres import EmbeddedPostgres
from lakebus.errors import HistoryRewound, Unavailable
from lakebus.settings import Settings
from serve_app.app import create_api_app
from storage.bus.settings import BusSettings
from storage.files.objects import LocalObjectStore
from storage.ingesting.grants import Grant
from storage.ingesting.keyring import KeyRing
from storage.postgres import PostgresLake
from storage.postgres.rewind import GuardSettings
from tests.postgres_server import new_data_dir, programs_wanted

BUS = BusSettings(shards=2, lease_ttl_ms=60_000)
#: Nothing is judged or marked but by new connections, changes, and when a test says so.
WHEN_TOLD = GuardSettings(marker_s=3_600, check_s=3_600, recheck_s=3_600)
GRANTS = tuple(Grant(scope) for scope in ("ingest", "create", "query", "admin"))
_WITHIN_S = 30.0
_SMALL = {"shared_buffers": "16MB", "min_wal_size": "32MB", "max_connections": "60"}


class Machine:
    """`folder` holds the cluster; `stop` and `start` keep the port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = EmbeddedPostgres(
            folder, sync_init=False, bin_dir=programs_wanted(), settings=_SMALL
        )

    @property
    def dsn(self) -> str:
        return self.server.dsn

    async def copy_of(self, other: Machine) -> None:
        """Becomes what `other`, which must be stopped, is now."""

        for name in ("postgres", "secrets"):
            await _copy(other.folder / name, self.folder / name)
        (self.folder / "postgres" / "state.json").unlink(missing_ok=True)

    async def back_up(self) -> Path:
        """A cold copy of the cluster; the server runs again afterwards."""

        copy = self.folder / "backup"
        await self.server.stop()
        await _copy(self.server.cluster_dir, copy)
        await self.server.start()
        return copy

    async def roll_back(self, backup: Path) -> None:
        """The volume is put back to the copy."""

        await self.server.stop()
        await asyncio.to_thread(shutil.rmtree, self.server.cluster_dir)
        await _copy(backup, self.server.cluster_dir)
        await self.server.start()

    async def follow(self, primary: Machine) -> None:
        """Starts as a streaming standby of `primary`; both were made from one copy."""

        parts = urlsplit(primary.server.superuser_dsn)
        told = f"host=127.0.0.1 port={parts.port} user={parts.username} password={parts.password}"
        cluster = self.server.cluster_dir
        with open(cluster / "postgresql.auto.conf", "a") as settings:
            settings.write(f"primary_conninfo = '{told}'\n")
        shutil.copyfile(cluster / "PG_VERSION", cluster / "standby.signal")
        await self.server.start()
        await self.until("SELECT count(*) = 1 FROM pg_stat_wal_receiver WHERE status = 'streaming'")

    async def catch_up(self, primary: Machine) -> None:
        end = await primary.ask("SELECT pg_current_wal_flush_lsn()::text")
        await self.until(f"SELECT pg_last_wal_replay_lsn() >= '{end}'")

    async def lag(self) -> None:
        """From here on the primary is not heard any more."""

        await self.ask("ALTER SYSTEM SET primary_conninfo = ''")
        await self.ask("SELECT pg_reload_conf()")
        await self.until("SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    async def promote(self) -> None:
        assert await self.ask("SELECT pg_promote(true, 60)")

    async def ask(self, question: str) -> Any:
        connection = await asyncpg.connect(self.server.superuser_dsn)
        try:
            return await connection.fetchval(question)
        finally:
            await connection.close()

    async def until(self, question: str) -> None:
        """A server has no signal for these, so it is asked again."""

        await wait_for(lambda: self.ask(question), question)


async def wait_for(look: Callable[[], Awaitable[object]], what: str) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not await look():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.05)


async def _copy(source: Path, target: Path) -> None:
    # With owners: as root, the server's files belong to somebody else.
    command = ["cp", "-a", "--reflink=auto", str(source), str(target)]
    await asyncio.to_thread(subprocess.run, command, check=True)


@asynccontextmanager
async def machine(template: Machine) -> AsyncIterator[Machine]:
    """A copy of a stopped machine; not started."""

    made = Machine(new_data_dir())
    await made.copy_of(template)
    try:
        yield made
    finally:
        await made.server.stop()
        shutil.rmtree(made.folder, ignore_errors=True)


def both(one: Machine, other: Machine) -> str:
    """A DSN that means whichever of the two is the primary."""

    parts = urlsplit(one.dsn)
    hosts = ",".join(f"127.0.0.1:{each.server.port}" for each in (one, other))
    login = f"{parts.username}:{quote(parts.password or '')}"
    return f"postgresql://{login}@{hosts}{parts.path}?target_session_attrs=primary"


@asynccontextmanager
async def process(
    dsn: str, store: LocalObjectStore, guard: GuardSettings = WHEN_TOLD
) -> AsyncIterator[PostgresLake]:
    """One process of the lake: a coordinator, a publisher, a replica."""

    lake = await PostgresLake.open(dsn, bus_settings=BUS, object_store=store, guard_settings=guard)
    try:
        yield lake
    finally:
        await lake.close()


async def refused(lake: PostgresLake) -> bool:
    """Whether the process says that the catalog went back; before it has found its way to the
    new server it says that it cannot be reached."""

    try:
        await lake.catalog.head()
    except HistoryRewound:
        return True
    except Unavailable:
        return False
    return False


class Door:
    """An ingest replica as the product composes it, asked over HTTP."""

    def __init__(self, http: httpx.AsyncClient, key: str) -> None:
        self.http = http
        self._headers = {"authorization": f"Bearer {key}"}

    async def get(self, path: str) -> httpx.Response:
        return await self.http.get(path, headers=self._headers)

    async def post(self, path: str, document: object) -> httpx.Response:
        return await self.http.post(path, json=document, headers=self._headers)

    async def send(self, key: str) -> httpx.Response:
        """One row; the idempotency key is its content too."""

        headers = self._headers | {"idempotency-key": key}
        return await self.http.post("/v1/tables/t/rows", json=[{"id": key}], headers=headers)

    async def receipt(self, key: str) -> dict[str, Any]:
        answer = await self.send(key)
        assert answer.status_code in (200, 201, 202), answer.text
        return dict(answer.json()["receipt"])

    async def ready(self) -> bool:
        return (await self.get("/readyz")).status_code == 200


@asynccontextmanager
async def door(dsn: str, folder: Path, key: str) -> AsyncIterator[Door]:
    settings = Settings.load(
        environ={},
        flags={"data_dir": folder, "postgres.dsn": dsn, "bus.shards": BUS.shards},
    )
    path = str(components.keep_settings(settings))
    async with assembly.api_dependencies(path) as dependencies:
        transport = httpx.ASGITransport(app=create_api_app(dependencies))
        async with httpx.AsyncClient(transport=transport, base_url="http://lake") as http:
            yield Door(http, key)


async def new_key(lake: PostgresLake) -> str:
    return (await KeyRing(lake.keys).issue(principal="root", grants=GRANTS)).text
