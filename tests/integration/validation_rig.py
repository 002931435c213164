"""A lake with real Parquet files, the validator over it, and ways to break both."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pyarrow as pa
import pyarrow.parquet as pq

from actors.staging import Stager
from lakebus.clock import SYSTEM_CHANCE, SystemClock, new_uuid
from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from lakebus.snapshots import DataFile
from lakebus.telemetry import MemoryMetrics
from storage.bus.interface import Claim, IngestBus
from storage.bus.memory import MemoryBus
from storage.catalog.interface import Catalog, Commit, CommitOutcome
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_inspection import MemoryInspection
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore, MemoryObjectStore, ObjectStore
from storage.files.parquet import encode_data_file
from storage.maintenance.inspection import Inspection
from storage.maintenance.interface import Swap, SwapOperation, SwapOutcome, Upkeep
from storage.maintenance.jobs import Job, JobContext, JobKind, JobState
from storage.maintenance.settings import MaintenanceSettings
from storage.maintenance.validation import validate
from storage.memory_lake import MemoryLake
from storage.postgres.lake import PostgresLake
from storage.postgres.rewind import GuardSettings
from tests.conformance.harness import COLUMNS, SUITE_SETTINGS, entry_of
from tests.unit.actors_rig import ROLE_SETTINGS

LAKE_SETTINGS = dataclasses.replace(SUITE_SETTINGS, shards=2, lease_ttl_ms=60_000)


@dataclasses.dataclass
class ValidatedLake:
    """`sql` is an operator at the database's prompt; the in-memory lake has none."""

    bus: IngestBus
    catalog: Catalog
    upkeep: Upkeep
    inspection: Inspection
    store: ObjectStore
    folder: Path
    sql: asyncpg.Connection[asyncpg.Record] | None = None
    postgres: PostgresLake | None = None
    memory: MemoryLake | None = None
    dsn: str = ""
    metrics: MemoryMetrics = dataclasses.field(default_factory=MemoryMetrics)
    ids: int = 0

    def __post_init__(self) -> None:
        self.owner = new_uuid()
        self.stager = Stager(
            catalog=self.catalog,
            store=self.store,
            encode=encode_data_file,
            settings=ROLE_SETTINGS,
            clock=SystemClock(),
            metrics=self.metrics,
        )

    # --- a lake's life ------------------------------------------------------------------------

    async def create(self, name: str = "t") -> TableSchema:
        return (await self.catalog.create_table(name=name, columns=COLUMNS)).schema

    async def append(self, table: TableSchema, count: int = 3, rows: int = 4) -> None:
        """Entries of so many rows each, as one group on one shard: not published yet."""

        entries = []
        for _ in range(count):
            ids = list(range(self.ids, self.ids + rows))
            self.ids += rows
            entries.append(entry_of(table, ids, note=f"note {ids[0]:08}", ordering_key="one"))
        await asyncio.gather(*(self.bus.append(entry) for entry in entries))

    async def publish(self) -> None:
        """Everything that waits, by real staging."""

        while (claim := await self.bus.claim(self.owner)) is not None:
            await self.publish_claim(claim)

    async def publish_claim(self, claim: Claim) -> None:
        staged = await self.stager.stage(claim, await self.bus.read(claim))
        commit = Commit(
            commit_id=new_uuid(),
            lease=claim.lease,
            files=staged.files,
            range_bytes=staged.range_bytes,
            owner=self.owner,
            quarantined=staged.quarantined,
        )
        published = await self.catalog.publish(new_uuid(), [commit])
        assert published.outcomes[commit.commit_id] is CommitOutcome.PUBLISHED

    async def write(self, table: TableSchema, count: int = 3, rows: int = 4) -> DataFile:
        """Appends and publishes; answers the newest file."""

        await self.append(table, count, rows)
        await self.publish()
        return (await self.upkeep.live_files(table.table_id))[-1]

    async def rows_of(self, file: DataFile) -> pa.Table:
        """Columns by id, and the hidden ones."""

        found = pq.read_table(io.BytesIO(await self.store.get(file.object_key)))
        names = {"id": "1", "note": "2"}
        return found.rename_columns([names.get(name, name) for name in found.column_names])

    async def put_file(
        self, table: TableSchema, rows: pa.Table, file_id: uuid.UUID | None = None
    ) -> DataFile:
        """A real object, and the catalog's row that would be true of it."""

        file_id = file_id or new_uuid()
        encoded = encode_data_file(table, rows.select(["1", "2", *HIDDEN_COLUMNS]))
        key = f"tables/{table.table_id}/{file_id}.parquet"
        await self.store.put_new(key, encoded.data)
        return DataFile(
            file_id=file_id,
            table_id=table.table_id,
            schema_version=table.version,
            object_key=key,
            rows=encoded.rows,
            size_bytes=encoded.size_bytes,
            sha256=encoded.sha256,
            statistics=encoded.statistics,
        )

    async def compact(self, table: TableSchema) -> SwapOutcome:
        """All live files into one."""

        inputs = await self.upkeep.live_files(table.table_id)
        rows = pa.concat_tables([await self.rows_of(file) for file in inputs])
        (file_id,) = await self.upkeep.register_intents(
            table.table_id, 1, owner=self.owner, ttl_s=60.0
        )
        output = await self.put_file(table, rows, file_id)
        swap = Swap(
            publication_id=new_uuid(),
            table_id=table.table_id,
            operation=SwapOperation.COMPACT,
            inputs=tuple(file.file_id for file in inputs),
            files=(output,),
        )
        return (await self.upkeep.publish_swap(swap)).outcome

    async def collect(self) -> int:
        """Expires all but the newest snapshot and deletes what nobody needs; answers how many."""

        await self.upkeep.expire_snapshots(keep_s=0.0, keep_count=1, limit=10_000)
        await self.upkeep.condemn(limit=10_000)
        doomed = await self.upkeep.begin_deletes(window_s=0.0, limit=10_000)
        for one in doomed:
            await self.store.delete(one.object_key)
        await self.upkeep.note_deleted([one.file_id for one in doomed])
        return len(doomed)

    # --- the validator ------------------------------------------------------------------------

    async def validate(
        self, *, job_id: uuid.UUID | None = None, **parameters: Any
    ) -> Mapping[str, Any]:
        job = Job(
            job_id=job_id or new_uuid(),
            kind=JobKind.VALIDATE,
            table_id=None,
            parameters=parameters,
            dry_run=False,
            requested_by="test",
            state=JobState.RUNNING,
            attempt=1,
            created_at=SystemClock().utc_now(),
        )
        temp_dir = self.folder / f"job-{new_uuid()}"
        temp_dir.mkdir()

        async def note(report: Mapping[str, Any]) -> None:
            assert report["stage"]

        context = JobContext(
            catalog=self.catalog,
            upkeep=self.upkeep,
            bus=self.bus,
            store=self.store,
            settings=MaintenanceSettings(),
            engine=EngineSettings(allowed_directory="/", temp_directory=str(temp_dir)),
            temp_dir=temp_dir,
            clock=SystemClock(),
            chance=SYSTEM_CHANCE,
            note=note,
            inspection=self.inspection,
            metrics=self.metrics,
        )
        return await validate(context, job)

    async def findings(self, **parameters: Any) -> set[tuple[str, str]]:
        """(code, subject) of all that a validation of everything finds."""

        report = await self.validate(**{"full": True, **parameters})
        return {(one["code"], one["subject"]) for one in report["findings"]}

    # --- breaking it --------------------------------------------------------------------------

    async def execute(self, statement: str, *arguments: object) -> None:
        assert self.sql is not None
        await self.sql.execute(statement, *arguments)

    def path(self, file: DataFile) -> Path:
        path = self.store.local_path(file.object_key)
        assert path is not None
        return path

    def damage(self, file: DataFile, *, at: int) -> None:
        """Turns one byte over, counted from the end where negative."""

        data = bytearray(self.path(file).read_bytes())
        data[at] ^= 0xFF
        self.replace(file, bytes(data))

    def replace(self, file: DataFile, data: bytes) -> None:
        path = self.path(file)
        path.unlink()
        path.write_bytes(data)

    def close(self) -> None:
        self.stager.close()


@asynccontextmanager
async def postgres_lake(dsn: str, folder: Path) -> AsyncIterator[ValidatedLake]:
    store = LocalObjectStore(folder / "objects")
    # What a test does to the catalog or its marker must not be noticed by others while it looks.
    quiet = GuardSettings(marker_s=3_600, check_s=3_600)
    lake = await PostgresLake.open(
        dsn, bus_settings=LAKE_SETTINGS, object_store=store, guard_settings=quiet
    )
    sql = await asyncpg.connect(dsn, server_settings={"search_path": "lakebus"})
    rig = ValidatedLake(
        lake.bus,
        lake.catalog,
        lake.upkeep,
        lake.inspection,
        store,
        folder,
        sql=sql,
        postgres=lake,
        dsn=dsn,
    )
    try:
        yield rig
    finally:
        rig.close()
        sql.terminate()
        await lake.close()
        store.close()


def memory_lake(folder: Path) -> ValidatedLake:
    lake = MemoryLake(settings=LAKE_SETTINGS, seed=1)
    return ValidatedLake(
        MemoryBus(lake),
        MemoryCatalog(lake),
        MemoryUpkeep(lake),
        MemoryInspection(lake),
        MemoryObjectStore(),
        folder,
        memory=lake,
    )
