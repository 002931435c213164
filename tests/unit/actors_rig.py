"""A lake in memory with roles over it, as the tests of the actors use it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.backend import Backend
from actors.coordinator import CommitCoordinator
from actors.hints import MemoryHintDirectory
from actors.lease_manager import LeaseManager, Leases
from actors.publisher import Publisher, SnapshotPublisher
from actors.range_files import EncodeFile
from actors.role_host import RoleHost
from actors.settings import RoleSettings
from actors.staging import Stager
from lakebus.clock import Clock, SystemClock, new_uuid
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from lakebus.telemetry import NO_TRACING, MemoryMetrics
from storage.bus.interface import Accepted, NewEntry
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.files.objects import MemoryObjectStore, ObjectStore
from storage.files.parquet import EncodedFile, encode_data_file
from storage.memory_clock import ManualClock
from storage.memory_lake import MemoryLake
from storage.rows.segment import EntryPart

#: (table id, id, shard, position, row)
StoredRow = tuple[int, int, int, int, int]

ROLE_SETTINGS = RoleSettings(
    claim_poll_ms=20,
    linger_ms=5,
    backoff_ms=1,
    backoff_ms_max=4,
    publish_attempts=4,
)


class Deaths:
    """Stands in for the end of the process."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, BaseException]] = []

    def __call__(self, role: str, error: BaseException) -> None:
        self.seen.append((role, error))


class Rig:
    """One lake, its clock, and makers of roles. Roles made by several calls share nothing but the
    lake, as processes would."""

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        roles: RoleSettings = ROLE_SETTINGS,
        **bus_settings: Any,
    ) -> None:
        self.clock = clock or ManualClock()
        self.settings = roles
        settings = BusSettings(**{"shards": 2, "retry_backoff_ms": 0, **bus_settings})
        self.lake = MemoryLake(settings=settings, clock=self.clock, seed=1)
        self.bus = MemoryBus(self.lake)
        self.catalog = MemoryCatalog(self.lake)
        self.upkeep = MemoryUpkeep(self.lake)
        self.store = MemoryObjectStore()
        self.metrics = MemoryMetrics()
        self.hints = MemoryHintDirectory()
        self.deaths = Deaths()

    @property
    def backend(self) -> Backend:
        return Backend(
            bus=self.bus,
            catalog=self.catalog,
            store=self.store,
            hints=self.hints,
            stack="rig",
            settings=self.settings,
        )

    async def create(self, name: str = "events", *partition_by: str) -> TableSchema:
        columns = [Column(0, "id", "bigint"), Column(0, "note", "varchar")]
        change = await self.catalog.create_table(
            name=name, columns=columns, partition_by=partition_by
        )
        return change.schema

    async def append(
        self, *parts: tuple[TableSchema, Sequence[int]], key: str | None = None, ordering: str = ""
    ) -> Accepted:
        outcome = await self.bus.append(new_entry(parts, key=key, ordering=ordering))
        assert isinstance(outcome, Accepted)
        return outcome

    # --- roles ------------------------------------------------------------------------------

    def lease_manager(self) -> LeaseManager:
        return LeaseManager(bus=self.bus, metrics=self.metrics)

    def publisher(self, catalog: Any = None) -> SnapshotPublisher:
        return SnapshotPublisher(
            catalog=catalog or self.catalog,
            settings=self.settings,
            clock=self.clock,
            metrics=self.metrics,
            tracing=NO_TRACING,
            on_fatal=self.deaths,
        )

    def coordinator(
        self,
        *,
        publisher: Publisher,
        leases: Leases | None = None,
        store: Any = None,
        encode: EncodeFile = encode_data_file,
        intents: Any = None,
    ) -> CommitCoordinator:
        stager = Stager(
            catalog=self.catalog,
            store=store or self.store,
            encode=encode,
            settings=self.settings,
            clock=self.clock,
            metrics=self.metrics,
            intents=intents or self.upkeep,
        )
        return CommitCoordinator(
            instance=new_uuid(),
            leases=leases or self.lease_manager(),
            bus=self.bus,
            stager=stager,
            publisher=publisher,
            settings=self.settings,
            clock=self.clock,
            metrics=self.metrics,
            tracing=NO_TRACING,
            on_fatal=self.deaths,
        )

    # --- what readers would see ---------------------------------------------------------------

    async def files(self) -> list[DataFile]:
        head = await self.catalog.head()
        delta = await self.catalog.manifest_delta(after=0, until=head.snapshot_id)
        return [file for file in delta.files if file.last_snapshot is None]

    async def rows(self) -> list[StoredRow]:
        found: list[StoredRow] = []
        for file in await self.files():
            data = await self.store.get(file.object_key)
            assert file.size_bytes == len(data)
            assert file.sha256 == hashlib.sha256(data).hexdigest()
            table = pq.read_table(io.BytesIO(data))
            assert file.rows == table.num_rows
            columns = [table[name].to_pylist() for name in ("id", "$shard", "$position", "$row")]
            found += [(file.table_id, *row) for row in zip(*columns, strict=True)]
        return sorted(found, key=lambda row: row[2:] + row[:1])

    async def ids(self) -> Counter[int]:
        return Counter(row[1] for row in await self.rows())

    async def drained(self) -> bool:
        return all(s.watermark == s.end for s in await self.bus.shard_status())


