"""The maintainer over the lake in memory: how the runs of jobs end, and where they happen."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.backend import Backend
from actors.job_process import LEFTOVER_AGE_S, LocalJobRunner
from actors.role_host import RoleHost
from actors.roles import Role
from actors.settings import MaintainerSettings
from lakebus.clock import SystemClock, new_uuid
from lakebus.errors import (
    ConfigurationError,
    Corrupt,
    LeaseLost,
    OutcomeUnknown,
    SqlError,
    StartRefused,
    Unavailable,
)
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.engine.settings import EngineSettings
from storage.maintenance.interface import SwapOutcome, Swapped
from storage.maintenance.jobs import (
    Job,
    JobBody,
    JobClaim,
    JobContext,
    JobKind,
    JobRequest,
    publication_of,
)
from storage.maintenance.jobs import JobState as State
from storage.maintenance.memory_jobs import MemoryJobs
from storage.maintenance.registry import RUNNABLE, body_of, memory_bytes_of
from tests.unit.actors_rig import Overlay, Rig
from tests.unit.maintenance_rig import ASKED, SETTINGS, ScriptedRunner, World, tick


@pytest.fixture
def world() -> World:
    return World()


async def until(true: Callable[[], bool]) -> None:
    """A few turns of the event loop, at most."""
    for _ in range(200):
        if true():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come about")


# --- how a run ends ------------------------------------------------------------------------


async def test_a_job_that_was_asked_for_is_run_and_reported(world: World) -> None:
    job = await world.ask()
    assert [one.job_id for one in await tick(world.maintainer(ScriptedRunner()))] == [job.job_id]
    found = await world.found(job)
    assert (found.state, found.report, found.attempt) == (State.DONE, {"files_in": 1}, 1)
    metrics = world.rig.metrics
    assert metrics.value("lakebus_jobs_ended_total", kind="compact", outcome="done") == 1
    assert metrics.value("lakebus_jobs_running_count") == 0


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("the store is away"),
        OutcomeUnknown("no answer"),
        StartRefused("another version's database"),
    ],
)
async def test_absence_gives_the_job_back_with_a_growing_pause(
    world: World, error: Exception
) -> None:
    job = await world.ask()
    runner = ScriptedRunner(error)
    maintainer = world.maintainer(runner)
    await tick(maintainer)
    found = await world.found(job)
    assert (found.state, found.attempt) == (State.QUEUED, 1)
    assert found.error == {"code": "given_back", "detail": str(error)}
    world.advance_s(3.9)  # half of the pause at least
    assert await tick(maintainer) == []
    world.advance_s(4.2)
    assert len(await tick(maintainer)) == 1
    world.advance_s(4.9)
    assert await tick(maintainer) == []
    world.advance_s(5.2)
    assert len(await tick(maintainer)) == 1
    found = await world.found(job)  # that was the last try
    assert found.state is State.FAILED
    assert found.error is not None
    assert "gave up after 3 attempts" in found.error["detail"]


async def test_a_compaction_waits_no_longer_than_for_the_next_one(world: World) -> None:
    await world.ask()
    lost = ScriptedRunner(Unavailable("the process of the job is lost"))
    maintainer = world.maintainer(
        lost, attempts_max=20, backoff_s=1, backoff_s_max=60, compact_every_s=4
    )
    for _ in range(8):
        await tick(maintainer)
        world.advance_s(4.2)
    assert len(lost.begun) == 8


async def test_attempts_that_got_something_done_are_not_held_against_a_job(world: World) -> None:
    """What is killed again and again, and publishes a part of its work each time, is no job that
    cannot be done: it neither fails nor waits longer and longer."""

    job = await world.ask()
    runner = ScriptedRunner(Unavailable("the process of the job is lost"))

    async def run(claim: JobClaim) -> Mapping[str, Any]:
        await world.jobs.note(claim, {"last_fruitful_attempt": claim.job.attempt})
        return await ScriptedRunner.run(runner, claim)

    runner.run = run  # type: ignore[method-assign]
    maintainer = world.maintainer(runner, attempts_max=2)
    for _ in range(6):
        assert len(await tick(maintainer)) == 1
        world.advance_s(8.1)  # the first pause is the longest
    found = await world.found(job)
    assert (found.state, found.attempt) == (State.QUEUED, 6)

    runner.run = lambda claim: ScriptedRunner.run(runner, claim)  # type: ignore[method-assign]
    for _ in range(2):
        assert len(await tick(maintainer)) == 1
        world.advance_s(SETTINGS.backoff_s_max)
    assert (await world.found(job)).state is State.FAILED


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SqlError("no such column"), "sql_error"),
        (Corrupt("a file is torn"), "corrupt"),
        (ZeroDivisionError("secret"), "internal_error"),
    ],
)
async def test_what_trying_again_does_not_help_fails_at_once(
    world: World, error: Exception, code: str
) -> None:
    job = await world.ask()
    await tick(world.maintainer(ScriptedRunner(error)))
    found = await world.found(job)
    assert found.state is State.FAILED
    assert found.error is not None
    assert found.error["code"] == code
    assert "secret" not in found.error["detail"]


async def test_a_failed_job_keeps_what_it_noted(world: World) -> None:
    job = await world.ask()

    class Noting:
        async def run(self, claim: JobClaim) -> Mapping[str, Any]:
            await world.jobs.note(claim, {"files_in": 7})
            raise Corrupt("a file is torn")

        def busy(self) -> bool:
            return False

    await tick(world.maintainer(Noting()))
    assert (await world.found(job)).report == {"files_in": 7}


async def test_a_job_that_takes_its_process_down_each_time_ends(world: World) -> None:
    """Nobody ever says how its runs ended: their leases expire."""
    job = await world.ask()
    for _ in range(SETTINGS.attempts_max):
        assert await world.jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=1)
        world.advance_s(1)
    runner = ScriptedRunner()
    await tick(world.maintainer(runner))
    found = await world.found(job)
    assert found.state is State.FAILED
    assert runner.begun == []


async def test_E7_an_erasure_is_tried_until_it_is_done(world: World) -> None:
    job = await world.ask(JobRequest(JobKind.ERASE, "someone"))
    for _ in range(SETTINGS.attempts_max + 2):
        assert await world.jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=1)
        world.advance_s(1)
    runner = ScriptedRunner(Unavailable("the store is away"))
    await tick(world.maintainer(runner))
    assert (await world.found(job)).state is State.QUEUED
    assert len(runner.begun) == 1


async def test_E7_a_delete_that_published_is_never_recorded_as_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last attempts only have to read back what was published."""

    async def outcome(publication_id: uuid.UUID) -> Swapped | None:
        published = publication_id == publication_of(job.job_id)
        return Swapped(SwapOutcome.PUBLISHED, 7, world.clock.utc_now()) if published else None

    job = await world.ask(JobRequest(JobKind.DELETE, "someone"))
    for _ in range(SETTINGS.attempts_max):
        assert await world.jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=1)
        world.advance_s(1)
    monkeypatch.setattr(world.upkeep, "swap_outcome", outcome)
    maintainer = world.maintainer(ScriptedRunner(ZeroDivisionError("late"), {"deleted_rows": 3}))
    await tick(maintainer)
    assert (await world.found(job)).state is State.QUEUED
    world.advance_s(SETTINGS.backoff_s_max)
    await tick(maintainer)
    found = await world.found(job)
    assert (found.state, found.report) == (State.DONE, {"deleted_rows": 3})


