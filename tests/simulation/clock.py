"""Clocks on the loop's virtual time.

The database's clock is the truth; a process has its own monotonic clock, with another zero, and a
wall clock that may be an hour wrong, which must change nothing (B5).
"""

from __future__ import annotations

import asyncio
import datetime as dt

from tests.simulation.event_loop import SimulatedLoop

_BEGIN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class SimulatedClock:
    """Satisfies `lakebus.clock.Clock`."""

    def __init__(self, loop: SimulatedLoop, *, zero_s: float = 0.0, wrong_s: float = 0.0) -> None:
        self._loop = loop
        self._zero_s = zero_s
        self._begin = _BEGIN + dt.timedelta(seconds=wrong_s)

    def step_s(self, seconds: float) -> None:
        """Somebody sets the wall clock."""

        self._begin += dt.timedelta(seconds=seconds)

    def monotonic_s(self) -> float:
        return self._loop.time() + self._zero_s

    def utc_now(self) -> dt.datetime:
        return self._begin + dt.timedelta(seconds=self._loop.time())

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
