"""The ingest bus in PostgreSQL: segments under dense positions, claimed in ranges.

What is authoritative: the counters, the log, the leases and the keys, all in the database; this
class holds none of it. Statements that change something are single calls of server-side functions,
whose heads say why each is safe.
"""

from __future__ import annotations

import datetime as dt
import random
import uuid
from collections.abc import Mapping, Sequence

import asyncpg

from lakebus.errors import Corrupt, LeaseLost
from lakebus.tokens import TokenCodec
from storage.bus.interface import (
    Accepted,
    AppendOutcome,
    BatchState,
    BatchStatus,
    Claim,
    ClaimedSegment,
    EmptiedBus,
    KeyRecord,
    LeaseRef,
    NewEntry,
    PurgeReport,
    QuarantineItem,
    ShardStatus,
    TableNumbers,
)
from storage.bus.receipting import make_batch_id, parse_batch_id
from storage.bus.settings import BusSettings
from storage.bus.sharding import ordering_of, shard_of
from storage.files.objects import ObjectStore
from storage.postgres.claim_check import ClaimCheck, PayloadRelease, fetch_payloads
from storage.postgres.claims import CLAIM, claim_of
from storage.postgres.failures import reading, writing
from storage.postgres.group_commit import GroupWriter, key_hash
from storage.postgres.pool import Pool
from storage.postgres.purging import empty, purge
from storage.postgres.receipts import ReceiptMaker
from storage.postgres.rewind import HistoryGuard

# Groups of the log are disjoint and in order, so the one that holds a position is the last to begin
# at it or before: found by its place in the index, never by a search through those below.
_READ = """
SELECT l.lo, l.hi, l.entry_indexes, l.entry_bytes, l.payload_key,
       (SELECT s.payload FROM bus_segment s WHERE s.segment_id = l.segment_id LIMIT 1) AS payload
  FROM bus_log l
 WHERE l.shard = $1 AND l.hi > $2 AND l.lo < $3
   AND l.lo >= coalesce((SELECT f.lo FROM bus_log f WHERE f.shard = $1 AND f.lo <= $2
                          ORDER BY f.lo DESC LIMIT 1), $2)
   AND EXISTS (SELECT 1 FROM bus_lease b
                WHERE b.lease_id = $4 AND b.epoch = $5 AND b.state = 'leased')
 ORDER BY l.lo"""
# Locked in order of id, as `publish` does: else the two could wait for each other.
_RENEW = """
WITH held AS (
    SELECT b.lease_id FROM bus_lease b
      JOIN unnest($1::bigint[], $2::bigint[]) AS r (lease_id, epoch)
        ON b.lease_id = r.lease_id AND b.epoch = r.epoch AND b.state = 'leased'
     ORDER BY b.lease_id FOR UPDATE OF b)
UPDATE bus_lease b
   SET expires_at = clock_timestamp()
       + CASE WHEN b.attempt > 0 THEN $3::interval ELSE $4::interval END
  FROM held h WHERE b.lease_id = h.lease_id
RETURNING b.lease_id, b.epoch"""
_NUMBER_TABLES = """
SELECT nextval('table_number')::integer AS table_id, l.history_serial
  FROM lake l, generate_series(1, $1::integer)"""
_BATCH = """
SELECT l.history_serial, l.principals[($2 - l.lo + 1)::integer] AS principal_id,
       p.snapshot_id, q.reason, q.successor_batch_id
  FROM bus_log l
  LEFT JOIN LATERAL (SELECT r.snapshot_id, r.hi FROM published_range r
                      WHERE r.shard = $1 AND r.lo <= $2
                      ORDER BY r.lo DESC LIMIT 1) p ON p.hi > $2
  LEFT JOIN bus_quarantine q ON q.kind = 'entry' AND q.shard = $1 AND q.position = $2
 WHERE l.shard = $1 AND l.hi > $2
   AND l.lo = (SELECT f.lo FROM bus_log f WHERE f.shard = $1 AND f.lo <= $2
                ORDER BY f.lo DESC LIMIT 1)"""
_QUARANTINED_OF = """
SELECT q.history_serial, q.shard, q.position, q.reason
  FROM unnest($1::integer[], $2::bigint[]) AS e (shard, position)
  JOIN bus_quarantine q ON q.shard = e.shard AND q.position = e.position
 WHERE q.kind = 'entry' AND q.successor_batch_id IS NULL LIMIT 1"""
