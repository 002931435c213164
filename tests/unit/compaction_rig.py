"""A lake whose files are written by hand, for the tests of jobs that rewrite them: real Parquet in
a folder, any bus and catalog, and answers that are compared between snapshots."""

from __future__ import annotations

import datetime as dt
import hashlib
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from lakebus.clock import SYSTEM_CHANCE, SystemClock, new_uuid
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.bus.interface import Accepted, IngestBus, NewEntry
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.interface import Catalog, Commit
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore, ObjectStore
from storage.files.parquet import encode_data_file, scan_expression
from storage.maintenance.compaction import compact
from storage.maintenance.interface import Upkeep
from storage.maintenance.jobs import Job, JobContext, JobKind, JobState
from storage.maintenance.retention import retain
from storage.maintenance.settings import MaintenanceSettings
from storage.memory_clock import ManualClock
from storage.memory_lake import MemoryLake
from storage.rows.segment import EntryPart
from tests.failpoints.actions import Run
from tests.failpoints.points import Failpoints

#: (shard, position, row, id, ts, note)
Row = tuple[Any, ...]
NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)
COLUMNS = (Column(0, "id", "bigint"), Column(0, "ts", "timestamp"), Column(0, "note", "varchar"))
#: Files of a test are a few KiB, so sizes are a thousandth of the real ones.
SETTINGS = MaintenanceSettings(
    target_file_bytes=128 * 1024, small_file_bytes=16 * 1024, rewrite_memory_bytes=128 * 1024**2
)


class Lake:
    """One stack. `noted` keeps every report that a job noted."""

    def __init__(
        self,
        *,
        bus: IngestBus,
        catalog: Catalog,
        upkeep: Upkeep,
        folder: Path,
        store: ObjectStore | None = None,
        settings: MaintenanceSettings = SETTINGS,
    ) -> None:
        self.bus, self.catalog, self.upkeep = bus, catalog, upkeep
        self.store: ObjectStore = store or LocalObjectStore(folder / "objects")
        self.folder, self.settings = folder, settings
        self.noted: list[Mapping[str, Any]] = []

    # --- jobs --------------------------------------------------------------------------------

    def context(self, **replaced: Any) -> JobContext:
        temp_dir = self.folder / f"job-{new_uuid().hex}"
        temp_dir.mkdir(parents=True)

        async def note(report: Mapping[str, Any]) -> None:
            self.noted.append(report)

        context = JobContext(
            catalog=self.catalog,
            upkeep=self.upkeep,
            bus=self.bus,
            store=self.store,
            settings=self.settings,
            engine=EngineSettings(allowed_directory=str(self.folder), temp_directory=str(temp_dir)),
            temp_dir=temp_dir,
            clock=SystemClock(),
            chance=SYSTEM_CHANCE,
            note=note,
        )
        return replace(context, **replaced)

    async def compact(self, *, dry_run: bool = False, **parameters: Any) -> Mapping[str, Any]:
        return await compact(self.context(), job_of(JobKind.COMPACT, parameters, dry_run=dry_run))

    async def retain(self, *, dry_run: bool = False, **parameters: Any) -> Mapping[str, Any]:
        return await retain(self.context(), job_of(JobKind.RETAIN, parameters, dry_run=dry_run))

    # --- writing -----------------------------------------------------------------------------

    async def create(self, name: str = "events", **layout: Any) -> TableSchema:
        change = await self.catalog.create_table(name=name, columns=COLUMNS, **layout)
        return change.schema

    async def write(
        self,
        table: TableSchema,
        ids: Sequence[int],
        *,
        ts: dt.datetime | Sequence[dt.datetime | None] | None = None,
        partition: str | None = None,
        more: Mapping[str, pa.Array] | None = None,
    ) -> DataFile:
        """One entry, published at once as one file. `more`: columns beyond the three, by name."""

        times = list(ts) if isinstance(ts, Sequence) else [ts or NOW] * len(ids)
        by_name: dict[str, pa.Array] = {
            "id": pa.array(ids, pa.int64()),
            "ts": pa.array([_plain(t) for t in times], pa.timestamp("us")),
            "note": pa.array([f"note {i} " + "x" * (i % 50) for i in ids]),
            **(more or {}),
        }
        columns = [c for c in table.columns if c.name in by_name]
        batch = pa.RecordBatch.from_arrays(
            [by_name[c.name] for c in columns], names=[str(c.column_id) for c in columns]
        )
        accepted = await self.bus.append(
            NewEntry(
                1, table.name, (EntryPart(table.table_id, table.version, batch),), _digest(ids)
            )
        )
        assert isinstance(accepted, Accepted), accepted
        return await self._publish(table, batch, partition)

    async def _publish(
        self, table: TableSchema, batch: pa.RecordBatch, partition: str | None
    ) -> DataFile:
        owner = new_uuid()
        claim = await self.bus.claim(owner)
        assert claim is not None
        assert claim.lease.hi == claim.lease.lo + 1
        segments = await self.bus.read(claim)
        places = {
            "$shard": pa.array([claim.lease.shard] * batch.num_rows, pa.int16()),
            "$position": pa.array([claim.lease.lo] * batch.num_rows, pa.int64()),
            "$row": pa.array(range(batch.num_rows), pa.int32()),
        }
        rows = pa.Table.from_batches([batch])
        for name, values in places.items():
            rows = rows.append_column(name, values)
        encoded = encode_data_file(table, rows)
        [file_id] = await self.upkeep.register_intents(table.table_id, 1, owner=owner, ttl_s=60)
        file = DataFile(
            file_id=file_id,
            table_id=table.table_id,
            schema_version=table.version,
            object_key=f"tables/{table.table_id}/{file_id}.parquet",
            rows=encoded.rows,
            size_bytes=encoded.size_bytes,
            sha256=encoded.sha256,
            statistics=encoded.statistics,
            partition=partition,
        )
        await self.store.put_new(file.object_key, encoded.data)
        size = sum(sum(segment.entry_bytes) for segment in segments)
        commit = Commit(new_uuid(), claim.lease, (file,), size, owner)
        published = await self.catalog.publish(new_uuid(), [commit])
        assert published.snapshot_id is not None
        return replace(file, first_snapshot=published.snapshot_id)

    # --- reading -----------------------------------------------------------------------------

    async def head_id(self) -> int:
        return (await self.catalog.head()).snapshot_id

    async def live(self, table: TableSchema) -> list[DataFile]:
        return list(await self.upkeep.live_files(table.table_id))

    async def rows(self, table: TableSchema, snapshot_id: int | None = None) -> list[Row]:
        """Every row of the table at a snapshot, with its place, in order of places."""

        return await self.ask(table, "SELECT * FROM t ORDER BY 1, 2, 3", snapshot_id)

    async def ask(self, table: TableSchema, sql: str, snapshot_id: int | None = None) -> list[Row]:
        """A query over `t`, the table at a snapshot with its hidden columns."""

        return (await self.answers(table, [sql], snapshot_id))[0]

    async def answers(
        self, table: TableSchema, queries: Sequence[str], snapshot_id: int | None = None
    ) -> list[list[Row]]:
        at = snapshot_id if snapshot_id is not None else await self.head_id()
        delta = await self.catalog.manifest_delta(after=0, until=at)
        files = [
            file
            for file in delta.files
            if file.table_id == table.table_id
            and (file.last_snapshot is None or file.last_snapshot > at)
        ]
        schema = next(
            life.schema
            for life in reversed(delta.schemas)
            if life.schema.table_id == table.table_id and life.first_snapshot <= at
        )
        paths = [str(self.store.local_path(file.object_key)) for file in files]
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
            scan = scan_expression(schema, paths, hidden=True)
            connection.execute(f"CREATE TEMP TABLE t AS SELECT * FROM {scan}")
            return [connection.execute(sql).fetchall() for sql in queries]