# --- leases --------------------------------------------------------------------------------


async def test_the_lease_is_renewed_while_the_job_runs(world: World) -> None:
    job = await world.ask()
    gate = asyncio.Event()
    runner = ScriptedRunner(gate=gate)
    maintainer = world.maintainer(runner)
    await maintainer.run_once()
    await runner.began.wait()
    for _ in range(9):
        world.advance_s(SETTINGS.lease_ttl_s / 3 + 0.01)
        for _ in range(10):
            await asyncio.sleep(0)
        assert await world.jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=60) is None
    gate.set()
    await maintainer.idle()
    assert (await world.found(job)).state is State.DONE


async def test_a_lost_lease_ends_the_run_and_writes_nothing(world: World) -> None:
    job = await world.ask()
    runner = ScriptedRunner(gate=asyncio.Event())
    away = True

    async def renew(claim: JobClaim, *, ttl_s: float) -> None:
        if away:
            raise Unavailable("the catalog is away")
        await world.jobs.renew(claim, ttl_s=ttl_s)

    maintainer = world.maintainer(runner, jobs=Overlay(world.jobs, renew=renew))
    await maintainer.run_once()
    await runner.began.wait()
    for _ in range(4):
        world.advance_s(SETTINGS.lease_ttl_s / 3)
        await asyncio.sleep(0)
    assert runner.cancelled == 0  # only the catalog can say that somebody else has the job
    other = await world.jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=600)
    assert other is not None
    away = False
    world.advance_s(SETTINGS.lease_ttl_s / 3)
    await maintainer.idle()
    assert runner.cancelled == 1
    found = await world.found(job)
    assert (found.state, found.attempt, found.error) == (State.RUNNING, 2, None)
    metrics = world.rig.metrics
    assert metrics.value("lakebus_jobs_ended_total", kind="compact", outcome="lease_lost") == 1


