"""Erasures in the in-memory lake: the same meaning as `storage.postgres.erasures`."""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lakebus.errors import Fault
from lakebus.snapshots import DataFile
from storage.catalog.interface import Erased
from storage.maintenance.erasing import Replacement, Stray
from storage.maintenance.erasure_records import read_records
from storage.maintenance.interface import CondemnedFile, SwapOutcome, Swapped
from storage.maintenance.jobs import Job, JobKind, JobState
from storage.memory_lake import MemoryLake
from storage.memory_state import ErasedRow, ErasureRow, FileRow, JobRow


class MemoryErasing:
    """See `storage.maintenance.erasing.Erasing`. Use from one event loop."""

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake

    async def begin(self, erasure_id: uuid.UUID, table_id: int) -> None:
        await self._lake.reach()
        self._lake.state.erasures.setdefault(erasure_id, ErasureRow(table_id))

    async def files(self, table_id: int) -> Sequence[DataFile]:
        await self._lake.reach()
        return [
            dataclasses.replace(
                row.file, first_snapshot=row.first_snapshot, last_snapshot=row.last_snapshot
            )
            for row in self._lake.state.files.values()
            if row.file.table_id == table_id
        ]

    async def strays(self, table_id: int) -> Sequence[Stray]:
        await self._lake.reach()
        state = self._lake.state
        found = {
            one.file_id: Stray(one.file_id, f"tables/{table_id}/{one.file_id}.parquet")
            for one in state.intents.values()
            if one.kind == "data" and one.table_id == table_id
        }
        for condemned in state.condemned.values():
            known = condemned.file_id in state.files or condemned.state == "deleted"
            known = known or condemned.reason == "erased"
            if condemned.table_id == table_id and not known:
                found[condemned.file_id] = Stray(condemned.file_id, condemned.object_key)
        return list(found.values())

    async def replace(
        self, erasure_id: uuid.UUID, table_id: int, replacements: Sequence[Replacement]
    ) -> Sequence[uuid.UUID]:
        await self._lake.reach()
        rows = self._lake.state.files
        for one in replacements:
            row = rows.get(one.old)
            left = 0 if one.file is None else one.file.rows
            if row is not None and left != row.file.rows - one.rows:
                raise Fault(f"an erasure of {one.rows} rows does not leave what was written")
        done = [one.old for one in replacements if self._exchange(erasure_id, table_id, one)]
        self._lake.state.erasure_count += bool(done)
        return done

    def _exchange(self, erasure_id: uuid.UUID, table_id: int, one: Replacement) -> bool:
        state = self._lake.state
        old = state.files.get(one.old)
        if old is None or old.file.table_id != table_id:
            return False
        if one.file is not None:
            new_id = one.file.file_id
            if one.adopted and new_id in state.files:
                return False
            if not one.adopted and state.intents.pop(new_id, None) is None:
                return False
            named = dataclasses.replace(
                one.file, first_snapshot=old.first_snapshot, last_snapshot=None
            )
            state.files[new_id] = FileRow(named, old.first_snapshot, old.last_snapshot)
        del state.files[one.old]
        left_bytes = 0 if one.file is None else one.file.size_bytes
        last = state.head_id + 1 if old.last_snapshot is None else old.last_snapshot
        state.erased[one.old] = ErasedRow(
            erasure_id,
            table_id,
            old.first_snapshot,
            last,
            one.rows,
            int(one.file is None),
            old.file.size_bytes - left_bytes,
        )
        state.condemned[one.old] = CondemnedFile(
            one.old,
            old.file.object_key,
            table_id,
            "erased",
            old.file.size_bytes,
            "deleting",
            self._lake.now(),
            None,
        )
        return True

    async def erase_strays(self, table_id: int, file_ids: Sequence[uuid.UUID]) -> None:
        strays = {one.file_id: one for one in await self.strays(table_id)}
        state = self._lake.state
        for file_id in file_ids:
            if file_id in strays and file_id not in state.files:
                state.intents.pop(file_id, None)
                key = strays[file_id].object_key
                state.condemned[file_id] = CondemnedFile(
                    file_id, key, table_id, "erased", None, "deleting", self._lake.now(), None
                )

    async def doomed(self, table_id: int) -> Sequence[CondemnedFile]:
        await self._lake.reach()
        return [
            one
            for one in self._lake.state.condemned.values()
            if (one.table_id, one.reason, one.state) == (table_id, "erased", "deleting")
        ]

    async def finish(
        self,
        erasure_id: uuid.UUID,
        table_id: int,
        publication_id: uuid.UUID,
        summary: Mapping[str, Any],
    ) -> int:
        await self._lake.reach()
        state = self._lake.state
        state.erasures[erasure_id].ended = True
        done = state.swaps.get(publication_id)
        if done is None:
            made = self._lake.next_snapshot(
                "erase", {"tables": {str(table_id): summary}}, at=self._lake.next_publish_time()
            )
            done = Swapped(SwapOutcome.PUBLISHED, made.snapshot_id, made.published_at)
            state.swaps[publication_id] = done
        assert done.snapshot_id is not None
        return done.snapshot_id

    async def erased(self, erasure_id: uuid.UUID | None = None) -> Sequence[Erased]:
        await self._lake.reach()
        found = erased(self._lake)
        return [one for one in found if erasure_id in (None, one.erasure_id)]


def erased(lake: MemoryLake) -> tuple[Erased, ...]:
    rows: Counter[tuple[uuid.UUID, int, int, int]] = Counter()
    files: Counter[tuple[uuid.UUID, int, int, int]] = Counter()
    for one in lake.state.erased.values():
        key = (one.erasure_id, one.table_id, one.first_snapshot, one.last_snapshot)
        rows[key] += one.rows
        files[key] += 1
    return tuple(Erased(*key, rows[key], files[key]) for key in rows)


def owed(lake: MemoryLake) -> frozenset[int]:
    rows = lake.state.erasures.values()
    return frozenset(row.table_id for row in rows if row.owed and not row.ended)


async def compare(lake: MemoryLake) -> None:
    """Before the first head of a line of history is given: what the records tell and the lake does
    not know is owed, and a job does it again."""

    serial = lake.state.history_serial
    if lake.state.erasures_serial == serial:
        return
    records = [] if lake.object_store is None else await read_records(lake.object_store)
    state = lake.state
    if state.erasures_serial == serial or state.history_serial != serial:
        return  # somebody else was faster
    for record in records:
        erasure_id, table_id = uuid.UUID(record["erasure_id"]), int(record["table_id"])
        known = state.erasures.get(erasure_id)
        if table_id not in state.tables or (known is not None and known.ended):
            continue
        state.erasures[erasure_id] = ErasureRow(table_id, owed=True)
        job = Job(
            job_id=lake.new_uuid(),
            kind=JobKind.ERASE,
            table_id=table_id,
            parameters=record,
            dry_run=False,
            requested_by="restore",
            state=JobState.QUEUED,
            attempt=0,
            created_at=lake.now(),
        )
        state.jobs[job.job_id] = JobRow(job, None, None, None, not_before=lake.now())
    state.erasures_serial = serial
