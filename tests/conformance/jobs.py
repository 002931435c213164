"""What every JobStore promises: one job for a request, one worker for a job, no lost job."""

from __future__ import annotations

import dataclasses
import datetime as dt

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import IdempotencyConflict, LeaseLost
from storage.maintenance.jobs import Job, JobKind, JobRequest, JobState, JobStore
from tests.conformance.harness import LakeHarness

ALL = tuple(JobKind)
COMPACT = JobRequest(JobKind.COMPACT, "someone", table_id=3, parameters={"a": 1, "b": [None]})
KEYED = JobRequest(
    JobKind.DELETE,
    "someone",
    table_id=3,
    parameters={"where": "id = 1"},
    principal_id=7,
    idempotency_key="k1",
    fingerprint=b"one",
)
OWNER, OTHER = new_uuid(), new_uuid()


async def test_a_job_goes_from_queued_to_done(lake: LakeHarness) -> None:
    jobs = lake.jobs
    job, was_there = await jobs.submit(COMPACT)
    assert (job.state, job.attempt, was_there) == (JobState.QUEUED, 0, False)
    assert (job.parameters, job.table_id, job.requested_by) == ({"a": 1, "b": [None]}, 3, "someone")
    claim = await jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    assert claim.job.job_id == job.job_id
    assert (claim.job.state, claim.job.attempt) == (JobState.RUNNING, 1)
    await jobs.note(claim, {"done": 1})
    noted = await jobs.job(job.job_id)
    assert noted is not None
    assert noted.report == {"done": 1}
    await jobs.finish(claim, {"files_in": 3})
    ended = await jobs.job(job.job_id)
    assert ended is not None
    assert ended.ended
    assert ended.ended_at is not None
    assert (ended.state, ended.report, ended.error) == (JobState.DONE, {"files_in": 3}, None)
    await jobs.finish(claim, {"files_in": 3})  # a lost reply: the same again is well
    with pytest.raises(LeaseLost):
        await jobs.renew(claim, ttl_s=60)
    with pytest.raises(LeaseLost):
        await jobs.note(claim, {})
    with pytest.raises(LeaseLost):
        await jobs.give_back(claim, delay_s=0, error="late")
    assert await jobs.claim(OWNER, kinds=ALL, ttl_s=60) is None
    assert await jobs.job(new_uuid()) is None


async def test_a_failed_job_says_why(lake: LakeHarness) -> None:
    job, _ = await lake.jobs.submit(COMPACT)
    claim = await lake.jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await lake.jobs.finish(claim, {}, error={"code": "corrupt", "detail": "a file is torn"})
    found = await lake.jobs.job(job.job_id)
    assert found is not None
    assert found.state is JobState.FAILED
    assert found.error == {"code": "corrupt", "detail": "a file is torn"}


async def test_an_equal_open_job_is_joined(lake: LakeHarness) -> None:
    jobs = lake.jobs
    first, _ = await jobs.submit(COMPACT)
    again, was_there = await jobs.submit(dataclasses.replace(COMPACT, requested_by="other"))
    assert was_there
    assert again == first
    for other in (
        dataclasses.replace(COMPACT, dry_run=True),
        dataclasses.replace(COMPACT, table_id=None),
        dataclasses.replace(COMPACT, parameters={}),
        dataclasses.replace(COMPACT, kind=JobKind.COLLECT),
    ):
        assert not (await jobs.submit(other))[1]
    claim = await jobs.claim(OWNER, kinds=[JobKind.COMPACT], ttl_s=60)
    assert claim is not None
    assert claim.job.job_id == first.job_id
    assert (await jobs.submit(COMPACT))[1]  # running is open too
    await jobs.finish(claim, {})
    assert not (await jobs.submit(COMPACT))[1]


async def test_A3_a_key_is_one_job_for_ever(lake: LakeHarness) -> None:
    jobs = lake.jobs
    first, was_there = await jobs.submit(KEYED)
    assert not was_there
    claim = await jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await jobs.finish(claim, {"rows_removed": 1})
    again, was_there = await jobs.submit(KEYED)
    assert was_there
    assert (again.job_id, again.state) == (first.job_id, JobState.DONE)
    with pytest.raises(IdempotencyConflict) as caught:
        await jobs.submit(dataclasses.replace(KEYED, fingerprint=b"two"))
    assert caught.value.members["job_id"] == str(first.job_id)
    assert not (await jobs.submit(dataclasses.replace(KEYED, principal_id=8)))[1]
    assert not (await jobs.submit(dataclasses.replace(KEYED, kind=JobKind.ERASE)))[1]
    assert not (await jobs.submit(dataclasses.replace(KEYED, idempotency_key="k2")))[1]
    await lake.advance_s(0.05)
    await jobs.forget(older_than_s=0)
    assert await jobs.job(first.job_id) is not None