async def test_a_job_that_learns_of_the_loss_itself_ends_so_too(world: World) -> None:
    await world.ask()
    await tick(world.maintainer(ScriptedRunner(LeaseLost("gone"))))
    metrics = world.rig.metrics
    assert metrics.value("lakebus_jobs_ended_total", kind="compact", outcome="lease_lost") == 1


async def test_a_job_without_end_is_ended(world: World) -> None:
    job = await world.ask()
    runner = ScriptedRunner(gate=asyncio.Event())
    maintainer = world.maintainer(runner, job_s_max=5)
    await maintainer.run_once()
    await runner.began.wait()
    await until(lambda: True)
    world.advance_s(5)
    await maintainer.idle()
    assert runner.cancelled == 1
    assert (await world.found(job)).state is State.QUEUED


async def test_stopping_gives_the_job_back_at_once_and_counts_no_attempt(world: World) -> None:
    job = await world.ask()
    runner = ScriptedRunner(gate=asyncio.Event())
    maintainer = world.maintainer(runner)
    await maintainer.run_once()
    await runner.began.wait()
    await maintainer.stop()
    assert runner.cancelled == 1
    found = await world.found(job)
    assert (found.state, found.attempt) == (State.QUEUED, 0)
    assert len(await tick(world.maintainer(ScriptedRunner()))) == 1


@pytest.mark.parametrize("happened", [False, True])
@pytest.mark.parametrize("end", ["finish", "give_back"])
async def test_the_end_is_recorded_although_the_reply_is_lost(
    world: World, end: str, happened: bool
) -> None:
    job = await world.ask()
    lost: list[str] = []

    async def write(*given: Any, **named: Any) -> None:
        if happened or lost:
            await getattr(world.jobs, end)(*given, **named)
        if not lost:
            lost.append(end)
            raise OutcomeUnknown("no answer")

    ending: Any = {"files_in": 1} if end == "finish" else Unavailable("away")
    maintainer = world.maintainer(
        ScriptedRunner(ending), jobs=Overlay(world.jobs, **{end: write}), backoff_s=0.5
    )
    await maintainer.run_once()
    idle = asyncio.ensure_future(maintainer.idle())
    await until(lambda: bool(lost))
    for _ in range(5):
        await asyncio.sleep(0)
    world.advance_s(0.5)
    await idle
    expected = State.DONE if end == "finish" else State.QUEUED
    assert (await world.found(job)).state is expected


async def test_one_job_at_a_time_and_a_validation_keeps_no_compaction_waiting(
    world: World,
) -> None:
    for kind in (JobKind.VALIDATE, JobKind.COLLECT, JobKind.COMPACT, JobKind.RETAIN):
        await world.ask(JobRequest(kind, "someone"))
        world.advance_s(0.001)
    runner = ScriptedRunner(gate=asyncio.Event())
    one = world.maintainer(runner)
    began = (await one.run_once()).began
    assert [job.kind for job in began] == [JobKind.COMPACT, JobKind.VALIDATE]
    assert (await one.run_once()).began == []
    assert world.rig.metrics.value("lakebus_jobs_running_count") == 2
    two = world.maintainer(runner, jobs_at_once=2)
    began = (await two.run_once()).began
    assert [job.kind for job in began] == [JobKind.RETAIN, JobKind.COLLECT]
    await one.stop()
    await two.stop()


# --- where the work is done ----------------------------------------------------------------


def full_backend(world: World, folder: Path) -> Backend:
    return dataclasses.replace(
        world.rig.backend,
        jobs=world.jobs,
        upkeep=world.upkeep,
        engine=EngineSettings(allowed_directory="/objects", temp_directory="/elsewhere"),
        jobs_dir=folder / "jobs",
    )


