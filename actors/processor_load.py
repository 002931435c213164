"""Whether the processors of this machine have better things to do than maintenance.

A rewrite is one busy thread. Where much of the machine is in use it takes its share from whoever
acknowledges and answers, also at a low priority: two hyperthreads share one core's units, and
neither knows of the other's priority. So what can wait does, while the machine is busy. Measured
is what the kernel has counted anyway, so nothing has to be guessed or told: ingest, queries and
strangers alike. It is a matter of speed only; whoever waits has a bound of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from lakebus.clock import Clock

#: From this share of all processors on the machine is busy. Idle it is below a tenth; a third of
#: two processors are two thirds of the one core that they often are.
BUSY_SHARE: Final = 1 / 3
#: It is calm again after so long below: a pause between two bursts of writes is none.
CALM_S: Final = 3.0
#: Looks follow each other no faster; the kernel counts in hundredths of a second.
_LOOK_EVERY_S: Final = 0.5
_STAT: Final = Path("/proc/stat")
_IDLE, _IOWAIT, _COLUMNS = 3, 4, 8  # what follows is contained in them

#: (time in use, all time) of all processors since the start, in one unit; None: nobody counts.
ReadTimes = Callable[[], tuple[int, int] | None]


def machine_times() -> tuple[int, int] | None:
    """As Linux counts them."""

    try:
        with _STAT.open("rb") as file:
            counted = [int(word) for word in file.readline().split()[1 : 1 + _COLUMNS]]
    except (OSError, ValueError):
        return None
    if len(counted) <= _IOWAIT:
        return None
    total = sum(counted)
    return total - counted[_IDLE] - counted[_IOWAIT], total


class ProcessorLoad:
    """Ask it every second or so: an answer is about the time since the last question."""

    def __init__(self, *, clock: Clock, read: ReadTimes = machine_times) -> None:
        self._clock = clock
        self._read = read
        self._times: tuple[int, int] | None = None
        self._looked_s = float("-inf")
        self._calm_since_s: float | None = None

    def busy(self, *, ours: bool) -> bool:
        """False after some seconds of calm, and where nobody counts. `ours`: jobs are at work, and
        what they take is not to be told from the rest; so nothing is known until they have ended.
        """

        now_s = self._clock.monotonic_s()
        if ours or now_s - self._looked_s >= _LOOK_EVERY_S:
            self._look(now_s, ours=ours)
        if self._times is None and not ours:
            return False
        return self._calm_since_s is None or now_s - self._calm_since_s < CALM_S

    def _look(self, now_s: float, *, ours: bool) -> None:
        before, before_s = self._times, self._looked_s
        self._times, self._looked_s = self._read(), now_s
        if ours or before is None or self._times is None:
            self._calm_since_s = None
            return
        used, total = self._times[0] - before[0], self._times[1] - before[1]
        if used >= BUSY_SHARE * total:
            self._calm_since_s = None
        elif self._calm_since_s is None:
            self._calm_since_s = before_s
