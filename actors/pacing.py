"""How fast a loop may go: linger under load, back off after failures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from lakebus.clock import SYSTEM_CHANCE, Chance, Clock

#: Under load a pause is so many times as long as the processor time between two beginnings, and so
#: many times more for each time that entries come as fast as what is load at all: the more of them
#: there are, the more the doors need the processor, and the less is left to publishing.
PAUSE_COSTS: Final = 2.0
PAUSE_COSTS_LOAD: Final = 0.75
#: What one more cost weighs against those before it.
_COST_WEIGHT: Final = 0.25
#: In longest pauses: what was spent in a longer time is no cost of one beginning.
_COST_PAUSES_MAX: Final = 4.0


class Linger:
    """Least time between two beginnings under load, none after idle.

    Load is what was begun within the last linger: a lone writer that waits for its rows before it
    writes again sees no linger; eight such writers do, because one range then serves them all.

    :param linger_s: the shortest pause; 0: there is none.
    :param entries_min: fewer entries than this begun within `linger_s`, and in proportion within a
        longer pause, are no load.
    :param load_s_max: the longest pause that load makes; not longer than `linger_s`: pauses do not
        grow with what they save.
    :param spent_s: the processor time that this process has taken, in seconds.
    """

    def __init__(
        self,
        *,
        linger_s: float,
        entries_min: int,
        clock: Clock,
        load_s_max: float = 0.0,
        spent_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._linger_s = linger_s
        self._entries_min = entries_min
        self._clock = clock
        self._load_s_max = load_s_max if load_s_max > linger_s > 0 else 0.0
        self._spent_s = spent_s
        self._spent_before_s = 0.0
        self._entries = 0
        self._grown_s = 0.0
        self._slowed_s = 0.0
        self._last_s = float("-inf")
        self._begun: deque[tuple[float, int]] = deque()

    def slow_down(self, least_s: float) -> None:
        """From now on lingers so long at least, whatever was begun; 0: as by its settings."""

        self._slowed_s = least_s

    @property
    def pause_s(self) -> float:
        """The pause between two beginnings under load."""

        return max(self._linger_s, self._slowed_s, self._grown_s)

    def idle_s(self) -> float:
        """How long ago anything was begun; infinity for never."""

        return self._clock.monotonic_s() - self._last_s

    def begin(self, entries: int) -> None:
        idle_s, self._last_s = self.idle_s(), self._clock.monotonic_s()
        if self._load_s_max > 0:
            self._grow(idle_s)
        self._entries = entries
        self._begun.append((self._last_s, entries))

    def carry(self, entries: int) -> None:
        """Adds to what was begun last, without beginning anew."""

        self._entries += entries
        began_s, before = self._begun.pop() if self._begun else (self._clock.monotonic_s(), 0)
        self._begun.append((began_s, before + entries))

    def delay_s(self) -> float:
        """How long to wait before the next beginning."""

        pause_s = self.pause_s
        return self._begun[-1][0] + pause_s - self._clock.monotonic_s() if self.loaded() else 0.0

    def loaded(self) -> bool:
        """Whether what was begun within the last pause is load."""

        begun, pause_s = self._begun, self.pause_s
        after_s = self._clock.monotonic_s() - pause_s
        while begun and begun[0][0] <= after_s:
            begun.popleft()
        if self._slowed_s > self._linger_s or not begun:
            return bool(begun)
        entries_min = self._entries_min * pause_s / self._linger_s
        return sum(entries for _, entries in begun) >= entries_min

    def _grow(self, since_s: float) -> None:
        """Sets the pause by what was begun and spent since the last beginning. Very much makes the
        longest one, so that it is soon forgotten."""

        before_s, self._spent_before_s = self._spent_before_s, self._spent_s()
        if not 0 < since_s <= _COST_PAUSES_MAX * self._load_s_max:
            return
        load = self._entries / since_s * self._linger_s / max(1, self._entries_min)
        costs = PAUSE_COSTS + PAUSE_COSTS_LOAD * load
        wanted_s = costs * (self._spent_before_s - before_s)
        self._grown_s += _COST_WEIGHT * (min(wanted_s, self._load_s_max) - self._grown_s)


class ClaimPace:
    """Rounds of claims: one a shard, back to back; then, under load, a linger.

    A range that is large already says that there is a backlog: then nothing lingers.
    """

    def __init__(
        self, *, shards: int, linger: Linger, entries_large: int, bytes_large: int
    ) -> None:
        self._shards = shards
        self._linger = linger
        self._entries_large = entries_large
        self._bytes_large = bytes_large
        self._seen: set[int] = set()
        self._over = True
        self._backlog = False

    def claimed(self, shard: int, entries: int, *, more: bool = True) -> None:
        """`more`: whether there may be something else to claim."""

        if self._over:
            self._seen.clear()
            self._linger.begin(0)
        again = shard in self._seen
        self._seen.add(shard)
        self._linger.carry(entries)
        self._over = again or not more or len(self._seen) >= self._shards
        self._backlog = entries >= self._entries_large

    @property
    def over(self) -> bool:
        """Whether the next claim begins a round."""

        return self._over

    def nothing_claimed(self) -> None:
        self._over = True
        self._backlog = False

    def note_bytes(self, range_bytes: int) -> None:
        """The size of the last claimed range, once it is known."""

        self._backlog = self._backlog or range_bytes >= self._bytes_large

    def delay_s(self) -> float:
        return self._linger.delay_s() if self._over and not self._backlog else 0.0


class Backoff:
    """Doubling waits with jitter, so that many workers do not come back at one moment."""

    def __init__(
        self, *, first_s: float, most_s: float, clock: Clock, chance: Chance = SYSTEM_CHANCE
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._clock = clock
        self._chance = chance
        self._until_s = float("-inf")
        self._since_s: float | None = None
        self.failures = 0

    def fail(self) -> float:
        """Counts a failure; returns how long to wait now."""

        now = self._clock.monotonic_s()
        if self._since_s is None:
            self._since_s = now
        whole = min(self._most_s, self._first_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        wait_s = whole * (1.0 + self._chance.jitter()) / 2
        self._until_s = now + wait_s
        return wait_s

    def worth_telling(self) -> bool:
        """True for the first failure in a row, the second, the fourth …: a log is no heartbeat."""

        return self.failures & (self.failures - 1) == 0

    def succeed(self) -> None:
        self.failures = 0
        self._since_s = None
        self._until_s = float("-inf")

    def delay_s(self) -> float:
        return max(0.0, self._until_s - self._clock.monotonic_s())

    def failing_for_s(self) -> float:
        return 0.0 if self._since_s is None else self._clock.monotonic_s() - self._since_s
