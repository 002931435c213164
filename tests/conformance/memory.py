"""The harness of the in-memory lake, the model of the contract."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lakebus.clock import SystemClock
from storage.bus.interface import IngestBus
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.interface import Catalog
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_erasures import MemoryErasing
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.files.objects import ObjectStore
from storage.maintenance.erasing import Erasing
from storage.maintenance.interface import CondemnedFile, Upkeep
from storage.maintenance.jobs import JobStore
from storage.maintenance.memory_jobs import MemoryJobs
from storage.memory_clock import ManualClock
from storage.memory_lake import MemoryLake
from tests.conformance.harness import SUITE_SETTINGS, Capability, LakeHarness, LakeView


class MemoryHarness(LakeHarness):
    """The lake's state outlives its faces. Time stands still unless a test moves it; with `live`
    it runs, for tests of what polls and waits by the process's own clock."""

    capabilities = frozenset(
        {
            Capability.LOST_REPLIES,
            Capability.REMOVE_INTENT,
            Capability.EXPIRE_SNAPSHOTS,
            Capability.RESTORE,
        }
    )

    def __init__(self, settings: BusSettings, *, live: bool = False) -> None:
        super().__init__(settings)
        self._clock: ManualClock | SystemClock = SystemClock() if live else ManualClock()
        self.lake = MemoryLake(settings=settings, clock=self._clock, seed=7)
        self._view = self._new_view()

    @property
    def bus(self) -> IngestBus:
        return self._view.bus

    @property
    def catalog(self) -> Catalog:
        return self._view.catalog

    @property
    def upkeep(self) -> Upkeep:
        return self._view.upkeep

    @property
    def erasing(self) -> Erasing:
        return MemoryErasing(self.lake)

    @property
    def jobs(self) -> JobStore:
        return self._view.jobs

    def _new_view(self) -> LakeView:
        return LakeView(
            MemoryBus(self.lake),
            MemoryCatalog(self.lake),
            MemoryJobs(self.lake),
            MemoryUpkeep(self.lake),
        )

    async def second(self) -> LakeView:
        return self._new_view()

    async def advance_s(self, seconds: float) -> None:
        if isinstance(self._clock, ManualClock):
            self._clock.advance_s(seconds)
        else:
            await asyncio.sleep(seconds)

    async def restart(self) -> None:
        # A copy of what survives: whatever else the old faces knew or held is gone with them.
        self.lake = MemoryLake(settings=self.settings, clock=self._clock, state=self.lake.backup())
        self._view = self._new_view()

    async def lose_next_reply(self, operation: str) -> None:
        self.lake.faults.lose_replies.add(operation)

    async def remove_intent(self, file_id: Any) -> None:
        del self.lake.state.intents[file_id]

    async def expire_snapshots(self, *, before: int) -> None:
        self.lake.expire_snapshots(before=before)

    async def condemn_regardless(self, file_id: uuid.UUID, object_key: str) -> None:
        long_ago = self.lake.now() - dt.timedelta(days=1)
        self.lake.state.condemned[file_id] = CondemnedFile(
            file_id, object_key, None, "unreferenced", None, "condemned", long_ago, None
        )

    def keep_records_in(self, store: ObjectStore) -> None:
        self.lake.object_store = store

    async def take_backup(self) -> Any:
        return self.lake.backup()

    async def restore(self, backup: Any) -> None:
        self.lake.restore(backup)


class MemoryBackend:
    def __init__(self, *, live: bool = False) -> None:
        self._live = live

    @asynccontextmanager
    async def open(self, settings: BusSettings = SUITE_SETTINGS) -> AsyncIterator[MemoryHarness]:
        yield MemoryHarness(settings, live=self._live)
