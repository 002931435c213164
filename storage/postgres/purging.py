"""Purging the bus: rotate what is full, empty what is terminal, trim what is old (B10).

Each step is one call in a transaction of its own; the functions carry a lock timeout of 50 ms.
Giving up is a normal outcome: a lock held by a backup or a report delays purging, never ingest.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence

import asyncpg

from storage.bus.interface import EmptiedBus, PurgeReport
from storage.bus.settings import BusSettings
from storage.files.objects import ObjectStore
from storage.names import KEY_RING, SEGMENT_RING
from storage.postgres.failures import reading
from storage.postgres.pool import Pool

LOG_ROWS_A_STEP = 2_000
_FORGET_PAYLOADS = "SELECT * FROM forget_payloads($1)"
#: Those that wait for their window: of terminal entries, which the log does not name any more.
_HURRY_PAYLOADS = """
UPDATE condemned_file c SET state = 'deleting' WHERE c.reason = 'payload' AND c.state = 'condemned'
   AND NOT EXISTS (SELECT 1 FROM bus_log l WHERE l.payload_key = c.object_key)
RETURNING c.object_key"""
#: Segments whose log row was trimmed count too: nobody knows whose they were.
_BYTES_LEFT = """
SELECT coalesce(sum(octet_length(s.payload)), 0) FROM bus_segment s
  LEFT JOIN bus_log l USING (segment_id)
 WHERE l.segment_id IS NULL OR l.lo < ($1::bigint[])[l.shard + 1]"""
_NOTE_DELETED = """
UPDATE condemned_file SET state = 'deleted', deleted_at = clock_timestamp()
 WHERE object_key = ANY ($1) AND reason = 'payload' AND state = 'deleting'"""


class _Steps:
    """Runs the steps and remembers whether one gave up on a lock."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.gave_up_on_lock = False

    async def call(self, statement: str, *arguments: object) -> asyncpg.Record | None:
        async with self._pool.connection() as connection:
            with reading():  # repeating a step is safe: it looks at the state again
                try:
                    return await connection.fetchrow(statement, *arguments)
                except asyncpg.LockNotAvailableError:
                    self.gave_up_on_lock = True
                    return None

    async def truth(self, statement: str, *arguments: object) -> bool:
        row = await self.call(statement, *arguments)
        return row is not None and bool(row[0])


async def empty(
    pool: Pool, positions: Mapping[int, int], *, object_store: ObjectStore | None
) -> EmptiedBus:
    """What is stored of terminal entries below these positions goes, however young it is."""

    steps = _Steps(pool)
    ends = [positions[shard] for shard in sorted(positions)]
    async with pool.connection() as connection:
        with reading():
            keys = [row[0] for row in await connection.fetch(_FORGET_PAYLOADS, ends)]
            keys += [row[0] for row in await connection.fetch(_HURRY_PAYLOADS)]
    # failpoint: emptying.after_payloads
    if object_store is not None and keys:
        for key in keys:
            await object_store.delete(key)
        await steps.call(_NOTE_DELETED, keys)
    for ring in range(SEGMENT_RING):
        await steps.truth("SELECT truncate_segments($1)", ring)
    left = await _bytes_left(pool, ends)
    if left and await steps.truth("SELECT leave_segments()"):
        # failpoint: emptying.after_leaving
        for ring in range(SEGMENT_RING):
            await steps.truth("SELECT truncate_segments($1)", ring)
        left = await _bytes_left(pool, ends)
    return EmptiedBus(len(keys), left)


async def _bytes_left(pool: Pool, ends: Sequence[int]) -> int:
    async with pool.connection() as connection:
        with reading():
            return int(await connection.fetchval(_BYTES_LEFT, ends))


async def purge(
    pool: Pool, *, settings: BusSettings, object_store: ObjectStore | None
) -> PurgeReport:
    """One pass over rings, key generations and the log."""

    window = dt.timedelta(seconds=settings.idempotency_window_s)
    steps = _Steps(pool)
    segments = [
        await steps.truth("SELECT truncate_segments($1)", ring) for ring in range(SEGMENT_RING)
    ]
    await steps.truth(
        "SELECT rotate_segments($1, $2)",
        settings.segment_ring_rotate_bytes,
        dt.timedelta(seconds=settings.segment_ring_rotate_age_s),
    )
    keys = [
        await steps.truth("SELECT truncate_keys($1, $2)", ring, window) for ring in range(KEY_RING)
    ]
    await steps.truth("SELECT rotate_keys($1)", window)
    trimmed = await steps.call("SELECT * FROM trim_log($1, $2)", window, LOG_ROWS_A_STEP)
    payload_keys = list(trimmed["payload_keys"]) if trimmed is not None else []
    # failpoint: purging.after_trim
    if object_store is not None and payload_keys:
        # The rows are gone first: a crash in between leaves objects that only their record names,
        # which the next collection deletes, and never a log row without its object.
        for key in payload_keys:
            await object_store.delete(key)
        # failpoint: purging.after_objects
        await steps.call(_NOTE_DELETED, payload_keys)
    return PurgeReport(
        segments_truncated=sum(segments),
        key_generations_truncated=sum(keys),
        log_rows_deleted=trimmed["rows_deleted"] if trimmed is not None else 0,
        objects_deleted=len(payload_keys) if object_store is not None else 0,
        gave_up_on_lock=steps.gave_up_on_lock,
    )
