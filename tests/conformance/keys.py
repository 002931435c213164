"""A2 to A6 and A13: receipts and idempotency keys."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt

import pytest

from lakebus.errors import Backpressure, IdempotencyExpired, OutcomeUnknown, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, AppendOutcome, KeyTaken, NewEntry, RejectSet
from storage.bus.receipting import parse_batch_id
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of, total

# --- A2: receipts ---------------------------------------------------------------------------------


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


async def test_A10_rejected_rows_are_there_though_the_reply_was_lost(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.LOST_REPLIES)
    rejects = RejectSet(table.table_id, table.version, rows=2, document=b"[]")
    entry = entry_of(table, [1], key="k", rejects=[rejects])
    await lake.lose_next_reply("append")
    with pytest.raises(OutcomeUnknown):
        await lake.bus.append(entry)
    await _append_again(lake, entry)
    assert [item.rows for item in await lake.bus.quarantine_items()] == [2]


async def _append_again(lake: LakeHarness, entry: NewEntry) -> AppendOutcome:
    """As a client does: again until there is an answer."""

    for _ in range(50):
        try:
            return await lake.bus.append(entry)
        except (OutcomeUnknown, Unavailable):
            await lake.advance_s(0.05)
    raise AssertionError("the bus never answered again")


# --- A13: the window ------------------------------------------------------------------------------


async def test_A13_an_old_first_attempt_with_an_unknown_key_is_refused(
    lake: LakeHarness, table: TableSchema
) -> None:
    now = (await lake.catalog.head()).now
    window = dt.timedelta(seconds=lake.settings.idempotency_window_s)
    margin = dt.timedelta(minutes=1)
    with pytest.raises(IdempotencyExpired):
        await lake.bus.append(entry_of(table, [1], key="k", first_attempt_at=now - window - margin))
    assert await lake.bus.find_key(1, "t", "k") is None
    assert total(await lake.bus.ends()) == 0
    first = await lake.accept(entry_of(table, [1], key="k", first_attempt_at=now - window + margin))
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
