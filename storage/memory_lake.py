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
from storage.catalog.interface import HistoryFork, LakeIdentity
from storage.memory_state import LakeState, ShardRow

_MICROSECOND = dt.timedelta(microseconds=1)

#: How far a restore skips every counter past what the lost line can have issued (F3).
HISTORY_SKIP = 1_000_000


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
        return len(self.state.histories)

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

        lost_from = backup.snapshots[backup.head_id].published_at
        state = copy.deepcopy(backup)
        self.state = state
        state.last_epoch += HISTORY_SKIP
        state.last_lease_id += HISTORY_SKIP
        state.last_segment_id += HISTORY_SKIP
        fork = HistoryFork(
            history=self.new_uuid(),
            parent=state.histories[-1].history,
            snapshot_id=state.head_id,
            positions=self.ends(),
        )
        for shard in state.shards:
            shard.gaps[shard.end] = shard.done[shard.end] = shard.end + HISTORY_SKIP
            shard.end += HISTORY_SKIP
            advance_watermark(shard)
        first_id = state.head_id + HISTORY_SKIP
        state.lost_snapshots.append((state.head_id + 1, first_id))
        at = self.next_publish_time()
        state.lost_times.append((lost_from, at))
        state.histories.append(fork)
        self._become_head(
            Snapshot(first_id, state.head_id, fork.history, at, "restore", self.watermark())
        )

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
