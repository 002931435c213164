"""Holds: the right to read the files of a snapshot, as queries see it (E3).

`storage.reading.pins` gives them and says why they are true. A hold knows the row of the database
that it relies on (a grant), and looks at the clock itself: it is broken from the moment on from
which that row may have expired, whether or not anybody has noticed.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from lakebus.clock import Clock, SystemClock
from lakebus.errors import Unavailable

#: A snapshot, and whether the ones after it are wanted, too.
Want = tuple[int, bool]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a call asks for."""

    floor: int
    snapshot_ids: frozenset[int] = frozenset()

    def covers(self, want: Want) -> bool:
        snapshot_id, onward = want
        return snapshot_id >= self.floor or (not onward and snapshot_id in self.snapshot_ids)


class Grant:
    """One row: what the database has agreed to, and who relies on it until `stops_s`."""

    __slots__ = ("doubts", "holds", "pin_id", "proposal", "stops_s", "timer")

    def __init__(self, pin_id: uuid.UUID, proposal: Proposal, stops_s: float) -> None:
        self.pin_id = pin_id
        self.proposal = proposal
        self.stops_s = stops_s
        self.doubts: list[Proposal] = []
        self.holds: set[Hold] = set()
        self.timer: asyncio.TimerHandle | None = None

    def covers(self, want: Want) -> bool:
        if not self.proposal.covers(want):
            return False
        return not self.doubts or all(doubt.covers(want) for doubt in self.doubts)


class Hold:
    """The right to read the files of a snapshot (and those after it), until it is released or
    broken."""

    __slots__ = ("_broken", "_clock", "_grant", "_on_broken", "_on_released", "want")

    def __init__(self, want: Want, grant: Grant, clock: Clock) -> None:
        self.want = want
        self._grant = grant
        self._clock = clock
        self._broken = False
        self._on_broken: Callable[[], object] | None = None
        self._on_released: Callable[[], object] | None = None
        grant.holds.add(self)

    def check(self) -> None:
        """Raises Unavailable when the files may be gone: nothing read after this moment counts."""

        if not self._broken and self._clock.monotonic_s() >= self._grant.stops_s:
            self.break_now()
        if self._broken:
            raise Unavailable(
                "this server lost its claim on the files of the snapshot, because the catalog did "
                "not answer in time; send the query again",
                retry_after_s=1.0,
            )

    def when_broken(self, stop: Callable[[], object] | None) -> None:
        """`stop` is called when the hold breaks, in place of what was set before."""

        self._on_broken = stop
        if self._broken and stop is not None:
            stop()

    def when_released(self, end: Callable[[], object]) -> None:
        """`end` is called once, at `release`, which follows a break too."""

        self._on_released = end

    def guarded(self) -> _Guard:
        """A block (`async with`) that is cancelled when the hold breaks. Raises Unavailable then,
        and before and after it when the hold is broken."""

        return _Guard(self)

    def release(self) -> None:
        """May be repeated."""

        self._on_broken = None
        self._grant.holds.discard(self)
        if self._on_released is not None:
            end, self._on_released = self._on_released, None
            end()

    def move(self, grant: Grant) -> None:
        self._grant.holds.discard(self)
        self._grant = grant
        grant.holds.add(self)

    def break_now(self) -> None:
        if self._broken:
            return
        self._broken = True
        self._grant.holds.discard(self)
        if self._on_broken is not None:
            self._on_broken()


class _Guard:
    """As `asyncio.timeout`, without a time; it is entered for each query, so it is kept light."""

    __slots__ = ("_cancelling", "_hold", "_stopped", "_task")

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._stopped = False
        self._cancelling = 0
        self._task: asyncio.Task[object] | None = None

    async def __aenter__(self) -> None:
        self._hold.check()
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._hold.when_broken(self._stop)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hold.when_broken(None)
        if self._stopped and self._task is not None:
            ours = self._task.uncancel() <= self._cancelling
            if ours and kind is asyncio.CancelledError:
                self._hold.check()
        if kind is None:
            self._hold.check()

    def _stop(self) -> None:
        # Who breaks the hold from inside the block hears of it by itself.
        if self._task is not None and self._task is not asyncio.current_task():
            self._stopped = True
            self._task.cancel()


class Pins(Protocol):
    """Who gives holds."""

    async def hold(self, snapshot_id: int, *, onward: bool = False) -> Hold:
        """`onward`: the snapshots after it, too. Raises SnapshotExpired when the snapshot is not
        retained any more (onward: not without a tag), Unavailable."""
        ...


@asynccontextmanager
async def held(pins: Pins, snapshot_id: int, *, onward: bool = False) -> AsyncIterator[Hold]:
    """A hold for a block that reads everything it needs. Raises what `hold` and `guarded` raise."""

    hold = await pins.hold(snapshot_id, onward=onward)
    try:
        async with hold.guarded():
            yield hold
    finally:
        hold.release()


class Unpinned:
    """For a lake whose files nobody deletes: its holds never end."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._grant = Grant(uuid.UUID(int=0), Proposal(0), math.inf)

    async def hold(self, snapshot_id: int, *, onward: bool = False) -> Hold:
        return Hold((snapshot_id, onward), self._grant, self._clock)
