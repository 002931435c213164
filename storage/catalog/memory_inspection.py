"""What the validator reads of the in-memory lake: the same questions as to PostgreSQL.

A view is a list of what there is at its beginning, so it stays as it was while others publish.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from lakebus.snapshots import DataFile
from storage.bus.interface import BatchState
from storage.catalog.interface import PublishedRange
from storage.maintenance.inspection import (
    AcceptedRows,
    AddedFiles,
    InspectedFile,
    InspectedHead,
    InspectedSnapshot,
    InspectedTag,
    View,
    WaitingPayload,
)
from storage.maintenance.jobs import JobKind, JobState
from storage.memory_lake import MemoryLake
from storage.memory_state import FileRow, LakeState, ShardRow


class MemoryInspection:
    keeps_marker = False

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake

    @asynccontextmanager
    async def look(self) -> AsyncIterator[View]:
        await self._lake.reach()
        yield MemoryView(self._lake)

    async def file(self, file_id: uuid.UUID) -> InspectedFile | None:
        await self._lake.reach()
        row = self._lake.state.files.get(file_id)
        return None if row is None else _file(self._lake.state, row)

    async def ranges_within(
        self, shard: int, lo: int, hi: int, *, limit: int
    ) -> Sequence[PublishedRange]:
        await self._lake.reach()
        return [r for r in _ranges(self._lake.state, shard) if r.lo < hi and r.hi > lo][:limit]

    async def waiting_payloads(self) -> AsyncIterator[WaitingPayload]:
        await self._lake.reach()
        for found in _waiting(self._lake.state):
            yield found

    async def waiting_payload(self, shard: int, lo: int) -> WaitingPayload | None:
        await self._lake.reach()
        return next((w for w in _waiting(self._lake.state) if (w.shard, w.lo) == (shard, lo)), None)

    async def quarantine_without_payload(self, *, limit: int) -> Sequence[int]:
        await self._lake.reach()
        rows = sorted(self._lake.state.quarantine.items())
        return [n for n, row in rows if not row.dropped and not row.item.payload][:limit]

    async def unknown(self, ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, str]:
        await self._lake.reach()
        state = self._lake.state
        found: dict[uuid.UUID, str] = {}
        for one in ids:
            condemned = state.condemned.get(one)
            if one in state.files or one in state.intents:
                continue
            if condemned is None or condemned.state == "deleted":
                found[one] = "unknown" if condemned is None else "deleted"
        return found

    async def last_report(self) -> Mapping[str, Any] | None:
        return next(iter(await self._reports()), None)

    async def sampled_until(self) -> uuid.UUID | None:
        for report in await self._reports():
            until = (report.get("sample") or {}).get("next")
            if until is not None:
                return uuid.UUID(until)
        return None

    async def _reports(self) -> list[Mapping[str, Any]]:
        """Newest first."""

        await self._lake.reach()
        ended = [
            row.job
            for row in self._lake.state.jobs.values()
            if row.job.kind is JobKind.VALIDATE and row.job.state is JobState.DONE
        ]
        return [j.report for j in sorted(ended, key=lambda j: j.created_at, reverse=True)]


class MemoryView:
    """Lists made at the beginning."""

    def __init__(self, lake: MemoryLake) -> None:
        state = lake.state
        newest = lake.head
        self._head = InspectedHead(
            lake_id=state.lake_id,
            history=lake.history,
            snapshot_id=newest.snapshot_id,
            published_at=newest.published_at,
            publish_count=len(state.snapshots),
            oldest_snapshot_id=state.oldest_snapshot_id,
            watermark=tuple(shard.watermark for shard in state.shards),
            now=lake.now(),
        )
        self._snapshots = [
            InspectedSnapshot(
                snapshot_id=number,
                parent_id=snapshot.parent_id,
                published_at=snapshot.published_at,
                operation=snapshot.operation,
                watermark=tuple(snapshot.watermark[n] for n in range(len(state.shards))),
                tables=_tables(snapshot.summary),
                retained=lake.retained(number),
            )
            for number, snapshot in sorted(state.snapshots.items())
        ]
        self._ranges = [_ranges(state, shard) for shard in range(len(state.shards))]
        self._accepted = {
            s.snapshot_id: _accepted(state, s.snapshot_id)
            for s in self._snapshots
            if s.operation == "append"
        }
        self._files = sorted(
            (_file(state, row) for row in state.files.values()), key=lambda f: f.file.file_id
        )
        self._tags = [
            InspectedTag(tag.name, tag.snapshot_id, lake.retained(tag.snapshot_id))
            for tag in sorted(state.tags.values(), key=lambda tag: tag.name)
        ]
        self._erased = [dataclasses.replace(gone) for gone in state.erased.values()]
        self._pins = sorted(state.pins.values(), key=lambda pin: pin.pin_id)

    async def head(self) -> InspectedHead:
        return self._head

    async def snapshots(self) -> AsyncIterator[InspectedSnapshot]:
        for snapshot in self._snapshots:
            yield snapshot

    async def ranges(self, shard: int) -> AsyncIterator[PublishedRange]:
        for one in self._ranges[shard]:
            yield one

    async def files(self) -> AsyncIterator[InspectedFile]:
        for found in self._files:
            yield found

    async def sample(self, after: uuid.UUID, *, limit: int) -> Sequence[InspectedFile]:
        return [found for found in self._files if found.file.file_id > after][:limit]

    async def added(self, snapshot_ids: Sequence[int]) -> Mapping[tuple[int, int], AddedFiles]:
        wanted = set(snapshot_ids)
        found: dict[tuple[int, int], AddedFiles] = {}
        for one in self._files:
            key = (one.file.first_snapshot, one.file.table_id)
            if key[0] in wanted:
                told = found.get(key, AddedFiles(0, 0, 0))
                found[key] = AddedFiles(
                    told.files + 1,
                    told.rows + one.file.rows,
                    told.size_bytes + one.file.size_bytes,
                )
        for gone in self._erased:
            key = (gone.first_snapshot, gone.table_id)
            if key[0] in wanted:
                told = found.get(key, AddedFiles(0, 0, 0))
                found[key] = AddedFiles(
                    told.files + gone.files,
                    told.rows + gone.rows,
                    told.size_bytes + gone.size_bytes,
                )
        return found

    async def accepted(self, snapshot_ids: Sequence[int]) -> Mapping[int, AcceptedRows]:
        found = {number: self._accepted[number] for number in snapshot_ids}
        return {number: rows for number, rows in found.items() if rows.positions}

    async def shared_objects(self, *, limit: int) -> Sequence[tuple[str, Sequence[uuid.UUID]]]:
        by_key: dict[str, list[uuid.UUID]] = {}
        for found in self._files:
            by_key.setdefault(found.file.object_key, []).append(found.file.file_id)
        return [(key, files) for key, files in sorted(by_key.items()) if len(files) > 1][:limit]

    async def tags(self) -> Sequence[InspectedTag]:
        return self._tags

    async def expired_pins(self, *, before: dt.datetime) -> Sequence[tuple[uuid.UUID, str]]:
        return [
            (pin.pin_id, pin.kind)
            for pin in self._pins
            if pin.expires_at is not None and pin.expires_at < before
        ]


def _ranges(state: LakeState, shard: int) -> list[PublishedRange]:
    return sorted((r for r in state.published_ranges if r.shard == shard), key=lambda r: r.lo)


def _accepted(state: LakeState, snapshot_id: int) -> AcceptedRows:
    positions = logged = rows = 0
    for one in state.published_ranges:
        if one.snapshot_id != snapshot_id:
            continue
        positions += one.hi - one.lo
        log = state.shards[one.shard].log
        for position in range(one.lo, one.hi):
            entry = log.get(position)
            if entry is not None:
                logged += 1
                rows += 0 if entry.state is BatchState.QUARANTINED else entry.rows
    return AcceptedRows(positions, logged, rows)


def _waiting(state: LakeState) -> list[WaitingPayload]:
    return [
        WaitingPayload(number, position, position + 1, None, entry.segment_id in state.segments)
        for number, shard in enumerate(state.shards)
        for position, entry in sorted(shard.log.items())
        if position >= shard.watermark and not _is_done(shard, position)
    ]


def _is_done(shard: ShardRow, position: int) -> bool:
    return any(lo <= position < hi for lo, hi in shard.done.items())


def _tables(summary: Mapping[str, object]) -> Mapping[str, Mapping[str, Any]]:
    tables = summary.get("tables", {})
    assert isinstance(tables, Mapping)
    return tables


def _file(state: LakeState, row: FileRow) -> InspectedFile:
    table = state.tables.get(row.file.table_id)
    condemned = state.condemned.get(row.file.file_id)
    return InspectedFile(
        file=_with_life(row),
        has_schema=table is not None
        and any(v.schema.version == row.file.schema_version for v in table.versions),
        has_table=table is not None,
        table_last_snapshot=None if table is None else table.last_snapshot,
        condemned=None if condemned is None else condemned.state,
        has_intent=row.file.file_id in state.intents,
    )


def _with_life(row: FileRow) -> DataFile:
    return dataclasses.replace(
        row.file, first_snapshot=row.first_snapshot, last_snapshot=row.last_snapshot
    )