_SHARD_STATUS = """
SELECT s.shard, s.next_append, h.watermark[s.shard + 1] AS watermark,
       s.appended_bytes - d.terminal_bytes AS backlog_bytes,
       (SELECT count(*) FROM bus_lease b WHERE b.shard = s.shard AND b.state = 'leased') AS leases,
       (SELECT extract(epoch FROM clock_timestamp() - l.accepted_at)::float8 FROM bus_log l
         WHERE l.shard = s.shard AND l.hi > h.watermark[s.shard + 1]
           AND l.lo >= coalesce((SELECT f.lo FROM bus_log f
                WHERE f.shard = s.shard AND f.lo <= h.watermark[s.shard + 1]
                ORDER BY f.lo DESC LIMIT 1), h.watermark[s.shard + 1])
         ORDER BY l.lo LIMIT 1) AS age_s
  FROM bus_shard s JOIN bus_done d USING (shard) CROSS JOIN lake h ORDER BY s.shard"""
_QUARANTINE = """
SELECT q.* FROM bus_quarantine q
 WHERE q.dropped_at IS NULL AND q.quarantine_id < coalesce($1, 9223372036854775807)
 ORDER BY q.quarantine_id DESC LIMIT $2"""
_QUARANTINE_ITEM = """
SELECT q.* FROM bus_quarantine q WHERE q.quarantine_id = $1 AND q.dropped_at IS NULL"""


