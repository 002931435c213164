"""SQL over a backend: real Parquet files, the engine, and the read path of one process."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from lakebus.clock import new_uuid
from lakebus.snapshots import DataFile
from lakebus.tokens import TokenCodec
from storage.catalog.interface import Commit, Published
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.files.parquet import encode_data_file
from storage.reading.barrier import Barrier
from storage.reading.changes import ChangeReader
from storage.reading.holds import Pins
from storage.reading.manifest import Manifest
from storage.reading.planning import Planner
from storage.reading.query import Engine, QueryAnswer, QueryLimits, QueryRequest, QueryService
from storage.reading.resolve import Resolver
from storage.reading.watcher import HeadWatcher
from tests.conformance.harness import LakeHarness, LakeView
from tests.conformance.worker import ReadEntry


class FileWriter:
    """Publishes what the bus holds as real Parquet files below `root`."""

    def __init__(self, lake: LakeHarness, root: Path) -> None:
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


class Replica:
    """The read path of one process over a lake."""

    def __init__(
        self,
        lake: LakeView | LakeHarness,
        *,
        codec: TokenCodec,
        engine: Engine,
        store: LocalObjectStore,
        limits: QueryLimits | None = None,
        pins: Pins | None = None,
    ) -> None:
        self.manifest = Manifest(lake.catalog)
        self.watcher = HeadWatcher(lake.catalog, poll_s=0.02, on_head=self.manifest.prefetch)
        self.barrier = Barrier(
            catalog=lake.catalog, bus=lake.bus, watcher=self.watcher, codec=codec
        )
        self.resolver = Resolver(catalog=lake.catalog, barrier=self.barrier)
        planner = Planner(store)
        self.changes = ChangeReader(
            catalog=lake.catalog,
            resolver=self.resolver,
            manifest=self.manifest,
            planner=planner,
            engine=engine,
            pins=pins,
            ranges_max=3,
        )
        self.service = QueryService(
            resolver=self.resolver,
            manifest=self.manifest,
            planner=planner,
            engine=engine,
            codec=codec,
            pins=pins,
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


@dataclasses.dataclass(frozen=True, slots=True)
class SqlStack:
    """A lake, who publishes its files, and one process that answers SQL."""

    lake: LakeHarness
    writer: FileWriter
    replica: Replica
    engine: QueryEngine

    async def ask(
        self, sql: str, *, visible: Callable[[str], bool] = everything, **request: Any
    ) -> tuple[list[list[Any]], QueryAnswer]:
        answer = await self.replica.service.query(QueryRequest(sql, **request), visible)
        try:
            return json.loads(await answer.read_all()), answer
        finally:
            await answer.aclose()

    async def rows(self, sql: str, **request: Any) -> list[list[Any]]:
        return (await self.ask(sql, integers="number", **request))[0]


@asynccontextmanager
async def sql_stack(
    lake: LakeHarness, folder: Path, *, limits: QueryLimits | None = None
) -> AsyncIterator[SqlStack]:
    """`folder` is empty and gets the files. One thread and no spare: tests are many."""

    objects = folder / "objects"
    objects.mkdir()
    writer = FileWriter(lake, objects)
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(objects),
            temp_directory=str(folder / "temporary"),
            spare=False,
            threads=1,
        )
    )
    await engine.start()
    try:
        codec = TokenCodec((await lake.catalog.identity()).token_secret)
        async with Replica(
            lake, codec=codec, engine=engine, store=writer.store, limits=limits
        ) as replica:
            yield SqlStack(lake, writer, replica, engine)
    finally:
        await engine.stop()
