"""The publisher over the in-memory catalog: joining, lost replies, stopping."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from actors.publisher import SnapshotPublisher
from lakebus.clock import SystemClock, new_uuid
from lakebus.errors import OutcomeUnknown, Unavailable
from storage.catalog.interface import Commit, CommitOutcome, Published
from tests.unit.actors_rig import Overlay, Rig, with_settings


@pytest.fixture
async def rig() -> Rig:
    rig = Rig(shards=1, claim_entries_max=1, clock=SystemClock())
    events = await rig.create()
    for i in range(4):
        await rig.append((events, [i]), ordering="a")
    return rig


async def commit_of(rig: Rig) -> Commit:
    """The commit of one claimed range, whose entries it publishes without a file."""
    owner = new_uuid()
    claim = await rig.bus.claim(owner)
    assert claim is not None
    return Commit(commit_id=new_uuid(), lease=claim.lease, files=(), range_bytes=1, owner=owner)


async def settled(publisher: SnapshotPublisher, *tasks: asyncio.Task[Any]) -> None:
    while publisher.waiting < len(tasks):
        await asyncio.sleep(0)


async def test_C1_commits_that_wait_are_joined_in_one_snapshot(rig: Rig) -> None:
    publisher = rig.publisher()
    before = (await rig.catalog.head()).snapshot_id
    commits = [await commit_of(rig) for _ in range(3)]
    tasks = [asyncio.create_task(publisher.submit(commit)) for commit in commits]
    await settled(publisher, *tasks)

    report = await publisher.run_once()

    assert report.commits == 3
    assert report.snapshot_id == before + 1
    answers = await asyncio.gather(*tasks)
    assert {a.snapshot_id for a in answers} == {before + 1}
    assert {a.outcome for a in answers} == {CommitOutcome.PUBLISHED}
    assert rig.metrics.observations("lakebus_publish_commits") == [3]


async def test_A9_a_fenced_commit_is_told_and_its_neighbours_are_published(rig: Rig) -> None:
    publisher = rig.publisher()
    good, lost = await commit_of(rig), await commit_of(rig)
    await rig.bus.release(lost.lease)
    tasks = [asyncio.create_task(publisher.submit(commit)) for commit in (good, lost)]
    await settled(publisher, *tasks)
    report = await publisher.run_once()
    answers = await asyncio.gather(*tasks)
    assert [a.outcome for a in answers] == [CommitOutcome.PUBLISHED, CommitOutcome.LEASE_LOST]
    assert [a.snapshot_id for a in answers] == [report.snapshot_id, None]


async def test_C5_a_lost_reply_is_read_back_and_not_sent_again(rig: Rig) -> None:
    sent: list[uuid.UUID] = []

    async def publish(publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        sent.append(publication_id)
        return await rig.catalog.publish(publication_id, commits)

    publisher = rig.publisher(Overlay(rig.catalog, publish=publish))
    rig.lake.faults.lose_replies.add("publish")
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await settled(publisher, task)
    await publisher.run_once()
    answer = await task
    assert answer.outcome is CommitOutcome.PUBLISHED
    assert answer.snapshot_id == (await rig.catalog.head()).snapshot_id
    assert len(sent) == 1
    assert rig.metrics.value("lakebus_publish_unknown_total", resolved="found") == 1


async def test_C5_what_did_not_happen_is_sent_again_under_the_same_id(rig: Rig) -> None:
    calls: list[tuple[str, uuid.UUID]] = []

    async def publish(publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        calls.append(("publish", publication_id))
        if len(calls) == 1:
            raise OutcomeUnknown("the connection broke")
        return await rig.catalog.publish(publication_id, commits)

    async def publish_outcome(publication_id: uuid.UUID) -> Published | None:
        calls.append(("read back", publication_id))
        if len(calls) == 2:
            raise Unavailable("still away")
        return await rig.catalog.publish_outcome(publication_id)

    overlay = Overlay(rig.catalog, publish=publish, publish_outcome=publish_outcome)
    publisher = rig.publisher(overlay)
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await settled(publisher, task)
    await publisher.run_once()
    assert (await task).outcome is CommitOutcome.PUBLISHED
    assert [name for name, _ in calls] == ["publish", "read back", "read back", "publish"]
    assert len({publication_id for _, publication_id in calls}) == 1


async def test_C5_an_outcome_that_stays_unknown_is_told_as_unknown(rig: Rig) -> None:
    async def publish(publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        raise OutcomeUnknown("the connection broke")

    async def publish_outcome(publication_id: uuid.UUID) -> Published | None:
        raise Unavailable("still away")

    overlay = Overlay(rig.catalog, publish=publish, publish_outcome=publish_outcome)
    publisher = rig.publisher(overlay)
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await settled(publisher, task)
    report = await publisher.run_once()
    assert report.failed == 1
    with pytest.raises(OutcomeUnknown):
        await task


async def test_an_absent_catalog_is_tried_a_bounded_number_of_times(rig: Rig) -> None:
    calls = 0

    async def publish(publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        nonlocal calls
        calls += 1
        raise Unavailable("away")

    publisher = rig.publisher(Overlay(rig.catalog, publish=publish))
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await settled(publisher, task)
    await publisher.run_once()
    with pytest.raises(Unavailable):
        await task
    assert calls == rig.settings.publish_attempts


async def test_A9_a_commit_that_breaks_the_publish_does_not_take_others_along(rig: Rig) -> None:
    good, bad = await commit_of(rig), await commit_of(rig)

    async def publish(publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        if any(commit.commit_id == bad.commit_id for commit in commits):
            raise ZeroDivisionError("a statement failed")
        return await rig.catalog.publish(publication_id, commits)

    publisher = rig.publisher(Overlay(rig.catalog, publish=publish))
    tasks = [asyncio.create_task(publisher.submit(commit)) for commit in (bad, good)]
    await settled(publisher, *tasks)
    report = await publisher.run_once()
    assert (report.commits, report.failed) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        await tasks[0]
    assert (await tasks[1]).outcome is CommitOutcome.PUBLISHED


async def test_a_submitter_that_went_away_is_not_published_for(rig: Rig) -> None:
    publisher = rig.publisher()
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await settled(publisher, task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    before = (await rig.catalog.head()).snapshot_id
    assert (await publisher.run_once()).commits == 0
    assert (await rig.catalog.head()).snapshot_id == before


async def test_stop_publishes_what_waits_and_refuses_what_comes(rig: Rig) -> None:
    publisher = rig.publisher()
    publisher.start()
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await settled(publisher, task)
    await publisher.stop()
    assert (await task).outcome is CommitOutcome.PUBLISHED
    with pytest.raises(Unavailable):
        await publisher.submit(await commit_of(rig))


async def test_stop_gives_back_what_cannot_be_published(rig: Rig) -> None:
    rig.settings = with_settings(rig.settings, stop_s_max=0.01)
    entered, never = asyncio.Event(), asyncio.Event()

    async def publish(publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        entered.set()
        await never.wait()
        raise AssertionError

    publisher = rig.publisher(Overlay(rig.catalog, publish=publish))
    publisher.start()
    task = asyncio.create_task(publisher.submit(await commit_of(rig)))
    await entered.wait()
    await publisher.stop()
    with pytest.raises(OutcomeUnknown):
        await task


async def test_under_load_publishes_keep_the_linger_and_after_idle_they_do_not(rig: Rig) -> None:
    rig.settings = with_settings(rig.settings, linger_ms=500, linger_entries_min=2)
    publisher = rig.publisher()
    publisher.start()
    clock = SystemClock()
    began_s = clock.monotonic_s()
    commits = [await commit_of(rig) for _ in range(3)]
    await asyncio.gather(*(publisher.submit(commit) for commit in commits))
    first_s = clock.monotonic_s() - began_s
    await publisher.submit(await commit_of(rig))
    second_s = clock.monotonic_s() - began_s
    await publisher.stop()
    assert first_s < 0.4
    assert 0.49 <= second_s < 5.0
