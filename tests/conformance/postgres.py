"""PostgreSQL as the suite sees it: one database a lake, real time, a wire that fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import IngestBus, NewEntry, NewTable
from storage.bus.settings import BusSettings
from storage.catalog.interface import Catalog
from storage.files.objects import MemoryObjectStore, ObjectExists, ObjectStore
from storage.maintenance.erasing import Erasing
from storage.maintenance.interface import Swap, SwapOperation, Upkeep
from storage.maintenance.jobs import JobStore
from storage.postgres import PostgresLake
from storage.postgres.rewind import GuardSettings, examine, settle
from storage.postgres.rewind_acceptance import connection_to
from storage.postgres.server import TRANSACTION_TIMEOUT_SINCE
from storage.rows.segment import EntryPart
from tests.conformance.contents import Contents, read_contents, write_contents
from tests.conformance.harness import Capability, LakeHarness, LakeView, rows_of
from tests.conformance.wire import Wire
from tests.postgres_server import (
    EXTERNAL_VARIABLE,
    copy_database,
    drop_database,
    fresh_database,
    run_elsewhere,
)

#: A crash is made by killing a backend, which needs the server's processes to be ours.
_IS_LOCAL = EXTERNAL_VARIABLE not in os.environ


#: Behind a wire, nothing but the test talks.
_QUIET = GuardSettings(marker_s=3_600, check_s=3_600)


class PostgresHarness(LakeHarness):
    """`second` and `restart` open pools of their own; `wire` stands between where a test asks."""

    capabilities = frozenset(
        {
            Capability.LOST_REPLIES,
            Capability.ENDS_PAUSED_CLIENT,
            Capability.FOREIGN_TRANSACTIONS,
            Capability.REMOVE_INTENT,
            Capability.EXPIRE_SNAPSHOTS,
            Capability.RESTORE,
            *((Capability.CRASH_SERVER,) if _IS_LOCAL else ()),
        }
    )

    def __init__(self, settings: BusSettings, dsn: str) -> None:
        super().__init__(settings)
        self._dsn = dsn
        self._store = MemoryObjectStore()
        self._records: ObjectStore | None = None
        self._main: PostgresLake | None = None
        self._others: list[PostgresLake] = []
        self._wires: list[Wire] = []
        self._observer: asyncpg.Connection[asyncpg.Record] | None = None
        self._looking = asyncio.Lock()

    @property
    def dsn(self) -> str:
        """For tests that look behind the interface."""

        return self._dsn

    @property
    def bus(self) -> IngestBus:
        return self._lake.bus

    @property
    def catalog(self) -> Catalog:
        return self._lake.catalog

    @property
    def upkeep(self) -> Upkeep:
        return self._lake.upkeep

    @property
    def erasing(self) -> Erasing:
        return self._lake.erasing

    @property
    def jobs(self) -> JobStore:
        return self._lake.jobs

    @property
    def _lake(self) -> PostgresLake:
        assert self._main is not None
        return self._main

    # --- opening and closing ------------------------------------------------------------------

    async def start(self) -> None:
        self._main = await self._open(self._dsn)
        major = (await self._observing()).get_server_version().major
        if major < TRANSACTION_TIMEOUT_SINCE:
            self.capabilities = type(self).capabilities - {Capability.ENDS_PAUSED_CLIENT}

    async def stop(self) -> None:
        for wire in self._wires:
            await wire.stop()
        for lake in (*self._others, self._lake):
            await lake.close()
        if self._observer is not None:
            self._observer.terminate()

    async def _open(self, dsn: str, *, guard: GuardSettings | None = None) -> PostgresLake:
        return await PostgresLake.open(
            dsn, bus_settings=self.settings, object_store=self._store, guard_settings=guard
        )

    async def second(self) -> LakeView:
        self._others.append(await self._open(self._dsn))
        return _view(self._others[-1])

    async def restart(self) -> None:
        await self._leave()
        await self.start()

    async def _leave(self) -> None:
        for lake in (*self._others, self._lake):
            await lake.close()
        self._others.clear()

    def keep_records_in(self, store: ObjectStore) -> None:
        self._records = store

    async def _copy_records(self) -> None:
        if self._records is not None:
            async for key, _ in self._records.list("erasures/"):
                with contextlib.suppress(ObjectExists):
                    await self._store.put_new(key, await self._records.get(key))

    async def take_backup(self) -> Contents:
        return await read_contents(await self._observing())

    async def restore(self, backup: Contents) -> None:
        """The tables and counters are the backup's again; the object store is as it is. Then what
        an operator does: accept the loss."""

        await self._leave()
        await self._copy_records()
        await write_contents(await self._observing(), backup)
        async with connection_to(self._dsn) as connection:
            found = await examine(connection, store=self._store)
            assert found.state is not None
            settled = await settle(
                connection,
                store=self._store,
                bus_settings=self.settings,
                accept=uuid.UUID(found.state["history_id"]),
                reason="restore",
            )
        assert settled.verdict == "began"
        await self.start()

    async def advance_s(self, seconds: float) -> None:
        """Waits by the database's clock; there is no other way to move it."""

        until = (await self._now()).timestamp() + seconds
        while (left_s := until - (await self._now()).timestamp()) > 0:
            await asyncio.sleep(left_s)

    async def _now(self) -> Any:
        async with self._looking:  # one connection, and several tasks that let time pass
            return await (await self._observing()).fetchval("SELECT clock_timestamp()")

    async def _observing(self) -> asyncpg.Connection[asyncpg.Record]:
        if self._observer is None or self._observer.is_closed():
            self._observer = await asyncpg.connect(self._dsn)
        return self._observer

    # --- faults -------------------------------------------------------------------------------

    async def lose_next_reply(self, operation: str) -> None:
        """From here on the lake is reached through a wire; the next reply on it is lost."""

        wire, dsn = await self._wired()
        self._others.append(self._lake)
        self._main = await self._open(dsn, guard=_QUIET)
        await _warm(_view(self._main))
        wire.lose_next_reply()

    @asynccontextmanager
    async def paused_client(self, *, chunks: int, withhold_bytes: int) -> AsyncIterator[LakeView]:
        wire, dsn = await self._wired()
        lake = await self._open(dsn, guard=_QUIET)
        try:
            await _warm(_view(lake))
            wire.pause(chunks=chunks, withhold_bytes=withhold_bytes)
            yield _view(lake)
        finally:
            await wire.stop()
            self._wires.remove(wire)
            await lake.close()

    async def _wired(self) -> tuple[Wire, str]:
        parts = urlsplit(self._dsn)
        wire = Wire(parts.hostname or "127.0.0.1", parts.port or 5432)
        port = await wire.start()
        self._wires.append(wire)
        login, _, _ = parts.netloc.rpartition("@")
        netloc = f"{login}@127.0.0.1:{port}" if login else f"127.0.0.1:{port}"
        return wire, urlunsplit(parts._replace(netloc=netloc))

    @asynccontextmanager
    async def foreign_transaction(self) -> AsyncIterator[None]:
        connection = await asyncpg.connect(self._dsn)
        transaction = connection.transaction(isolation="repeatable_read")
        await transaction.start()
        try:
            await connection.fetchval("SELECT pg_current_xact_id()::text")
            for relation in ("bus_segment", "idem", "bus_log", "bus_lease"):
                await connection.fetchval(f"SELECT count(*) FROM lakebus.{relation}")
            yield
        finally:
            await transaction.rollback()
            await connection.close()

    async def remove_intent(self, file_id: uuid.UUID) -> None:
        observer = await self._observing()
        gone = await observer.execute(
            "DELETE FROM lakebus.write_intent WHERE file_id = $1", file_id
        )
        assert gone == "DELETE 1"

    async def expire_snapshots(self, *, before: int) -> None:
        """Whatever their age: so many of the oldest as lie before it."""

        count = await (await self._observing()).fetchval(
            "SELECT count(*) FROM lakebus.snapshot s, lakebus.lake l"
            " WHERE s.snapshot_id >= l.oldest_snapshot_id AND s.snapshot_id < $1",
            before,
        )
        await self.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=count)

    async def condemn_regardless(self, file_id: uuid.UUID, object_key: str) -> None:
        await (await self._observing()).execute(
            "INSERT INTO lakebus.condemned_file (file_id, object_key, reason, state, condemned_at)"
            " VALUES ($1, $2, 'unreferenced', 'condemned', clock_timestamp() - interval '1 day')",
            file_id,
            object_key,
        )

    async def crash_server(self) -> None:
        """Kills a backend with SIGKILL: PostgreSQL then ends all others, throws its shared memory
        away and recovers from the write-ahead log, as after a power cut."""

        observer = await self._observing()
        os.kill(await observer.fetchval("SELECT pg_backend_pid()"), signal.SIGKILL)
        for lake in (*self._others, self._lake):
            await lake.close()
        self._others.clear()
        for _ in range(600):
            try:
                self._observer = await asyncpg.connect(self._dsn)
                break
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.05)  # recovery has no signal to wait for
        await self.start()


