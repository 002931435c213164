"""Rows are published less often while tables have far too many small files."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from actors import brake as module
from actors.backend import Backend
from actors.brake import FREE_FACTOR, FULL_FACTOR, FilesBrake
from actors.pacing import Linger
from actors.role_host import RoleHost
from actors.settings import MaintainerSettings
from lakebus.clock import SystemClock
from lakebus.errors import Unavailable
from lakebus.schemas import TableSchema
from lakebus.telemetry import MemoryMetrics
from storage.maintenance.memory_jobs import MemoryJobs
from storage.maintenance.settings import MaintenanceSettings
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import ROLE_SETTINGS, Overlay, Rig, with_settings

_FREE, _FULL = 10 * FREE_FACTOR, 10 * FULL_FACTOR
_GAUGE = "lakebus_brake_linger_seconds"
_PATIENCE_S = 20.0


class Counted:
    """Tells how many small files there are, as the test says."""

    def __init__(self, small_files: int) -> None:
        self.small_files = small_files
        self.away = False
        self.asked = 0

    async def __call__(self) -> int:
        self.asked += 1
        if self.away:
            raise Unavailable("the catalog is away")
        return self.small_files


class World:
    def __init__(self, small_files: int) -> None:
        self.clock = ManualClock()
        self.linger = Linger(linger_s=0.03, entries_min=5, clock=self.clock)
        self.count = Counted(small_files)
        self.metrics = MemoryMetrics()
        self.brake = FilesBrake(
            count=self.count,
            small_files_max=10,
            linger_s_max=2.0,
            clock=self.clock,
            metrics=self.metrics,
        )


@pytest.mark.parametrize(
    ("small_files", "linger_s"),
    [(0, 0.0), (_FREE, 0.0), ((_FREE + _FULL) // 2, 1.0), (_FULL, 2.0), (100 * _FULL, 2.0)],
)
async def test_the_pause_grows_with_the_small_files_to_its_limit(
    small_files: int, linger_s: float
) -> None:
    world = World(small_files)
    world.linger.begin(1)
    await world.brake.look(world.linger)
    assert world.linger.delay_s() == pytest.approx(linger_s)
    assert world.brake.linger_s(small_files) == pytest.approx(linger_s)


async def test_a_lone_writer_is_slowed_down_too_and_nobody_once_files_are_merged() -> None:
    world = World(_FULL)
    world.linger.begin(1)
    await world.brake.look(world.linger)
    world.clock.advance_s(0.5)
    assert world.linger.delay_s() == pytest.approx(1.5)
    world.clock.advance_s(1.5)
    assert world.linger.delay_s() == 0.0

    world.linger.begin(1)
    world.count.small_files = _FREE
    await world.brake.look(world.linger)
    assert world.linger.delay_s() == 0.0


async def test_a_brake_below_the_usual_linger_changes_nothing() -> None:
    world = World(_FREE + 1)  # 2 s / 360: below 30 ms
    world.linger.begin(4)
    await world.brake.look(world.linger)
    assert world.linger.delay_s() == 0.0
    world.linger.begin(1)
    assert world.linger.delay_s() == pytest.approx(0.03)


async def test_a_catalog_that_is_away_changes_nothing() -> None:
    world = World(_FULL)
    world.linger.begin(1)
    await world.brake.look(world.linger)
    world.count.away = True
    assert await world.brake.look(world.linger) == pytest.approx(2.0)
    assert world.linger.delay_s() == pytest.approx(2.0)


async def test_where_nothing_is_claimed_nobody_looks_and_nothing_is_slow() -> None:
    world = World(_FULL)
    await world.brake.look(world.linger)
    assert world.count.asked == 0
    world.linger.begin(1)
    await world.brake.look(world.linger)
    world.clock.advance_s(14.0)
    await world.brake.look(world.linger)
    assert world.count.asked == 2
    world.clock.advance_s(2.0)
    await world.brake.look(world.linger)
    assert world.count.asked == 2
    world.linger.begin(1)
    assert world.linger.delay_s() == 0.0


async def test_a_look_that_takes_long_is_rare() -> None:
    world = World(_FULL)

    async def slowly() -> int:
        world.clock.advance_s(0.3)
        return 0

    slow = FilesBrake(
        count=slowly, small_files_max=10, linger_s_max=2.0, clock=world.clock, metrics=world.metrics
    )
    world.linger.begin(1)
    assert await slow.look(world.linger) == pytest.approx(15.0)


def backend_with(rig: Rig, small_files: int, *, enabled: bool = True) -> Backend:
    async def file_counts(*, small_bytes: int) -> dict[int, tuple[int, int]]:
        return {1: (small_files, small_files), 2: (1, 1)}

    return replace(
        rig.backend,
        upkeep=Overlay(rig.upkeep, file_counts=file_counts),
        jobs=MemoryJobs(rig.lake),
        maintainer=MaintainerSettings(enabled=enabled),
        maintenance=MaintenanceSettings(small_files_max=10),
    )


async def test_a_coordinator_publishes_less_often_under_a_flood_of_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.01)
    roles = with_settings(ROLE_SETTINGS, linger_ms_max=600)
    rig = Rig(clock=SystemClock(), roles=roles, shards=1)
    host = RoleHost(
        backend=backend_with(rig, _FULL), on_fatal=rig.deaths, clock=rig.clock, metrics=rig.metrics
    )
    table = await rig.create()
    await host.start()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not rig.metrics.value(_GAUGE):
                await put(rig, host, table)
            began_s = rig.clock.monotonic_s()
            await put(rig, host, table)
            await put(rig, host, table)
    finally:
        await host.stop()
    assert rig.clock.monotonic_s() - began_s >= 0.6


@pytest.mark.parametrize(("enabled", "linger_ms_max"), [(False, 600), (True, 5), (True, 0)])
async def test_there_is_no_brake_that_nobody_would_release(
    enabled: bool, linger_ms_max: int
) -> None:
    rig = Rig(roles=with_settings(ROLE_SETTINGS, linger_ms_max=linger_ms_max))
    backend = backend_with(rig, _FULL, enabled=enabled)
    host = RoleHost(backend=backend, on_fatal=rig.deaths, clock=rig.clock, metrics=rig.metrics)
    assert host.brake is None
    assert RoleHost(backend=backend_with(Rig(), _FULL), on_fatal=rig.deaths).brake is not None


async def put(rig: Rig, host: RoleHost, table: TableSchema) -> None:
    """One entry, published."""
    await rig.append((table, [1]))
    host.wake()
    while not await rig.drained():
        await asyncio.sleep(0.002)
