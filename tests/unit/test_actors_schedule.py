"""What is due: each periodic job once, compaction when there is something to merge."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from actors.maintenance import Maintainer
from lakebus.errors import Unavailable
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.maintenance.jobs import JobKind
from storage.maintenance.settings import MaintenanceSettings
from tests.unit.actors_rig import Overlay
from tests.unit.maintenance_rig import ScriptedRunner, World, tick


@pytest.fixture
def world() -> World:
    return World()


async def test_two_schedulers_submit_a_periodic_job_once(world: World) -> None:
    schedulers = [world.maintainer(ScriptedRunner(), enabled=True) for _ in range(2)]

    async def round_of_all() -> list[JobKind]:
        reports = await asyncio.gather(*(each.run_once() for each in schedulers))
        for each in schedulers:
            for _ in range(4):
                await each.run_once()
                await each.idle()
        return sorted(job.kind for report in reports for job in report.submitted)

    daily = [JobKind.COLLECT, JobKind.RETAIN, JobKind.VALIDATE]
    assert await round_of_all() == daily
    world.advance_s(590)
    assert await round_of_all() == []
    world.advance_s(70)  # 600 s and a tenth
    assert await round_of_all() == daily[:2]


async def test_nothing_is_due_where_maintenance_is_off(world: World) -> None:
    report = await world.maintainer(ScriptedRunner()).run_once()
    assert report.submitted == []


def with_files(world: World, *small: int) -> MemoryUpkeep:
    counts = {number: (count, count) for number, count in enumerate(small)}

    async def file_counts(*, small_bytes: int) -> Mapping[int, tuple[int, int]]:
        assert small_bytes == MaintenanceSettings().small_file_bytes
        return counts

    upkeep: Any = Overlay(world.upkeep, file_counts=file_counts)
    return upkeep  # type: ignore[no-any-return]


async def compactions(world: World, maintainer: Maintainer) -> int:
    report = await maintainer.run_once()
    await maintainer.idle()
    await maintainer.run_once()
    await maintainer.idle()
    return sum(job.kind is JobKind.COMPACT for job in report.submitted)


def scheduling(world: World, **changes: Any) -> Maintainer:
    return world.maintainer(ScriptedRunner(), enabled=True, jobs_at_once=4, **changes)


async def test_compaction_is_due_when_there_is_something_to_merge(world: World) -> None:
    world.upkeep = with_files(world, 1, 2)
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 0
    world.upkeep = with_files(world, 1, 3)
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 1
    await world.rig.create("a")
    assert await compactions(world, maintainer) == 0  # not before its period
    world.advance_s(11.1)
    assert await compactions(world, maintainer) == 1
    world.advance_s(11.1)
    assert await compactions(world, maintainer) == 0  # nothing was published since
    world.advance_s(600)
    assert await compactions(world, maintainer) == 1  # files that it could not merge last time


async def test_a_table_over_its_bound_is_compacted_sooner(world: World) -> None:
    world.upkeep = with_files(world, 6)
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 1
    await world.rig.create("a")
    world.advance_s(1)
    assert await compactions(world, maintainer) == 0
    world.advance_s(1)
    assert await compactions(world, maintainer) == 1


async def test_a_lake_at_rest_costs_no_look_at_its_files(world: World) -> None:
    looks = 0

    async def file_counts(*, small_bytes: int) -> Mapping[int, tuple[int, int]]:
        nonlocal looks
        looks += 1
        return {}

    upkeep: Any = Overlay(world.upkeep, file_counts=file_counts)
    world.upkeep = upkeep
    maintainer = scheduling(world)
    for _ in range(50):
        await maintainer.run_once()
        world.advance_s(100)
    await maintainer.stop()
    assert looks == 1


async def test_an_absent_catalog_stops_no_other_step(world: World) -> None:
    await world.ask()
    maintainer = world.maintainer(
        ScriptedRunner(), jobs=Overlay(world.jobs, submit_due=_away), enabled=True
    )
    report = await maintainer.run_once()
    assert report.failed == ["periodic"]
    assert len(report.began) == 1
    await maintainer.idle()


async def _away(*_: object, **__: object) -> None:
    raise Unavailable("the catalog is away")


async def test_ended_jobs_are_forgotten_in_time(world: World) -> None:
    job = await world.ask()
    maintainer = world.maintainer(ScriptedRunner(), jobs_keep_s=100)
    await tick(maintainer)
    world.advance_s(3_700)
    await tick(maintainer)
    assert await world.jobs.job(job.job_id) is None