def _view(lake: PostgresLake) -> LakeView:
    return LakeView(lake.bus, lake.catalog, lake.jobs, lake.upkeep)


async def _warm(view: LakeView) -> None:
    """Connects and prepares what will be sent, without an effect: an append for a table that does
    not exist, one that makes a table of no line of history, a publication of nothing, a swap of a
    file that nobody knows."""

    part = EntryPart(2_000_000_000, 1, rows_of([1]))
    await view.bus.append(NewEntry(1, "nothing", (part,), bytes(32), ordering_key="one"))
    ghost = NewTable(TableSchema(2_000_000_000, "nothing", 1, (Column(1, "id", "bigint"),)), -1)
    await view.bus.append(NewEntry(1, "nothing", (part,), bytes(32), creates=(ghost,)))
    await view.catalog.publish(new_uuid(), [])
    nothing = Swap(new_uuid(), 2_000_000_000, SwapOperation.COMPACT, (new_uuid(),), ())
    await view.upkeep.publish_swap(nothing)
    await view.catalog.head()


class PostgresBackend:
    """Copies a database that was upgraded once: a migration for each test would take minutes."""

    def __init__(self, template: str) -> None:
        self._template = template

    @asynccontextmanager
    async def open(self, settings: BusSettings) -> AsyncIterator[LakeHarness]:
        dsn = await copy_database(self._template)
        harness = PostgresHarness(settings, dsn)
        try:
            await harness.start()
            try:
                yield harness
            finally:
                await harness.stop()
        finally:
            await asyncio.to_thread(drop_database, dsn)


@contextmanager
def postgres_backend(dsn: str) -> Iterator[PostgresBackend]:
    """The backend on a running server, with its upgraded template."""

    template = fresh_database(dsn)
    try:
        run_elsewhere(lambda: upgrade(template))
        yield PostgresBackend(template)
    finally:
        drop_database(template)
