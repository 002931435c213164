"""C6: write intents. A file that a snapshot names exists; who commits first wins."""

from __future__ import annotations

import dataclasses
import uuid

from lakebus.clock import new_uuid
from lakebus.schemas import TableSchema
from storage.catalog.interface import Commit, CommitOutcome
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.worker import Worker, fake_file


async def test_C6_a_file_without_a_write_intent_is_not_published(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 1)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    stranger = fake_file(new_uuid(), table.table_id, table.version, 1)
    await _assert_intent_lost(worker, dataclasses.replace(commit, files=(stranger,)))
    await _assert_intent_lost(worker, dataclasses.replace(commit, files=(*commit.files, stranger)))
    published = await worker.publish(commit)  # the honest commit lost nothing by that
    assert published.outcomes == {commit.commit_id: CommitOutcome.PUBLISHED}


async def test_C6_collection_that_removed_the_intent_first_wins(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.REMOVE_INTENT)
    other = await lake.create("u")
    await lake.accept(entry_of([table, other], [1]))
    worker = lake.worker()
    claim = await worker.claim()
    commit = await worker.stage(claim)
    await lake.remove_intent(claim.file_ids[other.table_id])
    await _assert_intent_lost(worker, commit)
    assert await lake.rows_by_entry() == {}  # nothing of the other table either (A8)
    await lake.bus.release(claim.lease)
    await lake.drain()
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_C6_a_publish_consumes_the_intent(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker = lake.worker()
    first, second = [await worker.stage(await worker.claim()) for _ in range(2)]
    await worker.publish(first)
    await _assert_intent_lost(worker, dataclasses.replace(second, files=first.files))


async def test_C6_one_file_cannot_serve_two_commits_of_one_publication(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    table = await lake.create()
    await lake.accept_many(table, 2)
    worker = lake.worker()
    first, second = [await worker.stage(await worker.claim()) for _ in range(2)]
    thief = dataclasses.replace(second, files=first.files)
    published = await worker.publish(first, thief)
    assert sorted(published.outcomes.values()) == [
        CommitOutcome.INTENT_LOST,
        CommitOutcome.PUBLISHED,
    ]


async def test_C6_every_claim_gets_names_never_used_before(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 2)
    names: list[uuid.UUID] = []
    for turn in range(6):
        claim = await lake.claim_within(2.0, lake.worker())
        names += claim.file_ids.values()
        if turn % 2:
            await lake.bus.release(claim.lease)
        else:
            await lake.wait_expired()
    assert len(set(names)) == len(names)


async def _assert_intent_lost(worker: Worker, commit: Commit) -> None:
    published = await worker.publish(commit)
    assert published.outcomes == {commit.commit_id: CommitOutcome.INTENT_LOST}
    assert published.snapshot_id is None
