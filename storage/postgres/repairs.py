"""The changes of `lakebus repair` in PostgreSQL. See `storage.maintenance.inspection.Repairs`.

Each is one statement that looks at its reason once more and writes the audit log with the change;
giving entries up is one call of a server-side function (`storage/sql/functions/give_up.sql`).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from lakebus.clock import new_uuid
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.files.statistics import statistics_to_json
from storage.maintenance.inspection import GivenUp, WaitingPayload
from storage.postgres.failures import writing
from storage.postgres.pool import Pool
from storage.postgres.rewind import HistoryGuard

_AUDIT = """
INSERT INTO audit (at, principal, action, subject, detail)
SELECT clock_timestamp(), $1, $2, $3, to_jsonb(changed) FROM changed RETURNING 1"""
_INTENT = f"""
WITH changed AS (
    DELETE FROM write_intent w WHERE w.file_id = $4
       AND EXISTS (SELECT 1 FROM data_file f WHERE f.file_id = w.file_id)
    RETURNING w.file_id, w.kind, w.owner, w.expires_at)
{_AUDIT}"""
_TAG = f"""
WITH changed AS (
    DELETE FROM tag t WHERE t.name = $4
       AND NOT EXISTS (SELECT 1 FROM snapshot s
                        WHERE s.snapshot_id = t.snapshot_id AND s.expired_at IS NULL)
    RETURNING t.name, t.snapshot_id, t.created_at, t.created_by)
{_AUDIT}"""
_STATISTICS = f"""
WITH before AS (
    SELECT f.file_id, f.statistics FROM data_file f WHERE f.file_id = $4 AND f.sha256 = $5),
changed AS (
    UPDATE data_file f SET statistics = $6 FROM before b WHERE f.file_id = b.file_id
    RETURNING f.file_id, b.statistics AS statistics_before, f.statistics)
{_AUDIT}"""

_GIVE_UP = "SELECT * FROM give_up($1, $2, $3, $4, $5, $6)"


class PostgresRepairs:
    def __init__(self, *, pool: Pool, guard: HistoryGuard) -> None:
        self._pool = pool
        self._guard = guard

    async def drop_intent(self, file_id: uuid.UUID, *, by: str) -> bool:
        return await self._change(_INTENT, by, "repair.leftover_intent", f"file {file_id}", file_id)

    async def drop_tag_without_snapshot(self, name: str, *, by: str) -> bool:
        return await self._change(_TAG, by, "repair.tag_without_snapshot", f"tag {name}", name)

    async def replace_statistics(
        self, file: DataFile, statistics: Mapping[int, ColumnStatistics], *, by: str
    ) -> bool:
        return await self._change(
            _STATISTICS,
            by,
            "repair.statistics_false",
            f"file {file.file_id}",
            file.file_id,
            file.sha256,
            statistics_to_json(statistics),
        )

    async def give_up(self, payload: WaitingPayload, *, reason: str, by: str) -> GivenUp | None:
        async with self._pool.connection() as connection:
            with writing():
                row = await connection.fetchrow(
                    _GIVE_UP, new_uuid(), payload.shard, payload.lo, payload.hi, reason, by
                )
        assert row is not None
        if row["snapshot_id"] is None:
            return None
        self._guard.changed()
        return GivenUp(**row)

    async def note(self, action: str, subject: str, detail: Mapping[str, Any], *, by: str) -> None:
        async with self._pool.connection() as connection:
            with writing():
                await connection.execute(
                    "INSERT INTO audit (at, principal, action, subject, detail)"
                    " VALUES (clock_timestamp(), $1, $2, $3, $4)",
                    by,
                    action,
                    subject,
                    dict(detail),
                )

    async def _change(self, statement: str, *arguments: object) -> bool:
        async with self._pool.connection() as connection:
            with writing():
                return await connection.fetchval(statement, *arguments) is not None
