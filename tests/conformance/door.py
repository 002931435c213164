"""A1 and A7 to A12 as far as a bus and its catalog can be asked: what the door lets in."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt

import pytest

from lakebus.errors import Backpressure, IdempotencyExpired, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import (
    Accepted,
    BatchState,
    KeyTaken,
    RejectSet,
    SchemaStale,
)
from storage.bus.sharding import ordering_of, shard_of
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of, total

# --- A1: durability -------------------------------------------------------------------------------


async def test_A1_an_accepted_entry_survives_the_crash_of_its_process(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept(entry_of(table, [7, 8], key="k"))
    await lake.restart()
    worker = lake.worker()
    (entry,) = await worker.read(await worker.claim())
    assert (entry.position, entry.ids) == (accepted.position, [7, 8])


async def test_A1_an_accepted_entry_survives_the_crash_of_the_server(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.CRASH_SERVER)
    accepted = await lake.accept(entry_of(table, [7, 8], key="k"))
    await lake.crash_server()
    record = await lake.bus.find_key(1, "t", "k")
    assert record is not None
    assert record.receipt == accepted.receipt
    await lake.drain()
    assert await lake.rows_by_entry() == {(accepted.shard, accepted.position): 2}


# --- A7, A8, A9 -------------------------------------------------------------------------------


async def test_A7_positions_of_a_shard_grow_in_the_order_of_receipts(
    lake: LakeHarness, table: TableSchema
) -> None:
    second = await lake.second()
    previous = -1
    for n in range(12):
        bus = (lake.bus, second.bus)[n % 2]
        outcome = await bus.append(entry_of(table, [n], ordering_key="one"))
        assert isinstance(outcome, Accepted)
        assert outcome.position > previous
        previous = outcome.position


async def test_A7_positions_are_dense_under_concurrent_producers(
    lake: LakeHarness, table: TableSchema
) -> None:
    second = await lake.second()
    entries = [entry_of(table, [n], ordering_key=str(n % 7)) for n in range(60)]
    buses = [lake.bus, second.bus]
    outcomes = await asyncio.gather(*(buses[n % 2].append(e) for n, e in enumerate(entries)))
    places: dict[int, list[int]] = {}
    for outcome in outcomes:
        assert isinstance(outcome, Accepted)
        places.setdefault(outcome.shard, []).append(outcome.position)
    for shard, positions in places.items():
        assert sorted(positions) == list(range(len(positions)))
        assert (await lake.bus.ends())[shard] == len(positions)


async def test_A7_the_shard_is_a_stable_hash_of_principal_and_ordering(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    entries = [
        entry_of(table, ordering_key="a"),
        entry_of(table, ordering_key="a", principal_id=2),
        entry_of(table),
        entry_of([other, table]),
        entry_of([table, other]),
    ]
    orderings = ["k:a", "k:a", "t:1", "t:1,2", "t:1,2"]
    for entry, ordering in zip(entries, orderings, strict=True):
        assert ordering_of(entry) == ordering
        accepted = await lake.accept(entry)
        expected = lake.bus.shard_of(entry.principal_id, ordering)
        assert accepted.shard == expected
        assert expected == shard_of(entry.principal_id, ordering, shards=lake.bus.shards)
    await lake.restart()
    again = await lake.accept(entries[0])
    assert again.shard == lake.bus.shard_of(1, "k:a")


def test_A7_the_hash_never_changes() -> None:
    # Positions and tokens are stored by shard: these values bind every later version.
    wanted = {(1, "t:1"): 5, (1, "k:a"): 23, (2, "k:a"): 60, (7, "t:1,2"): 27}
    assert {place: shard_of(*place, shards=64) for place in wanted} == wanted


async def test_A8_an_entry_over_two_tables_appears_in_one_snapshot(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    before = (await lake.catalog.head()).snapshot_id
    accepted = await lake.accept(entry_of([table, other], [1, 2]))
    place = (accepted.shard, accepted.position)
    assert await lake.files.rows_at(lake.catalog, before) == {}
    await lake.drain()
    after = (await lake.catalog.head()).snapshot_id
    for snapshot_id in range(before, after + 1):
        rows = [
            (await lake.files.rows_at(lake.catalog, snapshot_id, table_id=t.table_id)).get(place, 0)
            for t in (table, other)
        ]
        assert rows in ([0, 0], [2, 2])
    assert rows == [2, 2]


async def test_A8_all_rows_of_an_entry_are_read_back_in_order(
    lake: LakeHarness, table: TableSchema
) -> None:
    ids = list(range(5_000))
    await lake.accept(entry_of(table, ids))
    worker = lake.worker()
    (entry,) = await worker.read(await worker.claim())
    assert entry.ids == ids


async def test_A9_a_refused_neighbour_changes_nothing_for_a_group(
    lake: LakeHarness, table: TableSchema
) -> None:
    taken = await lake.accept(entry_of(table, [0], key="taken", ordering_key="one"))
    long_ago = (await lake.catalog.head()).now - dt.timedelta(days=2)
    entries = [
        entry_of(table, [1], key="a", ordering_key="one"),
        entry_of(table, [2], key="b", schema_version=9, ordering_key="one"),
        entry_of(table, [3], key="taken", ordering_key="one"),
        entry_of(table, [4], key="c", ordering_key="one"),
        entry_of(table, [5], key="d", first_attempt_at=long_ago, ordering_key="one"),
        entry_of(table, [6], key="a", ordering_key="one"),
        entry_of(table, [7], ordering_key="one"),
    ]
    outcomes = await asyncio.gather(
        *(lake.bus.append(entry) for entry in entries), return_exceptions=True
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [
        Accepted,
        SchemaStale,
        KeyTaken,
        Accepted,
        IdempotencyExpired,
        KeyTaken,
        Accepted,
    ]
    positions = [o.position for o in outcomes if isinstance(o, Accepted)]
    assert sorted(positions) == [1, 2, 3]
    assert await lake.bus.find_key(1, "t", "b") is None
    assert await lake.bus.find_key(1, "t", "d") is None
    worker = lake.worker()
    read = {entry.position: entry.ids for entry in await worker.read(await worker.claim())}
    good = {o.position: [n + 1] for n, o in enumerate(outcomes) if isinstance(o, Accepted)}
    assert read == good | {taken.position: [0]}


# --- A10 to A12 -------------------------------------------------------------------------------


async def test_A10_rejected_rows_are_stored_in_the_transaction_of_their_entry(
    lake: LakeHarness, table: TableSchema
) -> None:
    rejects = [RejectSet(table.table_id, table.version, rows=2, document=b'[{"row": 3}]')]
    accepted = await lake.accept(entry_of(table, [1], key="k", rejects=rejects))
    (item,) = await lake.bus.quarantine_items()
    assert (item.kind, item.rows, item.payload) == ("rejects", 2, b'[{"row": 3}]')
    assert (item.batch_id, item.table_ids) == (accepted.receipt.batch_id, (table.table_id,))
    # Set-aside rows say nothing about the entry: it is published, and nobody is told otherwise.
    await lake.drain()
    status = await lake.bus.batch(accepted.receipt.batch_id)
    assert status is not None
    assert status.state is BatchState.PUBLISHED
    assert await lake.bus.quarantined_of([(accepted.shard, accepted.position)]) is None


async def test_A10_a_refused_entry_leaves_no_rejected_rows(
    lake: LakeHarness, table: TableSchema
) -> None:
    rejects = [RejectSet(table.table_id, table.version, rows=2, document=b"[]")]
    await lake.accept(entry_of(table, [1], key="k"))
    for entry in (
        entry_of(table, [2], schema_version=9, rejects=rejects),
        entry_of(table, [1], key="k", rejects=rejects),
    ):
        assert not isinstance(await lake.bus.append(entry), Accepted)
    # Nor does one whose neighbours in the group are accepted.
    await asyncio.gather(
        lake.bus.append(entry_of(table, [3], ordering_key="one")),
        lake.bus.append(
            entry_of(table, [2], schema_version=9, rejects=rejects, ordering_key="one")
        ),
        lake.bus.append(entry_of(table, [4], ordering_key="one")),
    )
    assert list(await lake.bus.quarantine_items()) == []


async def test_A10_an_entry_whose_rows_were_all_rejected_ends_terminal(
    lake: LakeHarness, table: TableSchema
) -> None:
    rejects = [RejectSet(table.table_id, table.version, rows=2, document=b"[]")]
    accepted = await lake.accept(entry_of(table, [], key="k", rejects=rejects))
    assert (accepted.receipt.rows, accepted.receipt.rows_rejected) == (0, 2)
    await lake.drain()
    head = await lake.catalog.head()
    assert (await lake.token_of(accepted)).covered_by(head.snapshot_id, head.watermark)
    assert await lake.rows_by_entry() == {}


async def test_A11_beyond_its_bytes_the_bus_refuses_and_leaves_nothing(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(backlog_bytes_hard=1)
    table = await lake.create()
    first = await lake.accept(entry_of(table, [1], ordering_key="one"))
    rejects = [RejectSet(table.table_id, table.version, rows=1, document=b"[]")]
    with pytest.raises(Backpressure) as caught:
        await lake.bus.append(entry_of(table, [2], key="k", rejects=rejects, ordering_key="one"))
    assert caught.value.retryable
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    assert await lake.bus.find_key(1, "t", "k") is None
    assert total(await lake.bus.ends()) == 1
    assert list(await lake.bus.quarantine_items()) == []
    await lake.drain()
    second = await lake.accept(entry_of(table, [2], key="k", ordering_key="one"))
    assert second.position == first.position + 1


async def test_A12_a_stale_schema_version_is_told_and_nothing_is_appended(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    changed = dataclasses.replace(table, columns=(*table.columns, Column(0, "more", "bigint")))
    change = await lake.catalog.alter_table(schema=changed, expected_version=table.version)
    assert change.schema.version == table.version + 1
    outcome = await lake.bus.append(entry_of([table, other], [1], key="k"))
    assert outcome == SchemaStale((table.table_id,))
    assert await lake.bus.find_key(1, "*", "k") is None
    assert total(await lake.bus.ends()) == 0
    await lake.accept(entry_of([change.schema, other], [1], key="k"))


async def test_A12_an_unknown_table_is_stale(lake: LakeHarness, table: TableSchema) -> None:
    ghost = dataclasses.replace(table, table_id=table.table_id + 999)
    assert await lake.bus.append(entry_of(ghost)) == SchemaStale((ghost.table_id,))


async def test_A12_a_reject_set_is_held_to_the_same_check(
    lake: LakeHarness, table: TableSchema
) -> None:
    rejects = [RejectSet(table.table_id, table.version + 1, rows=2, document=b"[]")]
    outcome = await lake.bus.append(entry_of(table, [], rejects=rejects, target="t"))
    assert outcome == SchemaStale((table.table_id,))


async def test_A12_a_schema_change_is_never_overtaken_by_an_append(
    lake: LakeHarness, table: TableSchema
) -> None:
    second = await lake.second()
    changed = dataclasses.replace(table, columns=(*table.columns, Column(0, "more", "bigint")))
    change = asyncio.ensure_future(
        second.catalog.alter_table(schema=changed, expected_version=table.version)
    )
    while not change.done():
        outcome = await lake.bus.append(entry_of(table, [1]))
        assert isinstance(outcome, Accepted | SchemaStale)
    await change
    assert isinstance(await lake.bus.append(entry_of(table, [1])), SchemaStale)
    # Every entry that was accepted names a version that was current when it was.
    await lake.drain()
    head = await lake.catalog.head()
    delta = await lake.catalog.manifest_delta(after=0, until=head.snapshot_id)
    assert {file.schema_version for file in delta.files} <= {table.version}


async def test_A12_a_drop_closes_the_door_and_waits_for_what_was_accepted(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    accepted = await lake.accept(entry_of([table, other], [1]))
    ticket = await lake.catalog.begin_drop(name="t")
    assert await lake.bus.append(entry_of(table, [2])) == SchemaStale((table.table_id,))
    assert await lake.bus.append(entry_of([table, other], [2])) == SchemaStale((table.table_id,))
    await lake.accept(entry_of(other, [3]))  # neighbours stay open
    with pytest.raises(Unavailable):
        await lake.catalog.finish_drop(ticket)
    await lake.drain()
    published = await lake.rows_by_entry(table_id=table.table_id)
    assert published == {(accepted.shard, accepted.position): 1}
    dropped = await lake.catalog.finish_drop(ticket)
    assert await lake.files.rows_at(lake.catalog, dropped, table_id=table.table_id) == {}
    assert await lake.files.rows_at(lake.catalog, dropped - 1, table_id=table.table_id) == published
