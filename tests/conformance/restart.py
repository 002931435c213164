"""F1, and D5 and D6 as far as a bus answers them: what survives a restart."""

from __future__ import annotations

from lakebus.schemas import TableSchema
from storage.bus.interface import KeyTaken
from storage.catalog.interface import CommitOutcome
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of, total


async def test_D5_the_end_of_a_shard_is_known_once_a_receipt_is_given(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    assert set(await lake.bus.ends()) == set(range(lake.bus.shards))
    for n in range(6):
        accepted = await lake.accept(entry_of(table, [n], ordering_key=str(n)))
        for bus in (lake.bus, view.bus):
            assert (await bus.ends())[accepted.shard] == accepted.position + 1
    before = await lake.bus.ends()
    await lake.restart()
    assert await lake.bus.ends() == before


async def test_D6_a_receipt_is_covered_exactly_from_its_publication_on(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept_many(table, 3)
    token = (await lake.token_of(accepted[0])).merge(await lake.token_of(accepted[2]))
    head = await lake.catalog.head()
    assert not token.covered_by(head.snapshot_id, head.watermark)
    await lake.drain()
    head = await lake.catalog.head()
    assert token.covered_by(head.snapshot_id, head.watermark)


async def test_F1_after_killing_every_process_nothing_is_lost_and_nothing_is_twice(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=4)
    table = await lake.create()
    entries = [entry_of(table, [n], key=f"k{n}", ordering_key=str(n % 3)) for n in range(24)]
    accepted = [await lake.accept(entry) for entry in entries]
    tokens = [await lake.token_of(one) for one in accepted]
    worker = lake.worker()
    await worker.publish_one()
    staged = await worker.stage(await worker.claim())
    await worker.claim()
    identity = await lake.catalog.identity()
    await lake.restart()

    assert await lake.catalog.identity() == identity
    for entry, one in zip(entries, accepted, strict=True):
        again = await lake.bus.append(entry)
        assert isinstance(again, KeyTaken)
        assert again.record.receipt == one.receipt
    await lake.drain()
    assert await lake.rows_by_entry() == {(a.shard, a.position): 1 for a in accepted}
    head = await lake.catalog.head()
    assert [await lake.token_of(one) for one in accepted] == tokens
    assert all(token.covered_by(head.snapshot_id, head.watermark) for token in tokens)
    # The killed worker's last message arrives after all.
    late = await lake.worker().publish(staged)
    assert late.outcomes == {staged.commit_id: CommitOutcome.LEASE_LOST}
    assert total(await lake.bus.ends()) == len(entries)


async def test_F1_a_crash_of_the_server_keeps_receipts_and_snapshots(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2)
    lake.needs(Capability.CRASH_SERVER)
    table = await lake.create()
    accepted = await lake.accept_many(table, 6)
    worker = lake.worker()
    await worker.publish_one()
    await worker.claim()
    head = await lake.catalog.head()
    await lake.crash_server()
    assert (await lake.catalog.head()).snapshot_id == head.snapshot_id
    await lake.drain()
    assert await lake.rows_by_entry() == {(a.shard, a.position): 1 for a in accepted}
