"""A worker that ends between two steps of a job: the job is run again, and nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.job_process import LocalJobRunner
from lakebus.errors import Unavailable
from storage.maintenance.jobs import Job, JobContext, JobState
from tests.failpoints.actions import Raise
from tests.failpoints.points import Failpoints
from tests.unit.maintenance_rig import SETTINGS, ScriptedRunner, World, tick
from tests.unit.test_actors_maintenance import bodies, full_backend


@pytest.fixture
def world() -> World:
    return World()


async def test_F1_a_claim_that_nobody_works_on_is_taken_over(
    world: World, failpoints: Failpoints
) -> None:
    job = await world.ask()
    failpoints.arm("maintainer.after_claim", Raise(Unavailable("ended here")))
    report = await world.maintainer(ScriptedRunner()).run_once()
    assert report.failed == ["claim"]
    failpoints.disarm("maintainer.after_claim")
    other = world.maintainer(ScriptedRunner())
    assert await tick(other) == []
    world.advance_s(SETTINGS.lease_ttl_s)
    assert len(await tick(other)) == 1
    found = await world.found(job)
    assert (found.state, found.attempt) == (JobState.DONE, 2)


async def test_F1_an_end_that_was_not_recorded_is_reached_again(
    world: World, failpoints: Failpoints
) -> None:
    job = await world.ask()
    failpoints.arm("maintainer.before_finish", Raise(RuntimeError("ended here")))
    runner = ScriptedRunner()
    maintainer = world.maintainer(runner)
    await tick(maintainer)
    assert (await world.found(job)).state is JobState.RUNNING
    metrics = world.rig.metrics
    assert metrics.value("lakebus_jobs_ended_total", kind="compact", outcome="not_recorded") == 1
    failpoints.disarm("maintainer.before_finish")
    world.advance_s(SETTINGS.lease_ttl_s)
    await tick(maintainer)
    found = await world.found(job)
    assert (found.state, found.attempt, len(runner.begun)) == (JobState.DONE, 2, 2)


async def test_F1_a_job_that_ends_before_its_body_leaves_no_folder(
    world: World, failpoints: Failpoints, tmp_path: Path
) -> None:
    job = await world.ask()
    ran = asyncio.Event()

    async def body(context: JobContext, _: Job) -> Mapping[str, Any]:
        ran.set()
        return {}

    failpoints.arm("job.before_body", Raise(Unavailable("ended here")))
    runner = LocalJobRunner(full_backend(world, tmp_path), body_of=bodies(body))
    maintainer = world.maintainer(runner)
    await tick(maintainer)
    assert (await world.found(job)).state is JobState.QUEUED
    assert list((tmp_path / "jobs").iterdir()) == []
    assert not ran.is_set()
    failpoints.disarm("job.before_body")
    world.advance_s(SETTINGS.backoff_s)
    await tick(maintainer)
    assert (await world.found(job)).state is JobState.DONE