def bodies(body: JobBody) -> Callable[[JobKind], JobBody]:
    return lambda _: body


async def test_a_body_gets_a_folder_of_its_own_that_goes_with_it(
    world: World, tmp_path: Path
) -> None:
    job = await world.ask(dataclasses.replace(ASKED, parameters={"a": 1}))
    seen: list[Path] = []

    async def body(context: JobContext, given: Job) -> Mapping[str, Any]:
        seen.append(context.temp_dir)
        (context.temp_dir / "part").write_text("rows")
        assert context.engine.temp_directory == str(context.temp_dir / "spill")
        await context.note({"step": 1})
        noted = await world.found(job)
        return {"noted": noted.report, "parameters": given.parameters}

    runner = LocalJobRunner(full_backend(world, tmp_path), body_of=bodies(body))
    await tick(world.maintainer(runner))
    assert (await world.found(job)).report == {"noted": {"step": 1}, "parameters": {"a": 1}}
    assert seen[0].parent == tmp_path / "jobs"
    assert list((tmp_path / "jobs").iterdir()) == []


async def test_leftovers_of_dead_jobs_are_cleared_away(world: World, tmp_path: Path) -> None:
    job = await world.ask()
    parent = tmp_path / "jobs"
    mine, old, young = (parent / name for name in (f"{job.job_id}.1", f"{new_uuid()}.2", "x.3"))
    for folder in (mine, old, young):
        folder.mkdir(parents=True)
        (folder / "part").write_text("rows")
    long_ago = time.time() - LEFTOVER_AGE_S - 60
    os.utime(old, (long_ago, long_ago))

    async def body(context: JobContext, _: Job) -> Mapping[str, Any]:
        return {"here": sorted(p.name for p in parent.iterdir() if p != context.temp_dir)}

    runner = LocalJobRunner(full_backend(world, tmp_path), body_of=bodies(body))
    await tick(world.maintainer(runner))
    assert (await world.found(job)).report == {"here": ["x.3"]}


async def test_a_backend_without_maintenance_says_so(world: World) -> None:
    job = await world.ask()
    await tick(world.maintainer(LocalJobRunner(world.rig.backend)))
    found = await world.found(job)
    assert found.error is not None
    assert found.error["code"] == "internal_error"


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="tick_ms"):
        MaintainerSettings(tick_ms=0)


def test_a_rewrite_is_given_its_memory() -> None:
    plain = memory_bytes_of(JobKind.COLLECT, rewrite_memory_bytes=512)
    assert memory_bytes_of(JobKind.COMPACT, rewrite_memory_bytes=512) == plain + 512
    assert memory_bytes_of(JobKind.ERASE, rewrite_memory_bytes=512) == plain + 512


def test_every_runnable_kind_has_its_body() -> None:
    assert {body_of(kind).__name__ for kind in RUNNABLE} == {kind.value for kind in RUNNABLE}


async def test_the_role_runs_jobs_beside_the_others(tmp_path: Path) -> None:
    world = World()
    world.rig = Rig(clock=SystemClock())
    world.jobs, world.upkeep = MemoryJobs(world.rig.lake), MemoryUpkeep(world.rig.lake)
    job = await world.ask()
    ended = asyncio.Event()

    async def body(context: JobContext, _: Job) -> Mapping[str, Any]:
        ended.set()
        return {}

    backend = full_backend(world, tmp_path)
    host = RoleHost(
        backend=backend,
        on_fatal=world.rig.deaths,
        runner=LocalJobRunner(backend, body_of=bodies(body)),
    )
    await host.start()
    try:
        async with asyncio.timeout(20):
            await ended.wait()
            assert host.maintainer is not None
            await host.maintainer.idle()
        assert "maintenance" in {loop.role for loop in host.status().loops}
    finally:
        await host.stop()
    assert (await world.found(job)).state is State.DONE
    assert world.rig.deaths.seen == []


def test_without_a_runner_nobody_does_maintenance(world: World, tmp_path: Path) -> None:
    roles = frozenset({Role.MAINTENANCE})
    host = RoleHost(backend=full_backend(world, tmp_path), on_fatal=world.rig.deaths, roles=roles)
    assert host.maintainer is None
