"""Live tables by name, as the door remembers them between requests.

A stale entry is harmless where it matters: the append transaction checks table and schema version
again (A12). What the cache must never do is refuse on old knowledge, so every refusal looks again
with `fresh` first: a table made or altered through another replica a moment ago is known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from lakebus.clock import Clock, SystemClock
from storage.catalog.interface import Catalog, TableState

_ENTRIES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class _Kept:
    state: TableState
    until_s: float


class TableCache:
    """`age_s`: how long an entry is used unasked. Missing tables are never remembered."""

    def __init__(self, catalog: Catalog, *, clock: Clock | None = None, age_s: float = 1.0) -> None:
        self._catalog = catalog
        self._clock = clock or SystemClock()
        self._age_s = age_s
        self._kept: dict[str, _Kept] = {}
        self._asking: dict[str, asyncio.Task[TableState | None]] = {}

    async def state(self, name: str) -> TableState | None:
        """The table as known here, at most `age_s` old. Raises Unavailable."""

        known = self.remembered(name)
        if known is not None:
            return known
        # Many requests for one table find the entry old at the same moment: one of them asks.
        task = self._asking.get(name)
        if task is None:
            task = asyncio.create_task(self.fresh_state(name))
            self._asking[name] = task
            task.add_done_callback(lambda done: self._asked(name, done))
        return await asyncio.shield(task)

    def remembered(self, name: str) -> TableState | None:
        """The table as known here, at most `age_s` old; None when that has to be asked."""

        kept = self._kept.get(name)
        return kept.state if kept is not None and kept.until_s > self._clock.monotonic_s() else None

    def knew(self, name: str) -> bool:
        """True when the table was there a while ago."""

        return name in self._kept

    async def fresh_state(self, name: str) -> TableState | None:
        """The table as the catalog knows it after this call began. Raises Unavailable."""

        asked_s = self._clock.monotonic_s()
        state = await self._catalog.table(name)
        if state is None:
            self._kept.pop(name, None)
        else:
            if len(self._kept) >= _ENTRIES_MAX:
                self._kept.clear()
            self._kept[name] = _Kept(state, asked_s + self._age_s)
        return state

    def forget(self, name: str) -> None:
        self._kept.pop(name, None)

    async def names(self) -> Sequence[str]:
        """The names of all live tables, for suggestions."""

        return [state.schema.name for state in await self._catalog.tables()]

    def _asked(self, name: str, task: asyncio.Task[TableState | None]) -> None:
        self._asking.pop(name, None)
        if not task.cancelled():
            task.exception()
