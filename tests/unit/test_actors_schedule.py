"""What is due: each periodic job once, compaction when there is something to merge; and what waits
while the machine is busy, how long."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from actors.brake import FREE_FACTOR
from actors.compaction_due import BUSY_FACTOR
from actors.maintenance import Maintainer
from lakebus.errors import Unavailable
from lakebus.snapshots import DataFile
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.maintenance.jobs import JobKind
from storage.maintenance.settings import MaintenanceSettings
from tests.unit.actors_rig import Overlay
from tests.unit.maintenance_rig import ScriptedRunner, World, tick


@pytest.fixture
def world() -> World:
    return World()


async def test_two_schedulers_submit_a_periodic_job_once(world: World) -> None:
    await world.rig.create()
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


class Files:
    """Tables with as many small files as the test says; looks at them are counted."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sizes: dict[int, list[int]] = {}
        self.counted = self.listed = 0
        world.upkeep = self._overlay(world.upkeep)

    def _overlay(self, upkeep: MemoryUpkeep) -> MemoryUpkeep:
        made: Any = Overlay(upkeep, file_counts=self._file_counts, live_files=self._live_files)
        return made  # type: ignore[no-any-return]

    async def table(self, name: str, *sizes: int) -> int:
        schema = await self._world.rig.create(name)
        self._sizes[schema.table_id] = list(sizes)
        return schema.table_id

    def become(self, table_id: int, *sizes: int) -> None:
        self._sizes[table_id] = list(sizes)

    async def _file_counts(self, *, small_bytes: int) -> Mapping[int, tuple[int, int]]:
        assert small_bytes == MaintenanceSettings().small_file_bytes
        self.counted += 1
        return {
            number: (len(sizes), sum(size < small_bytes for size in sizes))
            for number, sizes in self._sizes.items()
        }

    async def _live_files(self, table_id: int) -> Sequence[DataFile]:
        self.listed += 1
        return [
            DataFile(uuid.UUID(int=number + 1), table_id, 1, f"{number}", 1, size, "", {})
            for number, size in enumerate(self._sizes[table_id])
        ]


@pytest.fixture
def files(world: World) -> Files:
    return Files(world)


async def compactions(world: World, maintainer: Maintainer) -> int:
    report = await maintainer.run_once()
    await maintainer.idle()
    await maintainer.run_once()
    await maintainer.idle()
    return sum(job.kind is JobKind.COMPACT for job in report.submitted)


def scheduling(world: World, *, runner: ScriptedRunner | None = None, **changes: Any) -> Maintainer:
    runner = runner or ScriptedRunner()
    return world.maintainer(runner, enabled=True, jobs_at_once=4, **changes)


SIZE = 100_000
LARGER = [31 * 2**20] * 5


async def test_compaction_is_due_when_there_is_something_to_merge(
    world: World, files: Files
) -> None:
    await files.table("one", SIZE)
    table = await files.table("other", SIZE, SIZE)
    assert await compactions(world, scheduling(world)) == 0
    files.become(table, SIZE, SIZE, SIZE)
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 1
    await world.rig.create("a")
    assert await compactions(world, maintainer) == 0  # not before its period
    world.advance_s(10)
    assert await compactions(world, maintainer) == 1
    world.advance_s(10)
    assert await compactions(world, maintainer) == 0  # nothing was published since
    world.advance_s(600)
    assert await compactions(world, maintainer) == 1  # files that it could not merge last time


async def test_a_table_over_its_bound_is_compacted_sooner(world: World, files: Files) -> None:
    await files.table("one", *[SIZE] * 6)
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 1
    await world.rig.create("a")
    world.advance_s(1)
    assert await compactions(world, maintainer) == 0
    world.advance_s(1)
    assert await compactions(world, maintainer) == 1


async def test_no_job_is_begun_that_would_find_nothing_to_merge(world: World, files: Files) -> None:
    """Small files enough, but of sizes far apart; looked at once a period while there is news."""

    table = await files.table("one", 10_000, 200_000, 4_000_000)
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 0
    for second in range(20):
        await world.rig.create(f"news_{second}")
        world.advance_s(1)
        assert await compactions(world, maintainer) == 0
    assert files.listed == 3
    files.become(table, 10_000, *[200_000] * 3, 4_000_000)
    await world.rig.create("more")
    world.advance_s(10)
    assert await compactions(world, maintainer) == 1


async def test_what_a_large_table_has_to_merge_the_job_finds_out(
    world: World, files: Files
) -> None:
    await files.table("large", *[SIZE] * 3, *[100 * 2**20] * 998)
    assert await compactions(world, scheduling(world)) == 1
    assert files.listed == 0


async def test_tables_with_few_small_files_are_looked_at_once_in_a_while(
    world: World, files: Files
) -> None:
    """Files that are larger than small, and together a whole one."""

    table = await files.table("one")
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 0
    files.become(table, *LARGER)
    await world.rig.create("a")
    world.advance_s(590)
    assert await compactions(world, maintainer) == 0
    world.advance_s(10)
    assert await compactions(world, maintainer) == 1


async def test_a_table_with_nothing_to_merge_keeps_no_other_waiting(
    world: World, files: Files
) -> None:
    """It has small files enough to be looked at each time, of sizes far apart."""

    await files.table("one", 10_000, 200_000, 4_000_000)
    other = await files.table("other")
    maintainer = scheduling(world)
    assert await compactions(world, maintainer) == 0
    files.become(other, *LARGER)
    begun = []
    for second in range(0, 700, 10):
        await world.rig.create(f"news_{second}")
        if await compactions(world, maintainer):
            begun.append(second)
        world.advance_s(10)
    assert begun[0] == 600


