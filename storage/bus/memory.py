"""The in-memory bus: one face of a `MemoryLake` (the other is `storage.catalog.memory`).

It holds no truth: whatever is not in the lake's state may be lost with this object, as with a
process. Entries that arrive in one step of the event loop share one group commit and one segment,
as they do in the real backends, so whoever reads claims here meets the same shapes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import uuid
from collections.abc import Mapping, Sequence

from lakebus.errors import Corrupt, OutcomeUnknown
from storage.bus import memory_door as door
from storage.bus import memory_ranges as ranges
from storage.bus.interface import (
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
from storage.bus.receipting import parse_batch_id
from storage.bus.sharding import ordering_of, shard_of
from storage.memory_lake import MemoryLake
from storage.memory_state import LogEntry, ShardRow

_Waiting = tuple[NewEntry, asyncio.Future[AppendOutcome]]


class MemoryBus:
    """See `storage.bus.interface.IngestBus`. Use from one event loop."""

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake
        self._waiting: list[_Waiting] = []

    @property
    def shards(self) -> int:
        return len(self._lake.state.shards)

    def shard_of(self, principal_id: int, ordering: str) -> int:
        return shard_of(principal_id, ordering, shards=self.shards)

    # --- append -----------------------------------------------------------------------------

    async def append(self, entry: NewEntry) -> AppendOutcome:
        await self._lake.reach()
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._flush)
        future: asyncio.Future[AppendOutcome] = loop.create_future()
        self._waiting.append((entry, future))
        return await future

    async def number_tables(self, count: int) -> TableNumbers:
        await self._lake.reach()
        return door.number_tables(self._lake, count)

    async def find_key(self, principal_id: int, target: str, key: str) -> KeyRecord | None:
        await self._lake.reach()
        return door.find_record(self._lake, (principal_id, target, key))

    def _flush(self) -> None:
        """Commits what gathered, one group a shard, and answers everybody."""

        waiting, self._waiting = self._waiting, []
        by_shard: dict[int, list[_Waiting]] = {}
        for entry, future in waiting:
            shard = self.shard_of(entry.principal_id, ordering_of(entry))
            by_shard.setdefault(shard, []).append((entry, future))
        most = self._lake.settings.group_entries_max
        for shard, members in by_shard.items():
            for start in range(0, len(members), most):
                self._commit(shard, members[start : start + most])

    def _commit(self, shard: int, group: list[_Waiting]) -> None:
        verdicts: Sequence[door.Verdict]
        try:
            verdicts = door.append_group(self._lake, shard, [entry for entry, _ in group])
        except Exception as error:  # noqa: BLE001 - raised again in each caller that waits
            verdicts = [error] * len(group)
        if self._lake.faults.take_lost_reply("append"):
            verdicts = [OutcomeUnknown("the reply to the append was lost") for _ in group]
        for (_, future), verdict in zip(group, verdicts, strict=True):
            if future.done():  # the caller went away
                continue
            if isinstance(verdict, Exception):
                future.set_exception(verdict)
            else:
                future.set_result(verdict)

    # --- claims -----------------------------------------------------------------------------

    async def claim(self, owner: uuid.UUID) -> Claim | None:
        await self._lake.reach()
        return ranges.claim_range(self._lake, owner)

    async def read(self, claim: Claim) -> Sequence[ClaimedSegment]:
        await self._lake.reach()
        lease = claim.lease
        ranges.held_or_lost(self._lake, lease)
        log = self._lake.state.shards[lease.shard].log
        runs: list[list[LogEntry]] = []
        for position in range(lease.lo, lease.hi):
            entry = log.get(position)
            if entry is None:
                raise Corrupt(f"the entry at shard {lease.shard}, position {position} is missing")
            if runs and runs[-1][0].segment_id == entry.segment_id:
                runs[-1].append(entry)
            else:
                runs.append([entry])
        return [self._segment(run) for run in runs]

    def _segment(self, run: Sequence[LogEntry]) -> ClaimedSegment:
        stored = self._lake.state.segments.get(run[0].segment_id)
        if stored is None:
            raise Corrupt(
                f"the payload of shard {run[0].shard}, position {run[0].position} is missing"
            )
        return ClaimedSegment(
            lo=run[0].position,
            hi=run[-1].position + 1,
            payload=stored.payload,
            entry_indexes=tuple(entry.index for entry in run),
            entry_bytes=tuple(entry.size_bytes for entry in run),
        )

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        await self._lake.reach()
        kept = []
        for lease in leases:
            row = ranges.held(self._lake, lease)
            if row is not None:
                ranges.extend(self._lake, row)
                kept.append(lease)
        return kept

    async def release(self, lease: LeaseRef) -> None:
        await self._lake.reach()
        ranges.give_back(self._lake, ranges.held_or_lost(self._lake, lease))

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        await self._lake.reach()
        row = ranges.held_or_lost(self._lake, lease)
        ranges.fail(self._lake, row, error=error, delay_s=delay_s)

    async def note_canary(self, lease: LeaseRef) -> None:
        await self._lake.reach()
        ranges.held_or_lost(self._lake, lease).canary = True

    # --- what it knows ----------------------------------------------------------------------

    async def ends(self) -> Mapping[int, int]:
        await self._lake.reach()
        return self._lake.ends()

    async def shard_status(self) -> Sequence[ShardStatus]:
        await self._lake.reach()
        return [self._status(number, row) for number, row in enumerate(self._lake.state.shards)]

    def _status(self, number: int, shard: ShardRow) -> ShardStatus:
        waiting = [e for e in shard.log.values() if e.state is BatchState.ACCEPTED]
        oldest = min((entry.accepted_at for entry in waiting), default=None)
        held = [r for r in self._lake.state.ranges.values() if r.shard == number and r.leased]
        return ShardStatus(
            shard=number,
            end=shard.end,
            watermark=shard.watermark,
            backlog_entries=len(waiting),
            backlog_bytes=shard.appended_bytes - shard.terminal_bytes,
            backlog_age_s=0.0 if oldest is None else (self._lake.now() - oldest).total_seconds(),
            leases=len(held),
        )

    async def batch(self, batch_id: str) -> BatchStatus | None:
        await self._lake.reach()
        place = parse_batch_id(batch_id)
        entry = None if place is None else self._entry(place[1], place[2])
        if entry is None or entry.batch_id != batch_id:
            return None
        return BatchStatus(
            batch_id=batch_id,
            shard=entry.shard,
            position=entry.position,
            principal_id=entry.principal_id,
            state=entry.state,
            snapshot_id=entry.snapshot_id,
            reason=entry.reason,
            successor_batch_id=self._successor(entry),
        )

    async def quarantined_of(self, entries: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
        await self._lake.reach()
        rows = self._lake.state.quarantine.values()
        by_place = {(r.item.shard, r.item.position): r for r in rows if r.item.kind == "entry"}
        for place in entries:
            row = by_place.get(place)
            if row is not None and row.item.successor_batch_id is None:
                return row.item.batch_id, row.item.reason
        return None

    def _entry(self, shard: int, position: int) -> LogEntry | None:
        shards = self._lake.state.shards
        return shards[shard].log.get(position) if shard < len(shards) else None

    def _successor(self, entry: LogEntry) -> str | None:
        for row in self._lake.state.quarantine.values():
            if row.item.kind == "entry" and row.item.batch_id == entry.batch_id:
                return row.item.successor_batch_id
        return None

    # --- quarantine -------------------------------------------------------------------------

    async def quarantine_items(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[QuarantineItem]:
        await self._lake.reach()
        rows = sorted(self._lake.state.quarantine.items(), reverse=True)
        items = [
            row.item
            for number, row in rows
            if not row.dropped and (before is None or number < before)
        ]
        return items[:limit]

    async def quarantine_item(self, quarantine_id: int) -> QuarantineItem | None:
        await self._lake.reach()
        row = self._lake.state.quarantine.get(quarantine_id)
        return None if row is None or row.dropped else row.item

    async def mark_replayed(self, quarantine_id: int, successor_batch_id: str) -> None:
        await self._lake.reach()
        row = self._lake.state.quarantine.get(quarantine_id)
        if row is not None and row.item.successor_batch_id is None:
            row.item = dataclasses.replace(row.item, successor_batch_id=successor_batch_id)

    async def drop_quarantined(self, quarantine_id: int) -> bool:
        await self._lake.reach()
        row = self._lake.state.quarantine.get(quarantine_id)
        if row is None or row.dropped:
            return False
        row.dropped = True
        row.item = dataclasses.replace(row.item, payload=b"")
        return True

    async def erase_quarantined(self, quarantine_id: int, *, reason: str) -> bool:
        await self._lake.reach()
        row = self._lake.state.quarantine.get(quarantine_id)
        if row is None or row.dropped or not row.item.payload:
            return False
        row.item = dataclasses.replace(row.item, payload=b"", reason=reason)
        return True

    async def empty(self, positions: Mapping[int, int]) -> EmptiedBus:
        await self._lake.reach()
        state = self._lake.state
        for number in [n for n, segment in state.segments.items() if segment.live == 0]:
            del state.segments[number]
        left = {
            entry.segment_id
            for shard, row in enumerate(state.shards)
            for entry in row.log.values()
            if entry.position < positions.get(shard, 0)
        }
        held = [state.segments[number] for number in left if number in state.segments]
        return EmptiedBus(0, sum(len(segment.payload) for segment in held))

    # --- purge ------------------------------------------------------------------------------

    async def purge(self) -> PurgeReport:
        await self._lake.reach()
        state, now = self._lake.state, self._lake.now()
        empty = [number for number, segment in state.segments.items() if segment.live == 0]
        for number in empty:
            del state.segments[number]
        window = dt.timedelta(seconds=self._lake.settings.idempotency_window_s)
        keys = rows = 0
        for shard in state.shards:
            for position, entry in list(shard.log.items()):
                # The window counts from the later of acceptance and the terminal time (A13).
                if entry.terminal_at is None or now <= entry.terminal_at + window:
                    continue
                if entry.key_scope is not None:
                    del state.keys[entry.key_scope]
                    keys += 1
                del shard.log[position]
                rows += 1
        return PurgeReport(
            segments_truncated=len(empty),
            key_generations_truncated=int(keys > 0),
            log_rows_deleted=rows,
        )
