"""The life of one entry of a `MemoryLake` (see `storage.bus.trace`)."""

from __future__ import annotations

import datetime as dt

from storage.bus.interface import BatchState
from storage.bus.receipting import parse_batch_id
from storage.bus.trace import (
    Trace,
    TracedEntry,
    TracedFile,
    TracedLease,
    TracedPublication,
    TracedQuarantine,
)
from storage.memory_lake import MemoryLake
from storage.memory_state import LogEntry


class MemoryTraces:
    """See `storage.bus.trace.Traces`."""

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake

    async def trace(self, batch_id: str) -> Trace | None:
        await self._lake.reach()
        state, place = self._lake.state, parse_batch_id(batch_id)
        if place is None or place[1] >= len(state.shards):
            return None
        entry = state.shards[place[1]].log.get(place[2])
        if entry is None or entry.batch_id != batch_id:
            return None
        return Trace(
            batch_id=batch_id,
            shard=entry.shard,
            position=entry.position,
            watermark=state.shards[entry.shard].watermark,
            head_snapshot_id=state.head_id,
            entry=self._entry(entry),
            lease=self._lease(entry),
            publication=self._publication(entry),
            files=self._files(entry),
            quarantine=self._quarantine(entry),
        )

    def _entry(self, entry: LogEntry) -> TracedEntry:
        group = [
            other.position
            for other in self._lake.state.shards[entry.shard].log.values()
            if other.segment_id == entry.segment_id
        ]
        record = None
        if entry.key_scope is not None:
            record = self._lake.state.keys.get(entry.key_scope)
        rejected = 0 if record is None else record.receipt.rows_rejected
        window = dt.timedelta(seconds=self._lake.settings.idempotency_window_s)
        return TracedEntry(
            principal_id=entry.principal_id,
            target=entry.target,
            rows=entry.rows,
            rows_rejected=rejected,
            size_bytes=entry.size_bytes,
            lo=min(group),
            hi=max(group) + 1,
            accepted_at=entry.accepted_at,
            idempotency_expires_at=entry.accepted_at + window,
        )

    def _lease(self, entry: LogEntry) -> TracedLease | None:
        for row in self._lake.state.ranges.values():
            if row.shard == entry.shard and row.lo <= entry.position < row.hi:
                return TracedLease(
                    epoch=row.epoch,
                    state="leased" if row.leased else "ready",
                    lo=row.lo,
                    hi=row.hi,
                    owner=row.owner,
                    claimed_at=None,
                    expires_at=row.expires_at if row.leased else None,
                    attempt=row.attempt,
                    last_error=row.last_error,
                )
        return None

    def _publication(self, entry: LogEntry) -> TracedPublication | None:
        state = self._lake.state
        for row in state.published_ranges:
            if row.shard == entry.shard and row.lo <= entry.position < row.hi:
                snapshot = state.snapshots.get(row.snapshot_id)
                if snapshot is not None:
                    return TracedPublication(
                        lo=row.lo,
                        hi=row.hi,
                        commit_id=None,
                        owner=None,
                        snapshot_id=row.snapshot_id,
                        published_at=snapshot.published_at,
                        readable=row.snapshot_id >= state.oldest_snapshot_id,
                    )
        return None

    def _files(self, entry: LogEntry) -> tuple[TracedFile, ...]:
        state = self._lake.state
        if entry.state is not BatchState.PUBLISHED:
            return ()
        return tuple(
            TracedFile(
                table=state.tables[row.file.table_id].name,
                file_id=row.file.file_id,
                rows=row.file.rows,
                size_bytes=row.file.size_bytes,
                last_snapshot_id=row.last_snapshot,
            )
            for row in state.files.values()
            if row.first_snapshot == entry.snapshot_id and row.file.table_id in entry.table_ids
        )

    def _quarantine(self, entry: LogEntry) -> tuple[TracedQuarantine, ...]:
        return tuple(
            TracedQuarantine(
                quarantine_id=item.quarantine_id,
                kind=item.kind,
                rows=item.rows,
                reason=item.reason,
                attempts=item.attempts,
                created_at=item.created_at,
                successor_batch_id=item.successor_batch_id,
            )
            for item in (row.item for row in self._lake.state.quarantine.values())
            if item.batch_id == entry.batch_id
        )
