"""The brake on new files: publishes less often while compaction does not keep up.

Every round of claims makes at least one file a table, and each file that a query lists costs it
time. When writers make files faster than compaction merges them there is no end to it: queries slow
down, and so does compaction. So a coordinator looks at the most small files that any table has, and
above a bound it lingers longer between rounds, up to a limit. As many rows then become fewer and
larger files. What is paid is freshness, at most the limit, by a lake whose readers wait for
hundreds of files anyway; no row is refused and none is late at its acknowledgement.

It is a matter of speed only. A look that fails changes nothing. Where nothing is claimed nobody
looks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from actors.pacing import Linger
from lakebus.clock import Clock
from lakebus.errors import OutcomeUnknown, RetryLater
from lakebus.telemetry import Metrics

_LOG = logging.getLogger(__name__)

#: In units of the small files that a table may keep: from here on, and here as much as may be.
FREE_FACTOR: Final = 4
FULL_FACTOR: Final = 40
#: Looks follow each other no faster, and take at most a fiftieth of the time.
_LOOK_EVERY_S: Final = 2.0
_LOOK_SHARE: Final = 50
#: Without a claim for so long, longer than any pause, there is nothing to slow down.
_IDLE_S: Final = 15.0

#: The most small files that any table has. Raises RetryLater.
CountSmallFiles = Callable[[], Awaitable[int]]


class FilesBrake:
    """Sets how long a `Linger` lingers at least.

    :param small_files_max: how many small files a table may keep when compaction keeps up.
    :param linger_s_max: the longest pause.
    """

    def __init__(
        self,
        *,
        count: CountSmallFiles,
        small_files_max: int,
        linger_s_max: float,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._count = count
        self._free = FREE_FACTOR * small_files_max
        self._full = FULL_FACTOR * small_files_max
        self._linger_s_max = linger_s_max
        self._clock = clock
        self._metrics = metrics
        self._braking = False

    def linger_s(self, small_files: int) -> float:
        """Nothing up to the first bound, then in proportion, the longest from the second on."""

        share = (small_files - self._free) / (self._full - self._free)
        return self._linger_s_max * min(max(share, 0.0), 1.0)

    async def look(self, linger: Linger) -> float:
        """Looks, if anything was claimed lately; answers when to look again."""

        began_s = self._clock.monotonic_s()
        small_files = 0
        if linger.idle_s() < _IDLE_S:
            try:
                small_files = await self._count()
            except (RetryLater, OutcomeUnknown) as error:
                _LOG.info("small files could not be counted: %s", error)
                return _LOOK_EVERY_S
        pause_s = self.linger_s(small_files)
        linger.slow_down(pause_s)
        self._metrics.gauge("lakebus_brake_linger_seconds", pause_s)
        if (pause_s > 0) is not self._braking:
            self._braking = pause_s > 0
            self._tell(small_files)
        return max(_LOOK_EVERY_S, _LOOK_SHARE * (self._clock.monotonic_s() - began_s))

    def _tell(self, small_files: int) -> None:
        if self._braking:
            _LOG.warning(
                "a table has %d small files: compaction does not keep up; rows become visible "
                "later, in fewer and larger files",
                small_files,
            )
        else:
            _LOG.info("no table has too many small files any more")
