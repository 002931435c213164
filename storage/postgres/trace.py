"""The life of one entry, read from the tables that keep it (see `storage.bus.trace`)."""

from __future__ import annotations

import asyncpg

from storage.bus.receipting import parse_batch_id
from storage.bus.trace import (
    Trace,
    TracedEntry,
    TracedFile,
    TracedLease,
    TracedPublication,
    TracedQuarantine,
)
from storage.postgres.failures import reading
from storage.postgres.pool import Pool

_SEVERAL_TABLES = "*"

_ENTRY = """
SELECT l.lo, l.hi, l.history_serial, l.accepted_at, l.expires_at, l.table_ids,
       l.principals[e.place] AS principal_id, l.targets[e.place] AS target,
       l.row_counts[e.place] AS rows, l.reject_counts[e.place] AS rows_rejected,
       l.entry_bytes[e.place] AS size_bytes,
       h.watermark[$1 + 1] AS watermark, h.snapshot_id AS head_snapshot_id
  FROM bus_log l CROSS JOIN LATERAL (SELECT ($2 - l.lo + 1)::integer AS place) e CROSS JOIN lake h
 WHERE l.shard = $1 AND l.hi > $2
   AND l.lo = (SELECT f.lo FROM bus_log f WHERE f.shard = $1 AND f.lo <= $2
                ORDER BY f.lo DESC LIMIT 1)"""
_LEASE = """
SELECT b.epoch, b.state, b.lo, b.hi, b.owner, b.claimed_at, b.expires_at, b.attempt, b.last_error
  FROM bus_lease b WHERE b.shard = $1 AND b.lo <= $2 AND b.hi > $2 LIMIT 1"""
_PUBLISHED = """
SELECT r.lo, r.hi, r.commit_id, r.owner, r.snapshot_id, r.published_at,
       s.snapshot_id IS NOT NULL AND s.expired_at IS NULL AS readable
  FROM published_range r LEFT JOIN snapshot s USING (snapshot_id)
 WHERE r.shard = $1 AND r.hi > $2
   AND r.lo = (SELECT f.lo FROM published_range f WHERE f.shard = $1 AND f.lo <= $2
                ORDER BY f.lo DESC LIMIT 1)"""
_FILES = """
SELECT t.name AS table, f.file_id, f.rows, f.size_bytes, f.last_snapshot AS last_snapshot_id
  FROM data_file f JOIN lake_table t USING (table_id)
 WHERE f.first_snapshot = $1 AND f.table_id = ANY ($2) ORDER BY t.name, f.file_id"""
_QUARANTINE = """
SELECT q.quarantine_id, q.kind, q.rows, q.reason, q.attempts, q.created_at, q.successor_batch_id
  FROM bus_quarantine q
 WHERE q.shard = $1 AND q.position = $2 AND q.history_serial = $3 ORDER BY q.quarantine_id"""


class PostgresTraces:
    """See `storage.bus.trace.Traces`."""

    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def trace(self, batch_id: str) -> Trace | None:
        place = parse_batch_id(batch_id)
        if place is None or place[1] >= 2**31:
            return None
        history_serial, shard, position = place
        async with self._pool.connection() as connection:
            with reading():
                entry = await connection.fetchrow(_ENTRY, shard, position)
                if entry is None or entry["history_serial"] != history_serial:
                    return None
                lease = await connection.fetchrow(_LEASE, shard, position)
                published = await connection.fetchrow(_PUBLISHED, shard, position)
                set_aside = await connection.fetch(_QUARANTINE, shard, position, history_serial)
                files: list[asyncpg.Record] = []
                if published is not None and not any(row["kind"] == "entry" for row in set_aside):
                    files = await connection.fetch(
                        _FILES, published["snapshot_id"], entry["table_ids"]
                    )
        return Trace(
            batch_id=batch_id,
            shard=shard,
            position=position,
            watermark=entry["watermark"],
            head_snapshot_id=entry["head_snapshot_id"],
            entry=TracedEntry(
                principal_id=entry["principal_id"],
                target=entry["target"],
                rows=entry["rows"],
                rows_rejected=entry["rows_rejected"],
                size_bytes=entry["size_bytes"],
                lo=entry["lo"],
                hi=entry["hi"],
                accepted_at=entry["accepted_at"],
                idempotency_expires_at=entry["expires_at"],
            ),
            lease=None if lease is None else TracedLease(**dict(lease)),
            publication=None if published is None else TracedPublication(**dict(published)),
            files=_own(entry["target"], [TracedFile(**dict(row)) for row in files]),
            quarantine=tuple(TracedQuarantine(**dict(row)) for row in set_aside),
        )


def _own(target: str, files: list[TracedFile]) -> tuple[TracedFile, ...]:
    """A group commit may hold entries of other tables too. A table that was renamed since keeps all
    of them: better one file too many than none."""

    own = [file for file in files if file.table == target]
    return tuple(own if own and target != _SEVERAL_TABLES else files)
