"""When a compaction is worth a job: enough small files, something to merge, and a time for it.

* A lake at rest costs one look at its head.
* What the job would do first is done here, for tables that are not large: its plan. A job that
  would find nothing is not begun, and no process started for it.
* While the machine is busy (`actors.processor_load`) a compaction waits. What it costs is taken
  from those who write, and what it merges is more when it comes later: a row that was merged with
  more others is merged less often. Nobody waits for long: until a table has `BUSY_FACTOR` times the
  small files that it may keep, which is half of what slows publishing down (`actors.brake`), and at
  most `PATIENCE` periods. What is begun then merges small files only. Larger ones harm nobody soon:
  they wait for calm, or for the time after which every table is looked at.
* A compaction that somebody asks for is no matter of this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from actors.settings import MaintainerSettings
from lakebus.clock import Clock
from storage.catalog.interface import Catalog
from storage.maintenance.interface import Upkeep
from storage.maintenance.planning import plan_rewrites
from storage.maintenance.settings import MaintenanceSettings

#: In units of the small files that a table may keep, and of the period.
BUSY_FACTOR: Final = 2
PATIENCE: Final = 3
#: A table that is over its bound of small files is compacted so many times as often.
HURRY: Final = 5
#: A plan is made here of so many files at most; of more the job finds out.
_FILES_MAX: Final = 1_000


class Due(Enum):
    """What a job is to merge: small files, or whatever is due."""

    SMALL = "small"
    ALL = "all"


class CompactionDue:
    """`look` at each tick; `submitted` when its answer was followed."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        upkeep: Upkeep,
        settings: MaintainerSettings,
        maintenance: MaintenanceSettings,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._upkeep = upkeep
        self._settings = settings
        self._maintenance = maintenance
        self._clock = clock
        self._looked_at: int | None = None
        self._at_rest = False
        self._in_vain = False
        self._last_s = clock.monotonic_s() - settings.compact_every_s
        self._all_s = self._last_s
        self._owed = True  # whatever was due when this process began
        self._waiting_since_s: float | None = None
        self._head = 0

    async def look(self, *, busy: bool) -> Due | None:
        """By its period when there is something to merge, sooner when a table is over its bound,
        and after a longer while, or when it is calm again, in any table that has files to merge.
        `busy`: what can wait does."""

        settings, now_s = self._settings, self._clock.monotonic_s()
        since_s = now_s - self._last_s
        if since_s < settings.compact_every_s / (1 if self._in_vain else HURRY):
            return None
        late = now_s - self._all_s >= settings.retain_every_s
        everywhere = late or (self._owed and not busy)
        self._head = (await self._catalog.head()).snapshot_id
        if self._head == self._looked_at and (self._at_rest or not everywhere):
            return None
        counts = await self._upkeep.file_counts(small_bytes=self._maintenance.small_file_bytes)
        most = max((small for _, small in counts.values()), default=0)
        over = most > self._maintenance.small_files_max
        if not over and not everywhere and most < self._maintenance.inputs_min:
            self._rest(everywhere=False)
            return None
        if not over and since_s < settings.compact_every_s:
            return None
        if busy and self._may_wait(most, now_s):
            return None
        due = Due.SMALL if busy and not late else Due.ALL
        if not await self._finds_something(counts, due, everywhere=everywhere):
            self._rest(everywhere=everywhere)
            self._looked(due, everywhere=everywhere)
            self._in_vain = True
            return None
        return due

    def submitted(self, due: Due) -> None:
        self._looked(due, everywhere=due is Due.ALL)
        # What is published from here on, by the compaction too, is a reason to look again.
        self._looked_at, self._at_rest, self._in_vain = self._head, False, False

    def _looked(self, due: Due, *, everywhere: bool) -> None:
        self._last_s = self._clock.monotonic_s()
        self._waiting_since_s = None
        if everywhere:
            self._all_s, self._owed = self._last_s, False
        elif due is Due.SMALL:
            self._owed = True

    def _rest(self, *, everywhere: bool) -> None:
        self._looked_at, self._at_rest = self._head, everywhere
        self._waiting_since_s = None

    def _may_wait(self, most: int, now_s: float) -> bool:
        if most > BUSY_FACTOR * self._maintenance.small_files_max:
            return False
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        return now_s - self._waiting_since_s < PATIENCE * self._settings.compact_every_s

    async def _finds_something(
        self, counts: Mapping[int, tuple[int, int]], due: Due, *, everywhere: bool
    ) -> bool:
        """Whether a job's first plans would be any, tables with the most small files first."""

        least = self._maintenance.inputs_min
        wanted = {
            number: (files, small)
            for number, (files, small) in counts.items()
            if small >= least or (everywhere and files > 1)
        }
        if sum(files for files, _ in wanted.values()) > _FILES_MAX:
            return True
        schemas = {
            state.schema.table_id: state.schema
            for state in await self._catalog.tables()
            if state.schema.table_id in wanted
        }
        for number in sorted(schemas, key=lambda number: (-wanted[number][1], number)):
            files = await self._upkeep.live_files(number)
            small_only = due is Due.SMALL
            if plan_rewrites(schemas[number], files, self._maintenance, small_only=small_only):
                return True
        return False
