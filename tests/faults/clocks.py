"""Clocks that are wrong, for everything that takes a `lakebus.clock.Clock`.

None of them may change who holds what and when: leases, order and visibility are decided by the
database's clock (contract B5, C4). The wall clock may do anything. A monotonic clock never goes
back, but its zero means nothing, and it may stand still (a suspended machine: CLOCK_MONOTONIC does
not count that time) or run past many seconds at once (a paused process).

`sleep_s` always sleeps in real time: a wrong clock does not change how long a timer runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import itertools
import time
from collections.abc import Callable, Mapping

from lakebus.clock import Clock

HOUR_S = 3_600.0


@dataclasses.dataclass(frozen=True, slots=True)
class WrongClock:
    """The machine's clocks, off by so much at each reading."""

    wall_off_s: Callable[[], float]
    monotonic_off_s: Callable[[], float] = lambda: 0.0

    def monotonic_s(self) -> float:
        return time.monotonic() + self.monotonic_off_s()

    def utc_now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.wall_off_s())

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def skewed(off_s: float) -> WrongClock:
    """Always wrong by the same amount; its monotonic zero lies elsewhere, too."""

    return WrongClock(wall_off_s=lambda: off_s, monotonic_off_s=lambda: off_s)


def jumping(*offs_s: float) -> WrongClock:
    """A wall clock that is wrong by another amount at each reading, round and round."""

    turn = itertools.cycle(offs_s or (HOUR_S, -HOUR_S, 0.0))
    return WrongClock(wall_off_s=lambda: next(turn))


class SuspendedClock:
    """A machine that is suspended and woken: `suspend_s` lets time pass that its monotonic clock
    never saw, so that it believes in its leases for longer than it may."""

    def __init__(self) -> None:
        self._unseen_s = 0.0

    def suspend_s(self, seconds: float) -> None:
        self._unseen_s += seconds

    def monotonic_s(self) -> float:
        return time.monotonic() - self._unseen_s

    def utc_now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC)

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


#: Makers of clocks by name, so that a child process can be told which one to take.
WRONG_CLOCKS: Mapping[str, Callable[[], Clock]] = {
    "an hour ahead": lambda: skewed(HOUR_S),
    "an hour behind": lambda: skewed(-HOUR_S),
    "jumping": jumping,
}