@asynccontextmanager
async def publishing(lake: MemoryLake, store: ObjectStore) -> AsyncIterator[None]:
    """The roles that turn what is on the bus into files and snapshots, by the real clock; nobody
    runs jobs."""

    deaths = Deaths()
    roles = RoleHost(
        backend=Backend(
            bus=MemoryBus(lake),
            catalog=MemoryCatalog(lake),
            store=store,
            hints=MemoryHintDirectory(),
            stack="test",
            settings=ROLE_SETTINGS,
            upkeep=MemoryUpkeep(lake),
        ),
        on_fatal=deaths,
        clock=SystemClock(),
        metrics=MemoryMetrics(),
    )
    await roles.start()
    try:
        yield
    finally:
        await roles.stop()
    assert deaths.seen == []


def new_entry(
    parts: Sequence[tuple[TableSchema, Sequence[int]]], *, key: str | None, ordering: str
) -> NewEntry:
    digest = hashlib.sha256(repr([(s.table_id, list(i)) for s, i in parts]).encode()).digest()
    return NewEntry(
        principal_id=1,
        target=parts[0][0].name if len(parts) == 1 else "*",
        parts=tuple(
            EntryPart(schema.table_id, schema.version, batch_of(schema, ids))
            for schema, ids in parts
        ),
        fingerprint=digest,
        idempotency_key=key,
        ordering_key=ordering or None,
    )


def batch_of(schema: TableSchema, ids: Sequence[int]) -> pa.RecordBatch:
    values = {
        "id": pa.array(ids, pa.int64()),
        "note": pa.array([f"note {i}" for i in ids], pa.string()),
    }
    columns = [c for c in schema.columns if c.name in values]
    return pa.RecordBatch.from_arrays(
        [values[c.name] for c in columns], names=[str(c.column_id) for c in columns]
    )


def failing_encoder(
    is_bad: Callable[[list[int]], Exception | None],
) -> Callable[[TableSchema, pa.Table], EncodedFile]:
    """The encoder, but it raises what `is_bad` gives for the ids of a file."""

    def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
        if schema.name != "canary" and (error := is_bad(rows.column(0).to_pylist())) is not None:
            raise error
        return encode_data_file(schema, rows)

    return encode


class Overlay:
    """An object with some of its methods replaced: how one process's view gets a fault."""

    def __init__(self, under: Any, **replaced: Any) -> None:
        self._under = under
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._under, name)


def with_settings(settings: RoleSettings, **changes: Any) -> RoleSettings:
    return dataclasses.replace(settings, **changes)


def random_owner() -> uuid.UUID:
    return new_uuid()
