"""Upkeep of the in-memory lake: the same meaning as `storage.postgres.upkeep`.

Each call is one step of the event loop, which is what stands for its transaction and its locks.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Collection, Mapping, Sequence

from lakebus.errors import (
    HistoryLost,
    OutcomeUnknown,
    SnapshotExpired,
    SnapshotNotFound,
    TagExists,
)
from lakebus.snapshots import DataFile
from storage.catalog import memory_swap
from storage.maintenance.interface import (
    CondemnedFile,
    Expired,
    Intent,
    Pin,
    Swap,
    Swapped,
    Tag,
    check_swap,
)
from storage.memory_lake import MemoryLake
from storage.memory_state import FileRow


class MemoryUpkeep:
    """See `storage.maintenance.interface.Upkeep`. Use from one event loop."""

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake

    # --- rewriting ---------------------------------------------------------------------

    async def live_files(self, table_id: int) -> Sequence[DataFile]:
        await self._lake.reach()
        rows = self._lake.state.files.values()
        live = [r.file for r in rows if r.last_snapshot is None and r.file.table_id == table_id]
        return sorted(live, key=lambda file: (file.first_snapshot, file.file_id.bytes))

    async def file_counts(self, *, small_bytes: int) -> Mapping[int, tuple[int, int]]:
        await self._lake.reach()
        counts: dict[int, tuple[int, int]] = {}
        for row in self._lake.state.files.values():
            if row.last_snapshot is None:
                files, small = counts.get(row.file.table_id, (0, 0))
                is_small = row.file.size_bytes < small_bytes
                counts[row.file.table_id] = (files + 1, small + is_small)
        return counts

    async def register_intents(
        self, table_id: int, count: int, *, owner: uuid.UUID, ttl_s: float
    ) -> Sequence[uuid.UUID]:
        await self._lake.reach()
        made = [self._lake.new_uuid() for _ in range(count)]
        expires_at = self._after_s(ttl_s)
        for file_id in made:
            self._lake.state.intents[file_id] = Intent(file_id, "data", owner, expires_at, table_id)
        return made

    async def register_canary(self, *, owner: uuid.UUID, ttl_s: float) -> uuid.UUID:
        await self._lake.reach()
        file_id = self._lake.new_uuid()
        intent = Intent(file_id, "canary", owner, self._after_s(ttl_s), None)
        self._lake.state.intents[file_id] = intent
        return file_id

    async def forget_canary(self, file_id: uuid.UUID) -> None:
        await self._lake.reach()
        intent = self._lake.state.intents.get(file_id)
        if intent is not None and intent.kind == "canary":
            del self._lake.state.intents[file_id]

    async def publish_swap(self, swap: Swap) -> Swapped:
        check_swap(swap)
        await self._lake.reach()
        swapped = memory_swap.publish_swap(self._lake, swap)
        if self._lake.faults.take_lost_reply("swap"):
            raise OutcomeUnknown("the reply to the swap was lost")
        return swapped

    async def swap_outcome(self, publication_id: uuid.UUID) -> Swapped | None:
        await self._lake.reach()
        return self._lake.state.swaps.get(publication_id)

    # --- snapshots ---------------------------------------------------------------------

    async def expire_snapshots(
        self, *, keep_s: float, keep_count: int, limit: int, dry_run: bool = False
    ) -> Expired:
        await self._lake.reach()
        state = self._lake.state
        before = self._after_s(-keep_s)
        ids = sorted(state.snapshots)
        counted = set(ids[: max(0, len(ids) - max(1, keep_count))])
        ending: list[int] = []
        for number in ids:
            if number < state.oldest_snapshot_id:
                continue
            young = state.snapshots[number].published_at >= before
            if number not in counted or young or len(ending) >= limit:
                break
            ending.append(number)
        if not ending:
            return Expired(None, None, 0, state.oldest_snapshot_id)
        oldest = ids[ids.index(ending[-1]) + 1]
        tagged = sum(number in self._tagged() for number in ending)
        if not dry_run:
            self._lake.expire_snapshots(before=oldest)
        return Expired(ending[0], ending[-1], tagged, oldest)

    async def create_tag(self, name: str, snapshot_id: int, *, created_by: str) -> Tag:
        await self._lake.reach()
        state = self._lake.state
        found = state.tags.get(name)
        if found is None:
            if not self._lake.retained(snapshot_id):
                self._raise_not_retained(snapshot_id)
            found = state.tags[name] = Tag(name, snapshot_id, self._lake.now(), created_by)
        if found.snapshot_id != snapshot_id:
            raise TagExists(
                f"the tag {name} names snapshot {found.snapshot_id}: choose another name, or "
                "delete the tag first",
                snapshot_id=found.snapshot_id,
            )
        return found

    async def drop_tag(self, name: str) -> Tag | None:
        await self._lake.reach()
        return self._lake.state.tags.pop(name, None)

    async def tags(self) -> Sequence[Tag]:
        await self._lake.reach()
        return [tag for _, tag in sorted(self._lake.state.tags.items())]

    def _tagged(self) -> Collection[int]:
        return {tag.snapshot_id for tag in self._lake.state.tags.values()}

    # --- pins --------------------------------------------------------------------------

    async def pin(
        self,
        pin_id: uuid.UUID,
        *,
        kind: str,
        floor: int | None,
        snapshot_ids: Sequence[int] = (),
        ttl_s: float | None,
        note: str = "",
    ) -> Pin:
        await self._lake.reach()
        old = next((pin for pin in self._live_pins() if pin.pin_id == pin_id), None)
        old_floor = old.floor if old is not None else None
        expired = floor is not None and floor < self._lake.state.oldest_snapshot_id
        if floor is not None and expired and (old_floor is None or floor < old_floor):
            self._raise_expired(floor)
        for number in sorted(snapshot_ids):
            known = old is not None and number in old.snapshot_ids
            covered = old_floor is not None and number >= old_floor
            if not (known or covered or self._lake.retained(number)):
                self._raise_not_retained(number)
        expires_at = None if ttl_s is None else self._after_s(ttl_s)
        pin = Pin(pin_id, kind, floor, tuple(snapshot_ids), expires_at, note)
        self._lake.state.pins[pin_id] = pin
        return pin

    async def release_pin(self, pin_id: uuid.UUID) -> None:
        await self._lake.reach()
        self._lake.state.pins.pop(pin_id, None)

    async def pins(self) -> Sequence[Pin]:
        await self._lake.reach()
        return sorted(
            self._live_pins(),
            key=lambda pin: (pin.expires_at is None, pin.expires_at or 0, pin.pin_id.bytes),
        )

    def _live_pins(self) -> list[Pin]:
        now = self._lake.now()
        pins = self._lake.state.pins.values()
        return [pin for pin in pins if pin.expires_at is None or pin.expires_at > now]

    # --- collection --------------------------------------------------------------------

    async def condemn(self, *, limit: int, dry_run: bool = False) -> Sequence[CondemnedFile]:
        await self._lake.reach()
        state = self._lake.state
        if not dry_run:
            state.pins = {pin.pin_id: pin for pin in self._live_pins()}
        free = [
            row
            for row in state.files.values()
            if row.file.file_id not in state.condemned and not self._is_needed(row)
        ]
        free.sort(key=lambda row: (row.last_snapshot or 0, row.file.file_id.bytes))
        found = [
            CondemnedFile(
                row.file.file_id,
                row.file.object_key,
                row.file.table_id,
                "unreferenced",
                row.file.size_bytes,
                "condemned",
                self._lake.now(),
                None,
            )
            for row in free[:limit]
        ]
        if not dry_run:
            state.condemned.update((one.file_id, one) for one in found)
        return found

    async def condemn_orphans(
        self, *, older_than_s: float, limit: int, dry_run: bool = False
    ) -> Sequence[CondemnedFile]:
        await self._lake.reach()
        state = self._lake.state
        before = self._after_s(-older_than_s)
        old = [intent for intent in state.intents.values() if intent.expires_at < before]
        old.sort(key=lambda intent: intent.file_id.bytes)
        found = [_orphan(intent, self._lake.now()) for intent in old[:limit]]
        if not dry_run:
            for one in found:
                del state.intents[one.file_id]
                state.condemned.setdefault(one.file_id, one)
        return found

    async def begin_deletes(
        self, *, window_s: float, limit: int, dry_run: bool = False
    ) -> Sequence[CondemnedFile]:
        await self._lake.reach()
        state = self._lake.state
        before = self._after_s(-window_s)
        begun = [one for one in state.condemned.values() if one.state == "deleting"]
        due = [
            one
            for one in state.condemned.values()
            if one.state == "condemned" and one.condemned_at < before
        ]
        due.sort(key=_age)
        for one in due[: max(0, limit - len(begun))]:
            row = state.files.get(one.file_id)
            if (row is not None and self._is_needed(row)) or one.file_id in state.intents:
                if not dry_run:
                    del state.condemned[one.file_id]
            elif dry_run:
                begun.append(one)
            else:
                state.files.pop(one.file_id, None)
                state.condemned[one.file_id] = dataclasses.replace(one, state="deleting")
                begun.append(state.condemned[one.file_id])
        return sorted(begun, key=_age)

    async def note_deleted(self, file_ids: Sequence[uuid.UUID]) -> None:
        await self._lake.reach()
        condemned = self._lake.state.condemned
        for file_id in file_ids:
            one = condemned.get(file_id)
            if one is not None and one.state == "deleting":
                condemned[file_id] = dataclasses.replace(
                    one, state="deleted", deleted_at=self._lake.now()
                )

    async def condemned(
        self, *, state: str | None = None, limit: int = 1_000, before: dt.datetime | None = None
    ) -> Sequence[CondemnedFile]:
        await self._lake.reach()
        found = [
            one
            for one in self._lake.state.condemned.values()
            if state in (None, one.state) and (before is None or one.condemned_at < before)
        ]
        found.sort(key=lambda one: one.file_id.bytes)
        found.sort(key=lambda one: one.condemned_at, reverse=True)
        return found[:limit]

    async def intents(self) -> Sequence[Intent]:
        await self._lake.reach()
        intents = self._lake.state.intents.values()
        return sorted(intents, key=lambda intent: (intent.expires_at, intent.file_id.bytes))

    async def known_names(self, file_ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, str]:
        await self._lake.reach()
        state = self._lake.state
        known = {i: state.condemned[i].state for i in file_ids if i in state.condemned}
        known |= {i: "intended" for i in file_ids if i in state.intents}
        return known | {i: "used" for i in file_ids if i in state.files}

    async def forget_deleted(self, *, older_than_s: float, limit: int) -> int:
        await self._lake.reach()
        condemned, before = self._lake.state.condemned, self._after_s(-older_than_s)
        old = [
            one.file_id
            for one in condemned.values()
            if one.state == "deleted" and one.deleted_at is not None and one.deleted_at < before
        ][:limit]
        for file_id in old:
            del condemned[file_id]
        return len(old)

    def _is_needed(self, row: FileRow) -> bool:
        """By a snapshot that can be read, or by a pin."""

        last = row.last_snapshot
        return (
            last is None
            or self._lake.is_read(row)
            or any(
                (pin.floor is not None and pin.floor < last)
                or any(row.first_snapshot <= number < last for number in pin.snapshot_ids)
                for pin in self._live_pins()
            )
        )

    # --- plumbing ----------------------------------------------------------------------

    def _after_s(self, seconds: float) -> dt.datetime:
        return self._lake.now() + dt.timedelta(seconds=seconds)

    def _raise_not_retained(self, snapshot_id: int) -> None:
        state = self._lake.state
        if any(lo <= snapshot_id < hi for lo, hi in state.lost_snapshots):
            raise HistoryLost(f"snapshot {snapshot_id} belonged to a line of history that was lost")
        if snapshot_id not in state.snapshots:
            raise SnapshotNotFound(f"there is no snapshot {snapshot_id}")
        self._raise_expired(snapshot_id)

    def _raise_expired(self, snapshot_id: int) -> None:
        raise SnapshotExpired(
            f"snapshot {snapshot_id} has expired",
            oldest_snapshot_id=self._lake.state.oldest_snapshot_id,
        )


def _age(one: CondemnedFile) -> tuple[dt.datetime, bytes]:
    return one.condemned_at, one.file_id.bytes


def _orphan(intent: Intent, now: dt.datetime) -> CondemnedFile:
    keys = {
        "data": f"tables/{intent.table_id}/{intent.file_id}.parquet",
        "payload": f"bus/{intent.file_id}.segment",
        "canary": f"canary/{intent.file_id}.parquet",
    }
    key = keys[intent.kind]
    return CondemnedFile(
        intent.file_id, key, intent.table_id, "orphan", None, "condemned", now, None
    )
