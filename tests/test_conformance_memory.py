"""The conformance suite on the in-memory lake, the model of the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from storage.bus.interface import IngestBus
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.interface import Catalog
from storage.catalog.memory import MemoryCatalog
from storage.memory_clock import ManualClock
from storage.memory_lake import MemoryLake
from tests.conformance.fixtures import *  # noqa: F403
from tests.conformance.harness import Backend, Capability, LakeHarness, LakeView
from tests.conformance.machine import run_machine
from tests.conformance.suite import *  # noqa: F403


class MemoryHarness(LakeHarness):
    """Time stands still unless a test moves it; the lake's state outlives its faces."""

    capabilities = frozenset(
        {
            Capability.LOST_REPLIES,
            Capability.REMOVE_INTENT,
            Capability.EXPIRE_SNAPSHOTS,
            Capability.RESTORE,
        }
    )

    def __init__(self, settings: BusSettings) -> None:
        super().__init__(settings)
        self._clock = ManualClock()
        self._lake = MemoryLake(settings=settings, clock=self._clock, seed=7)
        self._view = self._new_view()

    @property
    def bus(self) -> IngestBus:
        return self._view.bus

    @property
    def catalog(self) -> Catalog:
        return self._view.catalog

    def _new_view(self) -> LakeView:
        return LakeView(MemoryBus(self._lake), MemoryCatalog(self._lake))

    async def second(self) -> LakeView:
        return self._new_view()

    async def advance_s(self, seconds: float) -> None:
        self._clock.advance_s(seconds)

    async def restart(self) -> None:
        # A copy of what survives: whatever else the old faces knew or held is gone with them.
        self._lake = MemoryLake(
            settings=self.settings, clock=self._clock, state=self._lake.backup()
        )
        self._view = self._new_view()

    async def lose_next_reply(self, operation: str) -> None:
        self._lake.faults.lose_replies.add(operation)

    async def remove_intent(self, file_id: Any) -> None:
        del self._lake.state.intents[file_id]

    async def expire_snapshots(self, *, before: int) -> None:
        self._lake.expire_snapshots(before=before)

    async def take_backup(self) -> Any:
        return self._lake.backup()

    async def restore(self, backup: Any) -> None:
        self._lake.restore(backup)


class MemoryBackend:
    @asynccontextmanager
    async def open(self, settings: BusSettings) -> AsyncIterator[LakeHarness]:
        yield MemoryHarness(settings)


@pytest.fixture
def backend() -> Backend:
    return MemoryBackend()


def test_C2_random_histories() -> None:
    run_machine(MemoryBackend(), histories=100, steps=60)