def memory_lake(
    folder: Path, *, settings: MaintenanceSettings = SETTINGS, store: ObjectStore | None = None
) -> tuple[Lake, MemoryLake]:
    """A stack in memory whose database clock stands at NOW."""

    clock = ManualClock(NOW)
    memory = MemoryLake(settings=BusSettings(shards=2), clock=clock, seed=1)
    lake = Lake(
        bus=MemoryBus(memory),
        catalog=MemoryCatalog(memory),
        upkeep=MemoryUpkeep(memory),
        folder=folder,
        store=store,
        settings=settings,
    )
    return lake, memory


def job_of(kind: JobKind, parameters: Mapping[str, Any], *, dry_run: bool = False) -> Job:
    return Job(
        job_id=new_uuid(),
        kind=kind,
        table_id=None,
        parameters=parameters,
        dry_run=dry_run,
        requested_by="test",
        state=JobState.RUNNING,
        attempt=1,
        created_at=NOW,
    )


class Overlay:
    """An object with some of its methods replaced: what one worker sees of a shared thing."""

    def __init__(self, under: Any, **replaced: Any) -> None:
        self._under, self._replaced = under, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._under, name)


def _plain(time: dt.datetime | None) -> dt.datetime | None:
    return None if time is None else time.astimezone(dt.UTC).replace(tzinfo=None)


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(repr(list(ids)).encode() + uuid.uuid4().bytes).digest()


async def filled(lake: Lake, files: int = 10, **layout: Any) -> TableSchema:
    table = await lake.create(**layout)
    for number in range(files):
        await lake.write(table, range(number * 10, number * 10 + 10))
    return table


@asynccontextmanager
async def at_publish(action: Any, *, times: int | None = 1) -> AsyncIterator[None]:
    """Runs something between a rewrite and its publish."""

    with Failpoints() as points:
        points.arm("swapping.before_publish", Run(action), times=times)
        yield


class Impatient(ManualClock):
    """Waits pass at once."""

    async def sleep_s(self, seconds: float) -> None:
        self.advance_s(seconds)
