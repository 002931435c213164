"""A clock that moves only when told: for the in-memory lake, tests and seeded simulations.

It serves as the database's clock of a `MemoryLake` and, through `sleep_s`, paces local loops on
the same line of time. Used from one event loop.
"""

from __future__ import annotations

import asyncio
import datetime as dt

_BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class ManualClock:
    """Satisfies `lakebus.clock.Clock`; time stands still between calls of `advance_s`."""

    def __init__(self, begin: dt.datetime = _BEGIN) -> None:
        self._begin = begin
        self._elapsed = dt.timedelta()
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic_s(self) -> float:
        return self._elapsed.total_seconds()

    def utc_now(self) -> dt.datetime:
        return self._begin + self._elapsed

    async def sleep_s(self, seconds: float) -> None:
        """Returns once the clock was moved far enough."""

        if seconds <= 0:
            await asyncio.sleep(0)
            return
        event = asyncio.Event()
        sleeper = (self.monotonic_s() + seconds, event)
        self._sleepers.append(sleeper)
        try:
            await event.wait()
        finally:
            self._sleepers.remove(sleeper)

    def advance_s(self, seconds: float) -> None:
        """Moves time forward and wakes whoever slept until then. Never backwards."""

        if seconds < 0:
            raise ValueError("the clock only moves forward")
        self._elapsed += dt.timedelta(seconds=seconds)
        for deadline, event in self._sleepers:
            if deadline <= self.monotonic_s():
                event.set()