async def test_an_expired_lease_is_claimed_by_the_next_worker(lake: LakeHarness) -> None:
    jobs = lake.jobs
    await jobs.submit(COMPACT)
    lost = await jobs.claim(OWNER, kinds=ALL, ttl_s=1)
    assert lost is not None
    assert await jobs.claim(OTHER, kinds=ALL, ttl_s=60) is None
    await lake.advance_s(1.05)
    claim = await jobs.claim(OTHER, kinds=ALL, ttl_s=60)
    assert claim is not None
    assert claim.job.job_id == lost.job.job_id
    assert claim.epoch > lost.epoch
    assert claim.job.attempt == 2
    for write in (
        jobs.renew(lost, ttl_s=60),
        jobs.note(lost, {"late": True}),
        jobs.give_back(lost, delay_s=0, error="late"),
        jobs.finish(lost, {"late": True}),
    ):
        with pytest.raises(LeaseLost):
            await write
    await jobs.finish(claim, {"ours": True})
    with pytest.raises(LeaseLost):
        await jobs.finish(lost, {"late": True})
    found = await jobs.job(claim.job.job_id)
    assert found is not None
    assert found.report == {"ours": True}


async def test_renewal_keeps_the_job(lake: LakeHarness) -> None:
    jobs = lake.jobs
    await jobs.submit(COMPACT)
    claim = await jobs.claim(OWNER, kinds=ALL, ttl_s=0.2)
    assert claim is not None
    await jobs.renew(claim, ttl_s=60)
    await lake.advance_s(0.25)
    assert await jobs.claim(OTHER, kinds=ALL, ttl_s=60) is None


async def test_given_back_is_claimable_after_its_delay(lake: LakeHarness) -> None:
    jobs = lake.jobs
    await jobs.submit(COMPACT)
    claim = await jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await jobs.give_back(claim, delay_s=1, error="the store was away")
    assert await jobs.claim(OTHER, kinds=ALL, ttl_s=60) is None
    await lake.advance_s(1.05)
    again = await jobs.claim(OTHER, kinds=ALL, ttl_s=60)
    assert again is not None
    assert again.job.attempt == 2
    assert again.job.error == {"code": "given_back", "detail": "the store was away"}
    await jobs.give_back(again, delay_s=0, error="told to stop", counted=False)
    last = await jobs.claim(OTHER, kinds=ALL, ttl_s=60)
    assert last is not None
    assert last.job.attempt == 2


async def test_a_worker_gets_the_oldest_job_of_its_kinds(lake: LakeHarness) -> None:
    jobs = lake.jobs
    for kind in (JobKind.RETAIN, JobKind.COMPACT, JobKind.COLLECT):
        await jobs.submit(JobRequest(kind, "someone"))
        await lake.advance_s(0.002)
    kinds = [JobKind.COLLECT, JobKind.COMPACT]
    claims = [await jobs.claim(OWNER, kinds=kinds, ttl_s=60) for _ in range(3)]
    assert [c and c.job.kind for c in claims] == [JobKind.COMPACT, JobKind.COLLECT, None]
    listed = await jobs.jobs()
    assert [job.kind for job in listed] == [JobKind.COLLECT, JobKind.COMPACT, JobKind.RETAIN]
    assert [job.kind for job in await jobs.jobs(limit=1)] == [JobKind.COLLECT]
    assert [job.kind for job in await jobs.jobs(before=listed[1].created_at)] == [JobKind.RETAIN]
    assert [job.kind for job in await jobs.jobs(kind=JobKind.COMPACT)] == [JobKind.COMPACT]


async def test_a_periodic_job_is_submitted_once_a_period(lake: LakeHarness) -> None:
    other = (await lake.second()).jobs

    async def ask(jobs: JobStore, every_s: float = 600.0) -> Job | None:
        return await jobs.submit_due(JobKind.COLLECT, every_s=every_s, requested_by="scheduler")

    made = await ask(lake.jobs)
    assert made is not None
    assert made.requested_by == "scheduler"
    assert await ask(other) is None
    claim = await lake.jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await lake.jobs.finish(claim, {})
    assert await ask(other) is None
    # A period that an operator shortened counts at once.
    assert await ask(other, every_s=60.0)


async def test_a_periodic_job_comes_again(lake: LakeHarness) -> None:
    first = await lake.jobs.submit_due(JobKind.RETAIN, every_s=0.2, requested_by="scheduler")
    assert first is not None
    claim = await lake.jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await lake.jobs.finish(claim, {})
    await lake.advance_s(0.25)  # a jitter of up to a tenth is in it
    second = await lake.jobs.submit_due(JobKind.RETAIN, every_s=0.2, requested_by="scheduler")
    assert second is not None
    assert second.job_id != first.job_id


async def test_ended_jobs_are_forgotten(lake: LakeHarness) -> None:
    jobs = lake.jobs
    ended, _ = await jobs.submit(COMPACT)
    claim = await jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await jobs.finish(claim, {})
    open_job, _ = await jobs.submit(COMPACT)
    assert await jobs.forget(older_than_s=60) == 0
    await lake.advance_s(0.05)
    assert await jobs.forget(older_than_s=0.01) == 1
    assert await jobs.job(ended.job_id) is None
    assert await jobs.job(open_job.job_id) == open_job


async def test_jobs_survive_a_restart(lake: LakeHarness) -> None:
    job, _ = await lake.jobs.submit(KEYED)
    claim = await lake.jobs.claim(OWNER, kinds=ALL, ttl_s=60)
    assert claim is not None
    await lake.restart()
    found = await lake.jobs.job(job.job_id)
    assert found is not None
    assert found.state is JobState.RUNNING
    assert found.created_at.utcoffset() == dt.timedelta(0)
    await lake.jobs.renew(claim, ttl_s=60)
