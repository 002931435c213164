"""A lake in memory under the harness of the conformance suite, and doubles for the read path."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from lakebus.clock import new_uuid
from lakebus.snapshots import DataFile
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit, Head, Published
from storage.catalog.memory import MemoryCatalog
from storage.engine.plans import ParsedStatement, QueryPlan
from storage.files.objects import LocalObjectStore
from storage.files.parquet import encode_data_file
from storage.memory_lake import MemoryLake
from storage.reading.barrier import Barrier
from storage.reading.manifest import Manifest
from storage.reading.planning import Planner
from storage.reading.query import Engine, QueryLimits, QueryService
from storage.reading.resolve import Resolver
from storage.reading.watcher import HeadWatcher
from tests.conformance.harness import SUITE_SETTINGS, Capability, LakeHarness, LakeView
from tests.conformance.worker import ReadEntry

EPOCH = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
HISTORY = uuid.UUID(int=1)


class MemoryHarness(LakeHarness):
    capabilities = frozenset({Capability.EXPIRE_SNAPSHOTS, Capability.RESTORE})

    def __init__(self, settings: BusSettings) -> None:
        super().__init__(settings)
        self.lake = MemoryLake(settings=settings)
        self._bus = MemoryBus(self.lake)
        self._catalog = MemoryCatalog(self.lake)

    @property
    def bus(self) -> MemoryBus:
        return self._bus

    @property
    def catalog(self) -> MemoryCatalog:
        return self._catalog

    async def second(self) -> LakeView:
        return LakeView(MemoryBus(self.lake), MemoryCatalog(self.lake))

    async def advance_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def restart(self) -> None:
        raise NotImplementedError

    async def expire_snapshots(self, *, before: int) -> None:
        self.lake.expire_snapshots(before=before)

    async def take_backup(self) -> Any:
        return self.lake.backup()

    async def restore(self, backup: Any) -> None:
        self.lake.restore(backup)


class MemoryBackend:
    @asynccontextmanager
    async def open(self, settings: BusSettings = SUITE_SETTINGS) -> AsyncIterator[MemoryHarness]:
        yield MemoryHarness(settings)


def head_of(
    snapshot_id: int,
    watermark: Mapping[int, int] | None = None,
    *,
    history: uuid.UUID = HISTORY,
    oldest: int = 1,
) -> Head:
    at = EPOCH + dt.timedelta(seconds=snapshot_id)
    return Head(snapshot_id, at, history, watermark or {}, at, at, oldest)


class HeadCatalog:
    """A catalog of nothing but a head row. `gate` holds reads between the moment at which they saw
    the row and their answer; `fail` is what the next reads raise."""

    def __init__(self, head: Head) -> None:
        self.row = head
        self.reads = 0
        self.fail: Callable[[], Exception] | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def head(self) -> Head:
        self.reads += 1
        seen = self.row
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fail is not None:
            raise self.fail()
        return seen


# --- real files -----------------------------------------------------------------------------------


class FileWriter:
    """Publishes what the bus holds as real Parquet files below `root`."""

    def __init__(self, lake: MemoryHarness, root: Path) -> None:
        self.lake = lake
        self.store = LocalObjectStore(root)

    async def publish_one(self) -> Published:
        """One claim, one snapshot."""

        worker = self.lake.worker()
        claim = await worker.claim()
        entries = await worker.read(claim)
        files = [
            await self._write(table_id, claim.lease.shard, entries, claim.file_ids[table_id])
            for table_id in sorted({p.table_id for e in entries for p in e.parts})
        ]
        size = sum(entry.size_bytes for entry in entries)
        commit = Commit(new_uuid(), claim.lease, tuple(files), size, worker.owner)
        return await worker.publish(commit)

    async def _write(
        self, table_id: int, shard: int, entries: Sequence[ReadEntry], file_id: uuid.UUID
    ) -> DataFile:
        batches, version = [], 1
        for entry in entries:
            for part in entry.parts:
                if part.table_id == table_id:
                    version = part.schema_version
                    batches.append(_with_places(part.batch, shard, entry.position))
        schema = await self.lake.catalog.schema_version(table_id, version)
        assert schema is not None
        encoded = encode_data_file(schema, pa.Table.from_batches(batches))
        key = f"data/{file_id}.parquet"
        await self.store.put_new(key, encoded.data)
        return DataFile(
            file_id,
            table_id,
            version,
            key,
            encoded.rows,
            encoded.size_bytes,
            encoded.sha256,
            encoded.statistics,
        )


def _with_places(batch: pa.RecordBatch, shard: int, position: int) -> pa.RecordBatch:
    rows = batch.num_rows
    return pa.record_batch(
        {
            **dict(zip(batch.schema.names, batch.columns, strict=True)),
            "$shard": pa.array([shard] * rows, pa.int16()),
            "$position": pa.array([position] * rows, pa.int64()),
            "$row": pa.array(range(rows), pa.int32()),
        }
    )


# --- a service ------------------------------------------------------------------------------------


class FakeResult:
    """Answers with the sources it was given, as text."""

    def __init__(self, plan: QueryPlan) -> None:
        self.columns = [{"name": "sources", "type": "varchar"}]
        self.row_count: int | None = None
        self.statistics: dict[str, float] = {}
        self.closed = False
        self._chunks = [source.relation_sql.encode() for source in plan.sources.values()]

    def __aiter__(self) -> FakeResult:
        return self

    async def __anext__(self) -> bytes:
        if self._chunks:
            return self._chunks.pop(0)
        self.row_count = 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


class FakeEngine:
    """Takes a statement to be the list of tables it reads. `plans` keeps what was executed."""

    def __init__(self) -> None:
        self.plans: list[QueryPlan] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def parse(self, sql: str) -> ParsedStatement:
        await self.gate.wait()
        return ParsedStatement(sql, "select", tuple(sql.split()), (), False, False, {})

    async def execute(self, plan: QueryPlan) -> FakeResult:
        self.plans.append(plan)
        return FakeResult(plan)


class Replica:
    """The read path of one process over a lake."""

    def __init__(
        self,
        lake: MemoryHarness,
        *,
        engine: Engine,
        store: LocalObjectStore,
        limits: QueryLimits | None = None,
    ) -> None:
        codec = lake.lake.codec
        self.manifest = Manifest(lake.catalog)
        self.watcher = HeadWatcher(lake.catalog, poll_s=0.02, on_head=self.manifest.prefetch)
        self.barrier = Barrier(
            catalog=lake.catalog, bus=lake.bus, watcher=self.watcher, codec=codec
        )
        self.resolver = Resolver(catalog=lake.catalog, barrier=self.barrier)
        self.service = QueryService(
            resolver=self.resolver,
            manifest=self.manifest,
            planner=Planner(store),
            engine=engine,
            codec=codec,
            limits=limits,
        )

    async def __aenter__(self) -> Replica:
        self.watcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.watcher.stop()
        await self.barrier.close()
        await self.manifest.close()


def everything(_name: str) -> bool:
    return True
