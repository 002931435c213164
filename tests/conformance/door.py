"""Section A of the contract, as far as a bus and its catalog can be asked: the door."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt

import pytest

from lakebus.errors import Backpressure, IdempotencyExpired, OutcomeUnknown, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import (
    Accepted,
    AppendOutcome,
    BatchState,
    KeyTaken,
    RejectSet,
    SchemaStale,
)
from storage.bus.receipting import parse_batch_id
from storage.bus.sharding import ordering_of, shard_of
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of, total

# --- A1, A2 -----------------------------------------------------------------------------------


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


async def test_A2_the_receipt_is_one_object_in_every_answer(
    lake: LakeHarness, table: TableSchema
) -> None:
    first = await lake.accept(entry_of(table, [1, 2], key="k"))

    async def answers() -> list[dict[str, object]]:
        replay = await lake.bus.append(entry_of(table, [1, 2], key="k"))
        other = await lake.second()
        elsewhere = await other.bus.append(entry_of(table, [1, 2], key="k"))
        found = await lake.bus.find_key(1, "t", "k")
        assert isinstance(replay, KeyTaken)
        assert isinstance(elsewhere, KeyTaken)
        assert found is not None
        records = (replay.record, elsewhere.record, found)
        return [record.receipt.as_json() for record in records]

    expected = first.receipt.as_json()
    assert await answers() == [expected] * 3
    await lake.drain()
    assert await answers() == [expected] * 3
    await lake.restart()
    assert await answers() == [expected] * 3


async def test_A2_the_receipt_tells_what_was_accepted(
    lake: LakeHarness, table: TableSchema
) -> None:
    rejects = RejectSet(table.table_id, table.version, rows=2, document=b"[]")
    entry = entry_of(table, [1, 2, 3], key="k", rejects=[rejects])
    accepted = await lake.accept(entry)
    receipt = accepted.receipt
    window = dt.timedelta(seconds=lake.settings.idempotency_window_s)
    assert (receipt.target, receipt.rows, receipt.rows_rejected) == ("t", 3, 2)
    assert receipt.payload_fingerprint == "v1:" + entry.fingerprint.hex()
    assert receipt.idempotency_expires_at - receipt.accepted_at == window
    assert parse_batch_id(receipt.batch_id) == (1, accepted.shard, accepted.position)
    token = await lake.token_of(accepted)
    assert token.history == (await lake.catalog.identity()).history
    assert (token.floor, dict(token.positions), token.own) == (
        0,
        {accepted.shard: accepted.position + 1},
        frozenset({(accepted.shard, accepted.position)}),
    )
    now = (await lake.catalog.head()).now
    assert abs((now - receipt.accepted_at).total_seconds()) < 60


async def test_A2_an_entry_for_several_tables_has_the_target_star(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    accepted = await lake.accept(entry_of([table, other], [1, 2]))
    assert (accepted.receipt.target, accepted.receipt.rows) == ("*", 4)


# --- A3: replays ------------------------------------------------------------------------------


async def test_A3_a_replay_gets_the_receipt_and_the_rows_are_published_once(
    lake: LakeHarness, table: TableSchema
) -> None:
    first = await lake.accept(entry_of(table, [1, 2], key="k"))
    await _assert_replay(lake, table, first)
    await lake.drain()
    await _assert_replay(lake, table, first)
    await lake.drain()
    assert await lake.rows_by_entry() == {(first.shard, first.position): 2}
    assert total(await lake.bus.ends()) == 1


async def test_A3_a_replay_is_answered_after_a_schema_change_and_after_a_drop(
    lake: LakeHarness, table: TableSchema
) -> None:
    first = await lake.accept(entry_of(table, [1, 2], key="k"))
    changed = dataclasses.replace(table, columns=(*table.columns, Column(0, "more", "bigint")))
    await lake.catalog.alter_table(schema=changed, expected_version=table.version)
    record = await _assert_replay(lake, table, first)
    assert dict(record.record.schema_versions) == {table.table_id: table.version}
    ticket = await lake.catalog.begin_drop(name="t")
    await _assert_replay(lake, table, first)
    await lake.drain()
    await lake.catalog.finish_drop(ticket)
    await _assert_replay(lake, table, first)
    # The door judges names of today, but keys of ever: a new table of that name changes nothing.
    await lake.create()
    await _assert_replay(lake, table, first)


async def test_A3_a_replay_is_answered_under_backpressure(open_lake: OpenLake) -> None:
    lake = await open_lake(backlog_bytes_hard=1)
    table = await lake.create()
    first = await lake.accept(entry_of(table, [1, 2], key="k"))
    with pytest.raises(Backpressure):
        await lake.bus.append(entry_of(table, [3], key="other"))
    await _assert_replay(lake, table, first)


async def test_A3_the_key_belongs_to_principal_and_target_and_to_no_shard(
    lake: LakeHarness, table: TableSchema
) -> None:
    other = await lake.create("u")
    await lake.accept(entry_of(table, [1], key="k"))
    await lake.accept(entry_of(table, [1], key="k", principal_id=2))
    await lake.accept(entry_of(other, [1], key="k"))
    await lake.accept(entry_of([table, other], [1], key="k"))
    await lake.accept(entry_of(table, [1], key="K"))
    for ordering_key in "abcdef":  # some of these lie on another shard
        again = await lake.bus.append(entry_of(table, [1], key="k", ordering_key=ordering_key))
        assert isinstance(again, KeyTaken)
    assert total(await lake.bus.ends()) == 5


async def test_A3_without_a_key_every_request_is_an_entry(
    lake: LakeHarness, table: TableSchema
) -> None:
    first, second = await lake.accept(entry_of(table)), await lake.accept(entry_of(table))
    assert first.receipt.batch_id != second.receipt.batch_id
    await lake.drain()
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_A3_an_unknown_key_is_not_found(lake: LakeHarness, table: TableSchema) -> None:
    await lake.accept(entry_of(table, key="k"))
    assert await lake.bus.find_key(1, "t", "other") is None
    assert await lake.bus.find_key(2, "t", "k") is None
    assert await lake.bus.find_key(1, "*", "k") is None


async def _assert_replay(lake: LakeHarness, table: TableSchema, first: Accepted) -> KeyTaken:
    again = await lake.bus.append(entry_of(table, [1, 2], key="k"))
    assert isinstance(again, KeyTaken), again
    assert again.record.receipt == first.receipt
    return again


# --- A4, A5, A6 -------------------------------------------------------------------------------


async def test_A4_another_payload_meets_the_first_one_and_appends_nothing(
    lake: LakeHarness, table: TableSchema
) -> None:
    first = await lake.accept(entry_of(table, [1], key="k"))
    before = await lake.bus.ends()
    conflicting = entry_of(table, [2], key="k")
    outcome = await lake.bus.append(conflicting)
    assert isinstance(outcome, KeyTaken)
    assert outcome.record.fingerprint == entry_of(table, [1]).fingerprint
    assert outcome.record.fingerprint != conflicting.fingerprint
    assert outcome.record.receipt.batch_id == first.receipt.batch_id
    assert await lake.bus.ends() == before
    await lake.drain()
    assert sum((await lake.rows_by_entry()).values()) == 1


async def test_A5_of_concurrent_requests_with_one_key_one_is_the_entry(
    lake: LakeHarness, table: TableSchema
) -> None:
    second = await lake.second()
    # Two payloads and several shards, so that no queue in front of one shard does the work.
    entries = [
        entry_of(table, [n % 2], key="k", ordering_key=None if n % 3 else f"o{n}")
        for n in range(20)
    ]
    buses = [lake.bus, second.bus]
    outcomes = await asyncio.gather(*(buses[n % 2].append(e) for n, e in enumerate(entries)))
    (accepted,) = [o for o in outcomes if isinstance(o, Accepted)]
    taken = [o for o in outcomes if isinstance(o, KeyTaken)]
    assert len(taken) == 19
    winner = entries[outcomes.index(accepted)]
    for outcome in taken:
        assert outcome.record.receipt == accepted.receipt
        assert outcome.record.fingerprint == winner.fingerprint
    assert total(await lake.bus.ends()) == 1


async def test_A5_groups_with_the_same_keys_in_any_order_all_get_answers(
    lake: LakeHarness, table: TableSchema
) -> None:
    second = await lake.second()
    keys = [f"k{n}" for n in range(12)]

    def appends(view_bus: object, order: list[str]) -> list[asyncio.Task[AppendOutcome]]:
        bus = lake.bus if view_bus is lake else second.bus
        return [
            asyncio.ensure_future(bus.append(entry_of(table, [1], key=key, ordering_key=key[-1])))
            for key in order
        ]

    tasks = appends(lake, keys) + appends(second, keys[::-1])
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert sum(isinstance(outcome, Accepted) for outcome in outcomes) == len(keys)
    assert total(await lake.bus.ends()) == len(keys)


async def test_A6_an_unknown_outcome_is_resolved_by_the_key(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.LOST_REPLIES)
    entry = entry_of(table, [1, 2], key="k")
    await lake.accept(entry_of(table, [0]))
    await lake.lose_next_reply("append")
    with pytest.raises(OutcomeUnknown) as caught:
        await lake.bus.append(entry)
    assert caught.value.retryable
    outcome = await _append_again(lake, entry)
    assert isinstance(outcome, Accepted | KeyTaken)
    await lake.drain()
    rows = await lake.rows_by_entry()
    assert sorted(rows.values()) == [1, 2]


async def _append_again(lake: LakeHarness, entry: object) -> AppendOutcome:
    """As a client does: again until there is an answer."""

    for _ in range(50):
        try:
            return await lake.bus.append(entry)  # type: ignore[arg-type]
        except (OutcomeUnknown, Unavailable):
            await lake.advance_s(0.05)
    raise AssertionError("the bus never answered again")


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
    one = {"ordering_key": "one"}
    entries = [
        entry_of(table, [1], key="a", **one),
        entry_of(table, [2], key="b", schema_version=9, **one),
        entry_of(table, [3], key="taken", **one),
        entry_of(table, [4], key="c", **one),
        entry_of(table, [5], key="d", first_attempt_at=long_ago, **one),
        entry_of(table, [6], key="a", **one),
        entry_of(table, [7], **one),
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


# --- A10 to A13 -------------------------------------------------------------------------------


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
    one = {"ordering_key": "one"}
    first = await lake.accept(entry_of(table, [1], **one))
    rejects = [RejectSet(table.table_id, table.version, rows=1, document=b"[]")]
    with pytest.raises(Backpressure) as caught:
        await lake.bus.append(entry_of(table, [2], key="k", rejects=rejects, **one))
    assert caught.value.retryable
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    assert await lake.bus.find_key(1, "t", "k") is None
    assert total(await lake.bus.ends()) == 1
    assert list(await lake.bus.quarantine_items()) == []
    await lake.drain()
    second = await lake.accept(entry_of(table, [2], key="k", **one))
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


async def test_A13_an_old_first_attempt_with_an_unknown_key_is_refused(
    lake: LakeHarness, table: TableSchema
) -> None:
    now = (await lake.catalog.head()).now
    window = dt.timedelta(seconds=lake.settings.idempotency_window_s)
    margin = dt.timedelta(minutes=1)
    with pytest.raises(IdempotencyExpired):
        await lake.bus.append(
            entry_of(table, [1], key="k", first_attempt_at=now - window - margin)
        )
    assert await lake.bus.find_key(1, "t", "k") is None
    assert total(await lake.bus.ends()) == 0
    first = await lake.accept(
        entry_of(table, [1], key="k", first_attempt_at=now - window + margin)
    )
    # Known keys are answered whatever the caller says about its first attempt (A3).
    again = await lake.bus.append(
        entry_of(table, [1], key="k", first_attempt_at=now - window - margin)
    )
    assert isinstance(again, KeyTaken)
    assert again.record.receipt == first.receipt


async def test_A13_the_window_counts_from_the_terminal_time(open_lake: OpenLake) -> None:
    window_s = 0.6
    lake = await open_lake(idempotency_window_s=window_s, segment_ring_rotate_age_s=0.05)
    table = await lake.create()
    first = await lake.accept(entry_of(table, [1], key="k"))

    async def purge_and_replay() -> None:
        await lake.bus.purge()
        again = await lake.bus.append(entry_of(table, [1], key="k"))
        assert isinstance(again, KeyTaken)
        assert again.record.receipt == first.receipt

    for _ in range(4):  # long after its acceptance, but the entry is not terminal
        await lake.advance_s(window_s / 2)
        await purge_and_replay()
    await lake.drain()
    await purge_and_replay()
    await lake.advance_s(window_s / 2)
    await purge_and_replay()


async def test_A13_keys_go_after_their_window(open_lake: OpenLake) -> None:
    window_s = 0.2
    lake = await open_lake(idempotency_window_s=window_s, segment_ring_rotate_age_s=0.05)
    table = await lake.create()
    await lake.accept(entry_of(table, [1], key="k"))
    await lake.drain()
    for _ in range(40):  # generations of keys are left, wait a window, and are emptied
        if await lake.bus.find_key(1, "t", "k") is None:
            break
        await lake.advance_s(window_s)
        await lake.bus.purge()
    assert await lake.bus.find_key(1, "t", "k") is None
