"""The part of an erasure that looks at quarantine: entries and reject sets accepted before it (E7).

An entry is decoded, and the predicate is asked about its rows in the cage, as about files. When a
row matches, or the bytes cannot be decoded, all its bytes go: a quarantined entry is one thing, and
what is left of a broken one cannot be judged. Reject sets hold rows that do not fit the table, so
the predicate has no meaning for them: they always go. What stays is a stub with the batch's id, so
that its sender learns what became of it; the reason goes too, because it may quote a value.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from lakebus.errors import Corrupt
from lakebus.schemas import POSITION_COLUMN, ROW_COLUMN, SHARD_COLUMN, TableSchema
from lakebus.snapshots import DataFile
from storage.bus.interface import QuarantineItem
from storage.files.objects import LocalObjectStore
from storage.files.parquet import encode_data_file
from storage.maintenance.cages import caged_engine
from storage.maintenance.jobs import JobContext
from storage.maintenance.matching import BATCH_S, Matcher
from storage.maintenance.patience import patiently
from storage.reading.predicates import RowPredicate
from storage.rows.segment import decode_single_entry

_PAGE: Final = 100
_FOLDER: Final = "quarantine"


class QuarantineErasure:
    def __init__(
        self,
        context: JobContext,
        table_id: int,
        ends: Mapping[int, int],
        erasure_id: str,
        *,
        dry_run: bool,
    ) -> None:
        self._context, self._table_id, self._ends = context, table_id, ends
        self._reason = f"the rows were erased by erasure {erasure_id}"
        self._dry_run = dry_run
        self._erased: list[int] = []
        self._looked_at = 0

    async def run(
        self,
        schema: TableSchema,
        predicate: RowPredicate,
        parameters: Any,
        now: dt.datetime,
        folder: Path,
    ) -> dict[str, Any]:
        """What the report tells. `folder` is where the caged engine may read."""

        entries: list[DataFile] = []
        items: dict[uuid.UUID, int] = {}
        store = LocalObjectStore(folder / _FOLDER)
        try:
            async for item in self._items():
                self._looked_at += 1
                files = await self._written(item, store)
                if files is None:
                    await self._erase(item.quarantine_id)
                    continue
                entries += files
                items |= {file.file_id: item.quarantine_id for file in files}
            if entries:
                async with caged_engine(self._context, own_files=True) as engine:
                    matcher = Matcher(
                        engine=engine,
                        store=store,
                        schema=schema,
                        predicate=predicate,
                        parameters=parameters,
                        now=now,
                        folder=folder,
                    )
                    for batch in matcher.batches(entries):
                        for one in await matcher.match(batch, deadline_s=BATCH_S):
                            if one.rows:
                                await self._erase(items[one.file.file_id])
        finally:
            store.close()
        return {"quarantine_looked_at": self._looked_at, "quarantine_erased": len(self._erased)}

    async def _items(self) -> AsyncIterator[QuarantineItem]:
        """Those of the table that were accepted before and still have bytes."""

        before: int | None = None
        while True:
            call = partial(self._context.bus.quarantine_items, limit=_PAGE, before=before)
            page = await patiently(self._context, call)
            for item in page:
                accepted_before = item.position < self._ends.get(item.shard, 0)
                if self._table_id in item.table_ids and accepted_before and item.payload:
                    yield item
            if len(page) < _PAGE:
                return
            before = page[-1].quarantine_id

    async def _written(
        self, item: QuarantineItem, store: LocalObjectStore
    ) -> list[DataFile] | None:
        """The entry's rows of the table as files; None when they cannot be judged."""

        if item.kind != "entry":
            return None
        try:
            parts = decode_single_entry(item.payload)
        except Corrupt:
            return None
        files = []
        for part in parts:
            if part.table_id != self._table_id:
                continue
            schema_version = self._context.catalog.schema_version
            call = partial(schema_version, part.table_id, part.schema_version)
            schema = await patiently(self._context, call)
            if schema is None:
                return None
            try:
                encoded = encode_data_file(schema, _with_places(part.batch, item))
            except (ValueError, pa.ArrowException):
                return None  # whatever it was quarantined for
            file_id = uuid.uuid4()
            await store.put_new(f"{file_id}.parquet", encoded.data)
            files.append(
                DataFile(
                    file_id=file_id,
                    table_id=part.table_id,
                    schema_version=part.schema_version,
                    object_key=f"{file_id}.parquet",
                    rows=encoded.rows,
                    size_bytes=encoded.size_bytes,
                    sha256=encoded.sha256,
                    statistics={},
                )
            )
        return files

    async def _erase(self, quarantine_id: int) -> None:
        if quarantine_id in self._erased:
            return
        if not self._dry_run:
            await patiently(
                self._context,
                lambda: self._context.bus.erase_quarantined(quarantine_id, reason=self._reason),
            )
            # failpoint: erasure.after_quarantined
        self._erased.append(quarantine_id)


def _with_places(batch: pa.RecordBatch, item: QuarantineItem) -> pa.RecordBatch:
    rows = batch.num_rows
    return pa.record_batch(
        {
            **dict(zip(batch.schema.names, batch.columns, strict=True)),
            SHARD_COLUMN: pa.array([item.shard] * rows, pa.int16()),
            POSITION_COLUMN: pa.array([item.position] * rows, pa.int64()),
            ROW_COLUMN: pa.array(range(rows), pa.int32()),
        }
    )
