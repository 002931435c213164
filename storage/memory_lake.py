"""The in-memory lake: one control plane that the in-memory bus and catalog share.

It is the model of the contract: the same meaning as the PostgreSQL backend, held to the same
suite (`tests/conformance`), with time, chance and faults injected. It is for tests, simulations
and tools that need no durability; nothing of it survives its process.

Why it is safe: all state changes happen inside plain functions between two awaits of one event
loop, so each is a transaction by construction. It must not be shared by threads.
"""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lakebus.clock import Clock, SystemClock
from lakebus.errors import Unavailable
from lakebus.snapshots import Snapshot
from lakebus.tokens import TokenCodec
from storage.bus.settings import BusSettings
from storage.catalog.interface import HistoryFork, LakeIdentity, PublishedRange
from storage.files.objects import ObjectStore
from storage.memory_state import FileRow, LakeState, RangeRow, ShardRow

_MICROSECOND = dt.timedelta(microseconds=1)

#: How far a restore skips every counter past what the lost line can have issued (F3), those of
#: tables, and the versions and column ids that a line may give to one table.
HISTORY_SKIP = 1_000_000
TABLE_SKIP = 10_000


@dataclass(slots=True)
class MemoryFaults:
    """Faults to inject. `lose_replies` holds operation names ("append", "publish"): the next call
    takes effect and its reply is lost. `unreachable` refuses every call before any effect."""

    lose_replies: set[str] = field(default_factory=set)
    unreachable: bool = False

    def take_lost_reply(self, operation: str) -> bool:
        if operation in self.lose_replies:
            self.lose_replies.discard(operation)
            return True
        return False


