"""Tables made in the transaction of the entry that fills them: A3, A5, A6, A8, A9, A12 and F3."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
from collections.abc import Sequence

import pytest

from lakebus.errors import Backpressure, IdempotencyExpired, OutcomeUnknown
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, IngestBus, KeyTaken, NewEntry, NewTable, SchemaStale
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of, total

_COLUMNS = (Column(1, "id", "bigint"), Column(2, "note", "varchar"))


async def making(
    bus: IngestBus,
    names: Sequence[str],
    *,
    beside: Sequence[TableSchema] = (),
    key: str | None = None,
    ordering_key: str | None = "one",
    ids: Sequence[int] = (1,),
) -> NewEntry:
    """An entry with rows for tables to be made, and for some that exist."""

    numbers = await bus.number_tables(len(names))
    schemas = [
        TableSchema(table_id=table_id, name=name, version=1, columns=_COLUMNS)
        for table_id, name in zip(numbers.table_ids, names, strict=True)
    ]
    entry = entry_of([*schemas, *beside], ids, key=key, ordering_key=ordering_key, target="*")
    creates = tuple(NewTable(schema, numbers.history_serial) for schema in schemas)
    return dataclasses.replace(entry, creates=creates)


def names_of(entry: NewEntry) -> list[str]:
    return [table.schema.name for table in entry.creates]


async def nothing_of(lake: LakeHarness, entry: NewEntry, *, head: int, ends: int) -> None:
    """Neither a table nor a snapshot, an entry or a key of the entry."""

    for name in names_of(entry):
        assert await lake.catalog.table(name) is None
    assert (await lake.catalog.head()).snapshot_id == head
    assert total(await lake.bus.ends()) == ends
    if entry.idempotency_key is not None:
        assert await lake.bus.find_key(1, "*", entry.idempotency_key) is None


async def test_A12_a_table_and_its_first_rows_are_one_transaction(lake: LakeHarness) -> None:
    before = await lake.catalog.head()
    entry = await making(lake.bus, ["made", "too"], key="k", ids=[1, 2])
    accepted = await lake.accept(entry)
    after = await lake.catalog.head()
    assert after.snapshot_id == before.snapshot_id + 1
    assert after.published_at > before.published_at
    snapshot = await lake.catalog.snapshot(after.snapshot_id)
    made = {str(t.schema.table_id): {"created": t.schema.name} for t in entry.creates}
    assert (snapshot.operation, snapshot.summary) == ("create", {"tables": made})
    delta = await lake.catalog.manifest_delta(after=before.snapshot_id, until=after.snapshot_id)
    assert [life.schema for life in delta.schemas] == [t.schema for t in entry.creates]
    for table in entry.creates:
        state = await lake.catalog.table(table.schema.name)
        assert state is not None
        assert (state.open, state.schema) == (True, table.schema)
    await lake.drain()
    place = (accepted.shard, accepted.position)
    for table in entry.creates:
        assert await lake.rows_by_entry(table_id=table.schema.table_id) == {place: 2}


async def test_A12_a_table_made_with_rows_changes_and_takes_rows_like_any_other(
    lake: LakeHarness,
) -> None:
    entry = await making(lake.bus, ["made"])
    await lake.accept(entry)
    (schema,) = (table.schema for table in entry.creates)
    await lake.accept(entry_of(schema, [2]))
    wider = dataclasses.replace(schema, columns=(*schema.columns, Column(0, "more", "bigint")))
    changed = (await lake.catalog.alter_table(schema=wider, expected_version=1)).schema
    assert [column.column_id for column in changed.columns] == [1, 2, 3]
    assert await lake.bus.append(entry_of(schema, [3])) == SchemaStale((schema.table_id,))
    # Ids that were given are never given to another table.
    other = await lake.create("other")
    assert other.table_id > schema.table_id
    assert (await making(lake.bus, ["x"])).creates[0].schema.table_id > other.table_id


async def test_A3_a_retry_of_the_rows_that_made_their_table_gets_the_receipt(
    lake: LakeHarness,
) -> None:
    entry = await making(lake.bus, ["made"], key="k")
    first = await lake.accept(entry)
    (schema,) = (table.schema for table in entry.creates)
    # Who looks sees the table now, and sends the rows to it.
    assert await lake.bus.append(entry) == SchemaStale((schema.table_id,))
    again = await lake.bus.append(dataclasses.replace(entry, creates=()))
    assert isinstance(again, KeyTaken)
    assert again.record.receipt == first.receipt
    assert again.record.schema_versions == {schema.table_id: 1}
    await lake.drain()
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="made"))
    head = (await lake.catalog.head()).snapshot_id
    # After a drop the table would be made anew, but for the key.
    late = await lake.bus.append(await making(lake.bus, ["made"], key="k"))
    assert isinstance(late, KeyTaken)
    assert late.record.receipt == first.receipt
    assert await lake.catalog.table("made") is None
    assert (await lake.catalog.head()).snapshot_id == head
    await lake.accept(await making(lake.bus, ["made"], key="k2"))


async def test_A5_of_concurrent_makers_of_one_table_one_wins(lake: LakeHarness) -> None:
    second = await lake.second()
    buses = [lake.bus, second.bus]
    entries = [await making(buses[n % 2], ["made"], key=f"k{n}", ids=[n]) for n in range(6)]
    same = [await making(buses[n % 2], ["same"], key="same") for n in range(4)]
    outcomes = await asyncio.gather(
        *(buses[n % 2].append(entry) for n, entry in enumerate([*entries, *same]))
    )
    for outcome, entry in zip(outcomes, [*entries, *same], strict=True):
        if isinstance(outcome, SchemaStale):
            assert outcome.table_ids == (entry.creates[0].schema.table_id,)
        else:
            assert isinstance(outcome, Accepted | KeyTaken)
    assert sum(isinstance(outcome, Accepted) for outcome in outcomes[:6]) == 1
    assert sum(isinstance(outcome, Accepted) for outcome in outcomes[6:]) == 1
    assert total(await lake.bus.ends()) == 2
    await lake.drain()
    assert sorted((await lake.rows_by_entry()).values()) == [1, 1]


async def test_A6_a_lost_reply_to_the_making_of_a_table_is_resolved_by_its_key(
    lake: LakeHarness,
) -> None:
    lake.needs(Capability.LOST_REPLIES)
    entry = await making(lake.bus, ["made"], key="k")
    await lake.lose_next_reply("append")
    with pytest.raises(OutcomeUnknown):
        await lake.bus.append(entry)
    state = await lake.catalog.table("made")
    assert state is not None
    outcome = await lake.bus.append(dataclasses.replace(entry, creates=()))
    assert isinstance(outcome, KeyTaken)
    assert total(await lake.bus.ends()) == 1
    await lake.drain()
    assert sum((await lake.rows_by_entry(table_id=state.schema.table_id)).values()) == 1


async def test_A8_one_table_that_is_there_keeps_all_others_from_being_made(
    lake: LakeHarness,
) -> None:
    there = await lake.create("there")
    head = (await lake.catalog.head()).snapshot_id
    entry = await making(lake.bus, ["new", "there"], key="k")
    assert await lake.bus.append(entry) == SchemaStale((entry.creates[1].schema.table_id,))
    assert await lake.catalog.table("new") is None
    assert (await lake.catalog.head()).snapshot_id == head
    both = await making(lake.bus, ["new"], beside=[there], key="k", ids=[1, 2])
    accepted = await lake.accept(both)
    await lake.drain()
    for table_id in (there.table_id, both.creates[0].schema.table_id):
        rows = await lake.rows_by_entry(table_id=table_id)
        assert rows == {(accepted.shard, accepted.position): 2}


async def test_A9_an_entry_that_is_refused_makes_no_table(open_lake: OpenLake) -> None:
    lake = await open_lake(backlog_bytes_hard=1)
    there = await lake.create("there")
    head = await lake.catalog.head()
    nobody = dataclasses.replace(there, table_id=there.table_id + 9_000)
    stale = await making(lake.bus, ["made"], beside=[nobody], key="k")
    assert await lake.bus.append(stale) == SchemaStale((nobody.table_id,))
    await nothing_of(lake, stale, head=head.snapshot_id, ends=0)
    late = dataclasses.replace(
        await making(lake.bus, ["made"], key="k"), first_attempt_at=head.now - dt.timedelta(days=9)
    )
    with pytest.raises(IdempotencyExpired):
        await lake.bus.append(late)
    await nothing_of(lake, late, head=head.snapshot_id, ends=0)
    await lake.accept(entry_of(there, ordering_key="one"))
    full = await making(lake.bus, ["made"], key="k")
    with pytest.raises(Backpressure):
        await lake.bus.append(full)
    await nothing_of(lake, full, head=head.snapshot_id, ends=1)
    await lake.drain()
    await lake.accept(await making(lake.bus, ["made"], key="k"))


async def test_A9_neighbours_of_an_entry_that_makes_a_table_are_accepted(
    lake: LakeHarness, table: TableSchema
) -> None:
    entries = [entry_of(table, [n], key=f"k{n}", ordering_key="one") for n in range(6)]
    for n in (1, 4):
        entries[n] = await making(lake.bus, [f"made{n}"], key=f"k{n}")
    outcomes = await asyncio.gather(*(lake.bus.append(entry) for entry in entries))
    places = [outcome.position for outcome in outcomes if isinstance(outcome, Accepted)]
    assert sorted(places) == list(range(6))
    await lake.drain()
    assert len(await lake.rows_by_entry()) == 6


async def test_F3_numbers_that_a_lost_line_gave_make_no_table(lake: LakeHarness) -> None:
    lake.needs(Capability.RESTORE)
    backup = await lake.take_backup()
    entry = await making(lake.bus, ["made"], key="k")
    await lake.restore(backup)
    (lost,) = (table.schema for table in entry.creates)
    assert await lake.bus.append(entry) == SchemaStale((lost.table_id,))
    assert await lake.catalog.table("made") is None
    again = await making(lake.bus, ["made"], key="k")
    assert again.creates[0].schema.table_id > lost.table_id
    await lake.accept(again)