class PostgresBus:
    """See `storage.bus.interface.IngestBus`."""

    def __init__(
        self,
        *,
        general: Pool,
        appends: Pool,
        renewals: Pool,
        settings: BusSettings,
        codec: TokenCodec,
        guard: HistoryGuard,
        object_store: ObjectStore | None,
    ) -> None:
        self._general = general
        self._renewals = renewals
        self._settings = settings
        self._object_store = object_store
        self._next_shard = random.randrange(settings.shards)
        self._guard = guard
        self._receipts = ReceiptMaker(codec=codec, histories=guard.histories)
        self._claim_check = ClaimCheck(pool=appends, settings=settings, object_store=object_store)
        self._writers = [
            GroupWriter(
                shard=shard,
                pool=appends,
                settings=settings,
                receipts=self._receipts,
                claim_check=self._claim_check,
            )
            for shard in range(settings.shards)
        ]
        self._release = PayloadRelease(pool=general, shards=settings.shards)
        self._ttl = dt.timedelta(milliseconds=settings.lease_ttl_ms)
        self._isolation_ttl = dt.timedelta(milliseconds=settings.isolation_ttl_ms)
        self._window = dt.timedelta(seconds=settings.idempotency_window_s)

    @property
    def shards(self) -> int:
        return self._settings.shards

    def shard_of(self, principal_id: int, ordering: str) -> int:
        return shard_of(principal_id, ordering, shards=self.shards)

    async def close(self) -> None:
        for writer in self._writers:
            await writer.close()
        self._claim_check.close()

    # --- append ------------------------------------------------------------------------

    async def append(self, entry: NewEntry) -> AppendOutcome:
        shard = self.shard_of(entry.principal_id, ordering_of(entry))
        outcome = await self._writers[shard].append(entry)
        if isinstance(outcome, Accepted):
            self._guard.saw_entry(shard, outcome.position)
            if entry.creates:
                self._guard.changed()
        return outcome

    async def number_tables(self, count: int) -> TableNumbers:
        async with self._general.connection() as connection:
            with reading():  # numbers that nobody hears of are never used
                rows = await connection.fetch(_NUMBER_TABLES, count)
        serial = rows[0]["history_serial"]
        return TableNumbers(serial, tuple(row["table_id"] for row in rows))

    async def find_key(self, principal_id: int, target: str, key: str) -> KeyRecord | None:
        async with self._general.connection() as connection:
            with reading():
                row = await connection.fetchrow(
                    "SELECT * FROM find_keys($1)", [key_hash(principal_id, target, key)]
                )
        return None if row is None else self._receipts.record(row)

    # --- claims ------------------------------------------------------------------------

    async def claim(self, owner: uuid.UUID) -> Claim | None:
        settings = self._settings
        # Claimers start at different shards, so that they seldom want the same claim row, and go on
        # behind the one they had last, so that a round of claims takes each shard once.
        first = self._next_shard
        shards = [(first + n) % settings.shards for n in range(settings.shards)]
        async with self._general.connection() as connection:
            with reading():  # a lost claim is an expired lease later: nothing is lost
                row = await connection.fetchrow(
                    CLAIM,
                    owner,
                    shards,
                    self._ttl,
                    self._isolation_ttl,
                    dt.timedelta(milliseconds=settings.backoff_ms(1)),
                    settings.claim_bytes_max,
                    settings.claim_entries_max,
                    settings.quarantine_attempts,
                    dt.timedelta(seconds=settings.intent_ttl_s),
                )
        claim = claim_of(row)
        if claim is not None:
            self._next_shard = (claim.lease.shard + 1) % settings.shards
        return claim

    async def read(self, claim: Claim) -> Sequence[ClaimedSegment]:
        lease = claim.lease
        async with self._general.connection() as connection:
            with reading():
                rows = await connection.fetch(
                    _READ, lease.shard, lease.lo, lease.hi, lease.lease_id, lease.epoch
                )
        keys = [row["payload_key"] for row in rows if row["payload_key"] is not None]
        stored = await fetch_payloads(self._object_store, keys)
        segments: list[ClaimedSegment] = []
        covered = lease.lo
        for row in rows:
            lo, hi = max(row["lo"], lease.lo), min(row["hi"], lease.hi)
            if lo != covered:
                break
            payload = row["payload"]
            if payload is None:
                payload = stored.get(row["payload_key"])
            if payload is None:
                break
            first, last = lo - row["lo"], hi - row["lo"]
            segments.append(
                ClaimedSegment(
                    lo=lo,
                    hi=hi,
                    payload=payload,
                    entry_indexes=tuple(row["entry_indexes"][first:last]),
                    entry_bytes=tuple(row["entry_bytes"][first:last]),
                )
            )
            covered = hi
        if covered != lease.hi:
            await self._explain_missing(lease, covered)
        return segments

    async def _explain_missing(self, lease: LeaseRef, covered: int) -> None:
        """An incomplete read is never "no data": either the lease is lost, and the segments may
        have been purged, or the bus has lost bytes."""

        if not await self.holds(lease):
            raise LeaseLost("the range was reclaimed while it was read")
        raise Corrupt(
            f"the bus lacks the bytes of shard {lease.shard} from position {covered}",
            shard=lease.shard,
            position=covered,
        )

    async def holds(self, lease: LeaseRef) -> bool:
        async with self._general.connection() as connection:
            with reading():
                return bool(
                    await connection.fetchval(
                        "SELECT EXISTS (SELECT 1 FROM bus_lease WHERE lease_id = $1"
                        " AND epoch = $2 AND state = 'leased')",
                        lease.lease_id,
                        lease.epoch,
                    )
                )

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        if not leases:
            return ()
        async with self._renewals.connection() as connection:
            with reading():
                rows = await connection.fetch(
                    _RENEW,
                    [lease.lease_id for lease in leases],
                    [lease.epoch for lease in leases],
                    self._isolation_ttl,
                    self._ttl,
                )
        kept = {(row["lease_id"], row["epoch"]) for row in rows}
        return [lease for lease in leases if (lease.lease_id, lease.epoch) in kept]

    async def release(self, lease: LeaseRef) -> None:
        await self._return(lease, failed=False, error=None, delay_s=0.0)

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        await self._return(lease, failed=True, error=error[:2_000], delay_s=delay_s)

    async def _return(
        self, lease: LeaseRef, *, failed: bool, error: str | None, delay_s: float
    ) -> None:
        async with self._general.connection() as connection:
            with writing():
                held = await connection.fetchval(
                    "SELECT return_range($1, $2, $3, $4, $5)",
                    lease.lease_id,
                    lease.epoch,
                    failed,
                    error,
                    dt.timedelta(seconds=delay_s),
                )
        if not held:
            raise LeaseLost("the range was reclaimed under a newer epoch")

    async def note_canary(self, lease: LeaseRef) -> None:
        async with self._general.connection() as connection:
            with reading():
                found = await connection.fetchval(
                    "UPDATE bus_lease SET canary_epoch = epoch WHERE lease_id = $1 AND epoch = $2"
                    " AND state = 'leased' RETURNING lease_id",
                    lease.lease_id,
                    lease.epoch,
                )
        if found is None:
            raise LeaseLost("the range was reclaimed under a newer epoch")

    # --- looking -----------------------------------------------------------------------

    async def ends(self) -> Mapping[int, int]:
        async with self._general.connection() as connection:
            with reading():
                rows = await connection.fetch("SELECT shard, next_append FROM bus_shard")
        return {row["shard"]: row["next_append"] for row in rows}

    async def shard_status(self) -> Sequence[ShardStatus]:
        async with self._general.connection() as connection:
            with reading():
                rows = await connection.fetch(_SHARD_STATUS)
        return [
            ShardStatus(
                shard=row["shard"],
                end=row["next_append"],
                watermark=row["watermark"],
                backlog_entries=row["next_append"] - row["watermark"],
                backlog_bytes=max(row["backlog_bytes"], 0),
                backlog_age_s=row["age_s"] or 0.0,
                leases=row["leases"],
            )
            for row in rows
        ]

    async def batch(self, batch_id: str) -> BatchStatus | None:
        parsed = parse_batch_id(batch_id)
        if parsed is None:
            return None
        history_serial, shard, position = parsed
        async with self._general.connection() as connection:
            with reading():
                row = await connection.fetchrow(_BATCH, shard, position)
        if row is None or row["history_serial"] != history_serial:
            return None
        state = BatchState.ACCEPTED
        if row["reason"] is not None:
            state = BatchState.QUARANTINED
        elif row["snapshot_id"] is not None:
            state = BatchState.PUBLISHED
        return BatchStatus(
            batch_id=batch_id,
            shard=shard,
            position=position,
            principal_id=row["principal_id"],
            state=state,
            snapshot_id=row["snapshot_id"] if state is BatchState.PUBLISHED else None,
            reason=row["reason"],
            successor_batch_id=row["successor_batch_id"],
        )

    async def quarantined_of(self, entries: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
        if not entries:
            return None
        async with self._general.connection() as connection:
            with reading():
                row = await connection.fetchrow(
                    _QUARANTINED_OF,
                    [shard for shard, _ in entries],
                    [position for _, position in entries],
                )
        if row is None:
            return None
        return _batch_id_of(row), row["reason"]

    # --- quarantine --------------------------------------------------------------------

    async def quarantine_items(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[QuarantineItem]:
        async with self._general.connection() as connection:
            with reading():
                rows = await connection.fetch(_QUARANTINE, before, limit)
        return [_quarantine_item(row) for row in rows]

    async def quarantine_item(self, quarantine_id: int) -> QuarantineItem | None:
        async with self._general.connection() as connection:
            with reading():
                row = await connection.fetchrow(_QUARANTINE_ITEM, quarantine_id)
        return None if row is None else _quarantine_item(row)

    async def mark_replayed(self, quarantine_id: int, successor_batch_id: str) -> None:
        async with self._general.connection() as connection:
            with writing():
                await connection.execute(
                    "UPDATE bus_quarantine SET successor_batch_id = $2"
                    " WHERE quarantine_id = $1 AND successor_batch_id IS NULL",
                    quarantine_id,
                    successor_batch_id,
                )

    async def drop_quarantined(self, quarantine_id: int) -> bool:
        async with self._general.connection() as connection:
            with writing():
                found = await connection.fetchval(
                    "UPDATE bus_quarantine SET dropped_at = clock_timestamp(), payload = NULL"
                    " WHERE quarantine_id = $1 AND dropped_at IS NULL RETURNING quarantine_id",
                    quarantine_id,
                )
        return found is not None

    async def erase_quarantined(self, quarantine_id: int, *, reason: str) -> bool:
        async with self._general.connection() as connection:
            with writing():
                found = await connection.fetchval(
                    "UPDATE bus_quarantine SET payload = '', reason = $2 WHERE quarantine_id = $1"
                    " AND dropped_at IS NULL AND octet_length(payload) > 0 RETURNING quarantine_id",
                    quarantine_id,
                    reason,
                )
        return found is not None

    async def empty(self, positions: Mapping[int, int]) -> EmptiedBus:
        return await empty(self._general, positions, object_store=self._object_store)

    async def purge(self) -> PurgeReport:
        if self._object_store is not None:
            await self._release.run_once()
        return await purge(self._general, settings=self._settings, object_store=self._object_store)


def _batch_id_of(row: asyncpg.Record) -> str:
    return make_batch_id(
        history_serial=row["history_serial"], shard=row["shard"], position=row["position"]
    )


def _quarantine_item(row: asyncpg.Record) -> QuarantineItem:
    return QuarantineItem(
        quarantine_id=row["quarantine_id"],
        kind=row["kind"],
        batch_id=_batch_id_of(row),
        shard=row["shard"],
        position=row["position"],
        principal_id=row["principal_id"],
        table_ids=tuple(row["table_ids"]),
        rows=row["rows"],
        reason=row["reason"],
        attempts=row["attempts"],
        created_at=row["created_at"],
        successor_batch_id=row["successor_batch_id"],
        payload=row["payload"] or b"",
        target=row["target"],
    )
