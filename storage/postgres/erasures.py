"""Erasures in PostgreSQL. See `storage.maintenance.erasing.Erasing` for what is promised, and
`storage/sql/functions/erasure.sql` for why it is safe."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from lakebus.snapshots import DataFile
from storage.catalog.interface import Erased
from storage.files.objects import ObjectStore
from storage.maintenance.erasing import Replacement, Stray
from storage.maintenance.erasure_records import read_records
from storage.maintenance.interface import CondemnedFile
from storage.postgres.failures import reading, writing
from storage.postgres.file_rows import ERASED, FILE_COLUMNS, data_file, file_proposal
from storage.postgres.pool import Pool
from storage.postgres.rewind import HistoryGuard

_FAR = 2**63 - 1
_FILES = f"SELECT {FILE_COLUMNS} FROM data_file WHERE table_id = $1 ORDER BY file_id"
_STRAYS = """
SELECT w.file_id, format('tables/%s/%s.parquet', w.table_id, w.file_id) AS object_key
  FROM write_intent w WHERE w.kind = 'data' AND w.table_id = $1
UNION
SELECT c.file_id, c.object_key FROM condemned_file c
 WHERE c.table_id = $1 AND c.state <> 'deleted'
   AND c.reason <> 'erased'
   AND NOT EXISTS (SELECT 1 FROM data_file f WHERE f.file_id = c.file_id)"""
_DOOMED = """
SELECT * FROM condemned_file
 WHERE state = 'deleting' AND reason = 'erased' AND table_id = $1 ORDER BY file_id"""


class PostgresErasing:
    def __init__(self, *, pool: Pool, scans: Pool, guard: HistoryGuard) -> None:
        self._pool = pool
        self._scans = scans
        self._guard = guard

    async def begin(self, erasure_id: uuid.UUID, table_id: int) -> None:
        await self._write("SELECT begin_erasure($1, $2)", erasure_id, table_id)

    async def files(self, table_id: int) -> Sequence[DataFile]:
        return [data_file(row, _FAR) for row in await self._scan(_FILES, table_id)]

    async def strays(self, table_id: int) -> Sequence[Stray]:
        return [Stray(*row) for row in await self._scan(_STRAYS, table_id)]

    async def replace(
        self, erasure_id: uuid.UUID, table_id: int, replacements: Sequence[Replacement]
    ) -> Sequence[uuid.UUID]:
        proposals = [
            {
                "old": str(one.old),
                "rows": one.rows,
                "file": None if one.file is None else file_proposal(one.file),
                "adopted": one.adopted,
            }
            for one in replacements
        ]
        done: Sequence[uuid.UUID] = await self._write(
            "SELECT replace_files($1, $2, $3)", erasure_id, table_id, proposals
        )
        return done

    async def erase_strays(self, table_id: int, file_ids: Sequence[uuid.UUID]) -> None:
        await self._write("SELECT erase_strays($1, $2)", table_id, list(file_ids))

    async def doomed(self, table_id: int) -> Sequence[CondemnedFile]:
        return [CondemnedFile(**dict(row)) for row in await self._scan(_DOOMED, table_id)]

    async def finish(
        self,
        erasure_id: uuid.UUID,
        table_id: int,
        publication_id: uuid.UUID,
        summary: Mapping[str, Any],
    ) -> int:
        snapshot_id: int = await self._write(
            "SELECT finish_erasure($1, $2, $3, $4)",
            erasure_id,
            table_id,
            publication_id,
            dict(summary),
        )
        self._guard.changed()
        return snapshot_id

    async def erased(self, erasure_id: uuid.UUID | None = None) -> Sequence[Erased]:
        return [Erased(*row) for row in await self._scan(ERASED, erasure_id)]

    async def _write(self, statement: str, *arguments: object) -> Any:
        async with self._pool.connection() as connection:
            with writing():
                return await connection.fetchval(statement, *arguments)

    async def _scan(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        async with self._scans.connection() as connection:
            with reading():
                return list(await connection.fetch(statement, *arguments))


async def compare_erasures(pool: Pool, *, store: ObjectStore | None) -> None:
    """In a new line of history: what the store's records tell and the catalog does not know is owed
    from now on. Once for each line; whoever comes second changes nothing."""

    async with pool.connection() as connection:
        with reading():
            serial = await connection.fetchval(
                "SELECT history_serial FROM lake WHERE erasures_serial <> history_serial"
            )
    if serial is None:
        return
    records = [] if store is None else await read_records(store)
    async with pool.connection() as connection:
        with reading():  # repeating it is safe: it looks at the serial again
            await connection.fetchval("SELECT owe_erasures($1, $2)", serial, records)