async def test_what_was_due_when_the_process_began_is_done(world: World, files: Files) -> None:
    await files.table("one", *LARGER)
    assert await compactions(world, scheduling(world)) == 1


# --- a busy machine --------------------------------------------------------------------------


@pytest.fixture
def busy() -> ScriptedRunner:
    runner = ScriptedRunner()
    runner.is_busy = True
    return runner


async def test_a_compaction_waits_while_the_machine_is_busy_and_no_longer(
    world: World, files: Files, busy: ScriptedRunner
) -> None:
    await files.table("one", *[SIZE] * 10)  # five are allowed
    maintainer = scheduling(world, runner=busy)
    for _ in range(5):
        assert await compactions(world, maintainer) == 0
        world.advance_s(1)
    busy.is_busy = False
    assert await compactions(world, maintainer) == 1


async def test_a_compaction_waits_three_periods_at_most(
    world: World, files: Files, busy: ScriptedRunner
) -> None:
    await files.table("one", *[SIZE] * 10)
    maintainer = scheduling(world, runner=busy)
    begun = []
    for second in range(90):
        await world.rig.create(f"news_{second}")
        if await compactions(world, maintainer):
            begun.append(second)
        world.advance_s(1)
    assert begun == [30, 62]  # due two seconds after the one before, as the table is over its bound
    assert files.listed == 2  # nothing is planned while it waits


async def test_a_table_with_twice_its_small_files_waits_for_nobody(
    world: World, files: Files, busy: ScriptedRunner
) -> None:
    table = await files.table("one", *[SIZE] * 10)
    maintainer = scheduling(world, runner=busy)
    assert await compactions(world, maintainer) == 0
    files.become(table, *[SIZE] * 11)
    world.advance_s(1)
    assert await compactions(world, maintainer) == 1
    assert BUSY_FACTOR < FREE_FACTOR  # before publishing is slowed down


async def test_larger_files_wait_until_it_is_calm_again(
    world: World, files: Files, busy: ScriptedRunner
) -> None:
    """On a busy machine only small files are merged, and what that leaves is remembered: nothing
    has to be published first, and the other files need not be small or many."""

    table = await files.table("one", *[SIZE] * 11, *LARGER)
    maintainer = scheduling(world, runner=busy)
    assert await compactions(world, maintainer) == 1
    assert busy.begun[-1].job.parameters == {"small": True}
    files.become(table, 11 * SIZE, *LARGER)
    for _ in range(20):
        assert await compactions(world, maintainer) == 0
        world.advance_s(1)
    busy.is_busy = False
    assert await compactions(world, maintainer) == 1
    assert busy.begun[-1].job.parameters == {}
    files.become(table, 11 * SIZE, 128 * 2**20)
    world.advance_s(700)
    assert await compactions(world, maintainer) == 0


async def test_what_is_left_for_later_costs_no_look_while_it_has_to_wait(
    world: World, files: Files, busy: ScriptedRunner
) -> None:
    await files.table("one", *LARGER)
    maintainer = scheduling(world, runner=busy)
    for _ in range(100):
        assert await compactions(world, maintainer) == 0
        world.advance_s(1)
    assert (files.counted, files.listed) == (1, 0)
    busy.is_busy = False
    assert await compactions(world, maintainer) == 1


async def test_larger_files_wait_ten_minutes_at_most(
    world: World, files: Files, busy: ScriptedRunner
) -> None:
    table = await files.table("one", *[SIZE] * 11, *LARGER)
    maintainer = scheduling(world, runner=busy, collect_every_s=1e6)
    assert await compactions(world, maintainer) == 1
    for second in range(640):
        files.become(table, *[SIZE] * (second % 8), *LARGER)
        await world.rig.create(f"news_{second}")
        await compactions(world, maintainer)
        world.advance_s(1)
    merged = [claim.job.parameters for claim in busy.begun if claim.job.kind is JobKind.COMPACT]
    assert merged[-1] == {}
    assert merged.count({}) == 1


async def test_a_compaction_that_somebody_asks_for_never_waits(
    world: World, busy: ScriptedRunner
) -> None:
    job = await world.ask()
    maintainer = scheduling(world, runner=busy)
    assert [one.job_id for one in await tick(maintainer)] == [job.job_id]


async def test_periodic_jobs_wait_a_tenth_of_their_period_on_a_busy_machine(
    world: World, busy: ScriptedRunner
) -> None:
    await world.rig.create()
    maintainer = scheduling(world, runner=busy)
    begun: list[JobKind] = []
    for _ in range(60):
        begun += [job.kind for job in await tick(maintainer)]
        world.advance_s(1)
    assert begun == []
    begun += [job.kind for job in await tick(maintainer)]
    assert sorted(begun) == [JobKind.COLLECT, JobKind.RETAIN]
    busy.is_busy = False
    assert [job.kind for job in await tick(maintainer)] == [JobKind.VALIDATE]


async def test_a_lake_that_nothing_was_published_in_needs_no_jobs(world: World) -> None:
    maintainer = scheduling(world)
    for _ in range(3):
        assert (await maintainer.run_once()).submitted == []
        world.advance_s(600)
    await world.rig.create()
    assert len((await maintainer.run_once()).submitted) == 3
    await maintainer.idle()


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
    await world.rig.create()
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
