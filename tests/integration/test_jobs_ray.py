"""A job is a Ray task: killed, it is run again; told to stop, it is given back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from actors import runtime
from storage.maintenance.jobs import Job, JobKind, JobRequest, JobState, JobStore
from tests.integration.ray_backend import write_config
from tests.integration.test_actors_ray import Stack, cluster, stack

__all__ = ["cluster", "stack"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

_PATIENCE_S = 60.0
_BODY = "tests.integration.ray_backend:hang_at_first"


async def until(jobs: JobStore, job: Job, true: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            found = await jobs.job(job.job_id)
            assert found is not None
            if true(found):
                return found
            await asyncio.sleep(0.05)


async def gone(pid: int) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.05)


async def test_F1_a_killed_job_is_run_again_and_a_stopped_one_is_given_back(
    stack: Stack, tmp_path: Path
) -> None:
    config = {"dsn": stack.dsn, "objects": str(stack.objects), "stack": stack.settings.namespace}
    write_config(tmp_path, validation=_BODY, **config)
    jobs = stack.lake.jobs
    await runtime.start(stack.settings)

    job, _ = await jobs.submit(JobRequest(JobKind.VALIDATE, "test"))
    hanging = await until(jobs, job, lambda found: "pid" in found.report)
    assert hanging.state is JobState.RUNNING
    assert hanging.report["niceness"] == 19
    assert Path(hanging.report["folder"]).is_dir()
    os.kill(hanging.report["pid"], signal.SIGKILL)
    ended = await until(jobs, job, lambda found: found.ended)
    assert (ended.state, ended.attempt, ended.error) == (JobState.DONE, 2, None)
    assert ended.report["pid"] != hanging.report["pid"]
    assert list((tmp_path / "jobs").iterdir()) == []

    job, _ = await jobs.submit(JobRequest(JobKind.VALIDATE, "test"))
    hanging = await until(jobs, job, lambda found: "pid" in found.report)
    assert hanging.report["pid"] == ended.report["pid"], "a job pays for a process of its own"
    await runtime.stop(stack.settings)
    await gone(hanging.report["pid"])
    given_back = await jobs.job(job.job_id)
    assert given_back is not None
    assert (given_back.state, given_back.attempt) == (JobState.QUEUED, 0)


async def test_F1_a_killed_scheduler_leaves_its_job_to_the_next(
    stack: Stack, tmp_path: Path
) -> None:
    """The lease expires, and whoever comes next runs the job again."""

    config = {"dsn": stack.dsn, "objects": str(stack.objects), "stack": stack.settings.namespace}
    write_config(tmp_path, validation=_BODY, job_lease_s=2, **config)
    jobs = stack.lake.jobs
    await runtime.start(stack.settings)
    job, _ = await jobs.submit(JobRequest(JobKind.VALIDATE, "test"))
    await until(jobs, job, lambda found: "pid" in found.report)
    os.kill(await stack.pid("core"), signal.SIGKILL)
    ended = await until(jobs, job, lambda found: found.ended)
    assert (ended.state, ended.attempt) == (JobState.DONE, 2)
    # Without another job its process ends.
    await gone(ended.report["pid"])
