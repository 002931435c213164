"""A lake on a real PostgreSQL and a folder, with workers over it: the ground of the workers' rows.

Every test ends with `WorkerRig.audit`. Time is read from the database; nothing here decides by a
clock of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from actors.publisher import Submitted
from actors.range_files import EncodeFile
from actors.settings import RoleSettings
from lakebus.clock import Clock
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, Claim, NewEntry
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit
from storage.files.objects import LocalObjectStore, ObjectStore
from storage.files.parquet import encode_data_file
from storage.postgres import PostgresLake
from tests.conformance.harness import COLUMNS, entry_of
from tests.conformance.worker import Place
from tests.matrix.collecting import collect_now, deleted_keys
from tests.matrix.rig import MatrixBackend
from tests.matrix.worker_audit import Audit, audit
from tests.matrix.worker_process import WorkerProcess
from tests.matrix.worker_roles import Worker, WorkerSettings, open_worker
from tests.postgres_server import copy_database, drop_database

_LOOK_S = 0.01
#: How late an expired lease may become claimable (B5).
CLAIMABLE_WITHIN_S = 2.0

BUS = BusSettings(shards=1, lease_ttl_ms=700, retry_backoff_ms=20, intent_ttl_s=600.0)
ROLES = RoleSettings(
    claim_poll_ms=20, linger_ms=0, backoff_ms=5, backoff_ms_max=40, publish_attempts=4
)


@pytest.fixture
async def rig(matrix_backend: MatrixBackend, tmp_path: Path) -> AsyncIterator[WorkerRig]:
    async with AsyncExitStack() as stack:
        dsn = await copy_database(matrix_backend.template)
        stack.push_async_callback(asyncio.to_thread, drop_database, dsn)
        yield await stack.enter_async_context(open_rig(dsn, tmp_path / "objects"))


@asynccontextmanager
async def open_rig(dsn: str, root: Path) -> AsyncIterator[WorkerRig]:
    rig = WorkerRig(dsn, root)
    try:
        yield rig
    finally:
        await rig.close()


class WorkerRig:
    """One lake. `configure` comes first; `accepted` is what receipts were given for."""

    def __init__(self, dsn: str, root: Path) -> None:
        self.dsn = dsn
        self.root = root
        self.bus = BUS
        self.roles = ROLES
        self.accepted: dict[Place, list[int]] = {}
        self._table: TableSchema | None = None
        self._lake: PostgresLake | None = None
        self._eyes: Any = None
        self._workers: list[Worker] = []
        self._processes: list[WorkerProcess] = []

    async def configure(self, *, store: ObjectStore | None = None, **changes: Any) -> None:
        """Opens the lake with these bus settings, and makes the table `t`."""

        self.bus = dataclasses.replace(self.bus, **changes)
        self.root.mkdir(parents=True, exist_ok=True)
        self._lake = await PostgresLake.open(
            self.dsn,
            bus_settings=self.bus,
            object_store=store or LocalObjectStore(self.root),
        )
        self._table = (await self.lake.catalog.create_table(name="t", columns=COLUMNS)).schema
        self._eyes = await asyncpg.connect(self.dsn, server_settings={"search_path": "lakebus"})

    async def close(self) -> None:
        for process in self._processes:
            await process.kill()
        for worker in self._workers:
            await worker.stop()
        if self._lake is not None:
            await self._lake.close()
        if self._eyes is not None:
            self._eyes.terminate()

    @property
    def lake(self) -> PostgresLake:
        assert self._lake is not None, "configure the rig first"
        return self._lake

    @property
    def table(self) -> TableSchema:
        assert self._table is not None
        return self._table

    @property
    def ttl_s(self) -> float:
        return self.bus.lease_ttl_ms / 1e3

    # --- entries ------------------------------------------------------------------------------

    async def append(self, *entries: Sequence[int], lake: PostgresLake | None = None) -> None:
        """Entries with these ids, one after the other, on one shard."""

        for ids in entries:
            await self.append_entry(entry_of(self.table, ids, ordering_key="one"), ids, lake=lake)

    async def append_entry(
        self, entry: NewEntry, ids: Sequence[int], *, lake: PostgresLake | None = None
    ) -> Accepted:
        outcome = await (lake or self.lake).bus.append(entry)
        assert isinstance(outcome, Accepted), outcome
        self.accepted[outcome.shard, outcome.position] = list(ids)
        return outcome

    # --- workers ------------------------------------------------------------------------------

    def settings(self, **changes: Any) -> WorkerSettings:
        given = WorkerSettings(dsn=self.dsn, root=self.root, bus=self.bus, roles=self.roles)
        return dataclasses.replace(given, **changes)

    async def worker(
        self,
        *,
        store: ObjectStore | None = None,
        clock: Clock | None = None,
        encode: EncodeFile = encode_data_file,
    ) -> Worker:
        """A worker in this process that shares nothing with others but the lake; not started."""

        worker = await open_worker(self.settings(), store=store, clock=clock, encode=encode)
        self._workers.append(worker)
        return worker

    async def started(self, **parts: Any) -> Worker:
        worker = await self.worker(**parts)
        await worker.start()
        return worker

    async def process(self, **changes: Any) -> WorkerProcess:
        """A worker in a process of its own; not started."""

        process = await WorkerProcess.spawn(self.settings(**changes))
        self._processes.append(process)
        return process

    async def claim_within(self, worker: Worker, seconds: float) -> tuple[Claim, float]:
        """What `worker` is given by hand, and when, by the database's clock."""

        until_s = await self.now_s() + seconds
        while (claim := await worker.leases.acquire(worker.owner)) is None:
            assert await self.now_s() < until_s, f"nothing was claimable within {seconds} s"
            await asyncio.sleep(_LOOK_S)
        (lease,) = [row for row in await self.leases() if row["epoch"] == claim.lease.epoch]
        return claim, lease["claimed_s"]

    async def stage(self, worker: Worker, claim: Claim) -> Commit:
        """The commit of a claim, staged by hand."""

        staged = await worker.stager.stage(claim, await worker.lake.bus.read(claim))
        return worker.commit_of(claim, staged)

    async def publish(self, worker: Worker, commit: Commit) -> Submitted:
        worker.publisher.start()
        return await worker.publisher.submit(commit)

    # --- looking, by the database ---------------------------------------------------------------

    async def look(self, statement: str, *arguments: object) -> list[Any]:
        return list(await self._eyes.fetch(statement, *arguments))

    async def now_s(self) -> float:
        return float(await self._eyes.fetchval("SELECT extract(epoch FROM clock_timestamp())"))

    async def pass_s(self, seconds: float) -> None:
        """Returns once so much time has passed by the database's clock."""

        until = await self.now_s() + seconds
        while (left_s := until - await self.now_s()) > 0:
            await asyncio.sleep(left_s)

    async def leases(self) -> list[Any]:
        return await self.look(
            "SELECT *, extract(epoch FROM expires_at)::float8 AS expires_s,"
            " extract(epoch FROM claimed_at)::float8 AS claimed_s FROM bus_lease ORDER BY shard, lo"
        )

    async def drain(self, *, within_s: float = 40.0) -> float:
        """Waits for every entry to be terminal; returns how long that took."""

        began_s = await self.now_s()
        while not await self._drained():
            assert await self.now_s() < began_s + within_s, f"left: {await self.leases()}"
            await asyncio.sleep(_LOOK_S)  # the database tells nobody when the last one ends
        return await self.now_s() - began_s

    async def _drained(self) -> bool:
        (row,) = await self.look(
            "SELECT watermark = (SELECT array_agg(next_append ORDER BY shard) FROM bus_shard)"
            " AS yes FROM lake"
        )
        return bool(row["yes"])

    async def collect(self) -> set[str]:
        """The objects that a collection deleted, once every write intent has expired."""

        (row,) = await self.look(
            "SELECT extract(epoch FROM max(expires_at) - clock_timestamp())::float8 AS left_s"
            " FROM write_intent"
        )
        await self.pass_s(max(0.0, row["left_s"] or 0.0) + 0.001)
        store = LocalObjectStore(self.root)
        return deleted_keys(await collect_now(self.lake, store, self.root))

    async def audit(self, *, drained: bool = True) -> Audit:
        return await audit(self.dsn, self.root, self.accepted, drained=drained)