class MemoryLake:
    """The shared control plane. `clock` plays the database's clock; `seed` makes ids repeat."""

    def __init__(
        self,
        *,
        settings: BusSettings | None = None,
        clock: Clock | None = None,
        seed: int | None = None,
        state: LakeState | None = None,
    ) -> None:
        self.settings = settings or BusSettings()
        self.clock = clock or SystemClock()
        self.faults = MemoryFaults()
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()
        #: Where records of erasures lie, for who restores; None: there are none.
        self.object_store: ObjectStore | None = None
        self._watchers: list[Callable[[Snapshot], None]] = []
        self.state = state or self._genesis()
        self.codec = TokenCodec(self.state.token_secret)

    # --- time, chance, faults ---------------------------------------------------------------

    def now(self) -> dt.datetime:
        return self.clock.utc_now()

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self._random.getrandbits(128), version=4)

    async def reach(self) -> None:
        """One round trip: a scheduling point before every effect. Raises Unavailable."""

        await asyncio.sleep(0)
        if self.faults.unreachable:
            raise Unavailable("the in-memory lake was told to be unreachable")

    # --- what everybody reads ---------------------------------------------------------------

    @property
    def identity(self) -> LakeIdentity:
        state = self.state
        return LakeIdentity(state.lake_id, state.token_secret, tuple(state.histories))

    @property
    def history(self) -> uuid.UUID:
        return self.state.histories[-1].history

    @property
    def history_serial(self) -> int:
        return self.state.history_serial

    @property
    def schema_floor(self) -> int:
        """Versions and column ids of this line are above it, so that no two lines share one."""

        return (self.history_serial - 1) * TABLE_SKIP

    @property
    def head(self) -> Snapshot:
        return self.state.snapshots[self.state.head_id]

    def watermark(self) -> dict[int, int]:
        return {number: shard.watermark for number, shard in enumerate(self.state.shards)}

    def ends(self) -> dict[int, int]:
        return {number: shard.end for number, shard in enumerate(self.state.shards)}

    # --- the head ---------------------------------------------------------------------------

    def next_publish_time(self) -> dt.datetime:
        """Later than the clock, every earlier publication, and every time already closed (C4)."""

        return max(
            self.now(),
            self.head.published_at + _MICROSECOND,
            self.state.closed_until + _MICROSECOND,
        )

    def next_snapshot(
        self, operation: str, summary: Mapping[str, object], *, at: dt.datetime
    ) -> Snapshot:
        """Makes the next snapshot the head, with the watermark as it stands, and tells watchers."""

        state = self.state
        snapshot = Snapshot(
            snapshot_id=state.head_id + 1,
            parent_id=state.head_id,
            history=self.history,
            published_at=at,
            operation=operation,
            watermark=self.watermark(),
            summary=summary,
        )
        self._become_head(snapshot)
        return snapshot

    def watch_head(self, watcher: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Calls `watcher` after each publication, a hint as NOTIFY is. Returns the unsubscribe."""

        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def retained(self, snapshot_id: int) -> bool:
        """Whether it can be read: it has not expired, or a tag keeps it."""

        state = self.state
        return snapshot_id in state.snapshots and (
            snapshot_id >= state.oldest_snapshot_id
            or any(tag.snapshot_id == snapshot_id for tag in state.tags.values())
        )

    def is_read(self, row: FileRow) -> bool:
        """Whether a snapshot that can be read needs the file."""

        last = row.last_snapshot
        return (
            last is None
            or last > self.state.oldest_snapshot_id
            or any(row.first_snapshot <= t.snapshot_id < last for t in self.state.tags.values())
        )

    def expire_snapshots(self, *, before: int) -> None:
        """Forgets snapshots older than `before`; what they held alone leaves the manifest."""

        state = self.state
        state.oldest_snapshot_id = max(state.oldest_snapshot_id, min(before, state.head_id))

    # --- restart, backup, restore -----------------------------------------------------------

    def backup(self) -> LakeState:
        """A consistent copy of everything that survives a restart."""

        return copy.deepcopy(self.state)

    def restore(self, backup: LakeState) -> None:
        """Begins a new line of history at `backup` (F3).

        Every counter skips past what the lost line can have issued, so no epoch, position or
        snapshot id is ever given twice; the positions skipped count as terminal.
        """

        lost, state = self.state, copy.deepcopy(backup)
        # What was closed before the backup is closed in both lines; what came later was lost.
        lost_from = max(backup.snapshots[backup.head_id].published_at, backup.closed_until)
        lost_until = max(lost.snapshots[lost.head_id].published_at, lost.closed_until)
        self.state = state
        for name in ("last_epoch", "last_lease_id", "last_segment_id", "last_quarantine_id"):
            setattr(state, name, max(getattr(state, name), getattr(lost, name)) + HISTORY_SKIP)
        known_tables = max((*state.tables, *lost.tables, lost.table_id_floor), default=0)
        state.table_id_floor = known_tables + TABLE_SKIP
        state.history_serial = max(state.history_serial, lost.history_serial) + 1
        for row in state.ranges.values():
            self._end_lease(row)
        fork = HistoryFork(
            history=self.new_uuid(),
            parent=state.histories[-1].history,
            snapshot_id=state.head_id,
            positions=self.ends(),
        )
        first_id = max(state.head_id, lost.head_id) + HISTORY_SKIP
        for number, shard in enumerate(state.shards):
            end = max(shard.end, lost.shards[number].end) + HISTORY_SKIP
            shard.gaps[shard.end] = shard.done[shard.end] = end
            state.published_ranges.append(PublishedRange(number, shard.end, end, first_id))
            shard.end = end
            advance_watermark(shard)
        state.lost_snapshots.append((state.head_id + 1, first_id))
        at = max(self.next_publish_time(), lost_until + _MICROSECOND)
        state.lost_times.append((lost_from, at))
        state.histories.append(fork)
        self._become_head(
            Snapshot(first_id, state.head_id, fork.history, at, "restore", self.watermark())
        )

    def _end_lease(self, row: RangeRow) -> None:
        """Whoever held it on the lost line fails every later check: the epoch is new."""

        self.state.last_epoch += 1
        row.epoch = self.state.last_epoch
        if row.leased:
            row.leased, row.owner, row.canary, row.not_before = False, None, False, self.now()

    def _become_head(self, snapshot: Snapshot) -> None:
        self.state.snapshots[snapshot.snapshot_id] = snapshot
        self.state.head_id = snapshot.snapshot_id
        for watcher in tuple(self._watchers):
            watcher(snapshot)

    def _genesis(self) -> LakeState:
        """Snapshot 1: no tables, nothing terminal."""

        history, now = self.new_uuid(), self.now()
        shards = [ShardRow() for _ in range(self.settings.shards)]
        zeros = dict.fromkeys(range(len(shards)), 0)
        return LakeState(
            lake_id=self.new_uuid(),
            token_secret=self._random.getrandbits(256).to_bytes(32, "big"),
            shards=shards,
            histories=[HistoryFork(history, None, 0, {})],
            snapshots={1: Snapshot(1, None, history, now, "genesis", zeros)},
            head_id=1,
            closed_until=now,
            oldest_snapshot_id=1,
        )


def advance_watermark(shard: ShardRow) -> None:
    """Moves the watermark over the longest prefix of terminal ranges; never back (C3)."""

    while (hi := shard.done.pop(shard.watermark, None)) is not None:
        shard.watermark = hi
