"""The catalog by itself: tables, snapshots by id and time, and the manifest (A12, D1, D2, D8)."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import uuid

import pytest

from lakebus.errors import (
    HistoryLost,
    SchemaVersionMismatch,
    SnapshotExpired,
    SnapshotNotFound,
    TableExists,
    TableNotFound,
    TimeInFuture,
    Unavailable,
)
from lakebus.schemas import Column, TableSchema
from storage.catalog.interface import DropTicket, ManifestDelta, SchemaLife, TableChange
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import COLUMNS, Capability, LakeHarness, entry_of

# --- tables ---------------------------------------------------------------------------------------


async def test_D6_creating_a_table_publishes_a_snapshot_with_numbered_columns(
    lake: LakeHarness,
) -> None:
    before = await lake.catalog.head()
    change = await lake.catalog.create_table(
        name="flights",
        columns=(Column(0, "id", "bigint", nullable=False), Column(0, "note", "varchar")),
        partition_by=("id",),
        sort_by=("note", "id"),
        retention={"rows": "30 days"},
        actor="test",
    )
    head = await lake.catalog.head()
    assert change.created
    assert change.snapshot_id == head.snapshot_id == before.snapshot_id + 1
    assert change.schema == TableSchema(
        table_id=change.schema.table_id,
        name="flights",
        version=1,
        columns=(Column(1, "id", "bigint", nullable=False), Column(2, "note", "varchar")),
        partition_by=("id",),
        sort_by=("note", "id"),
        retention={"rows": "30 days"},
    )
    state = await lake.catalog.table("flights")
    assert state is not None
    assert (state.schema, state.open) == (change.schema, True)
    assert (await lake.catalog.snapshot(change.snapshot_id)).operation == "create"
    assert head.watermark == before.watermark


async def test_A12_a_name_is_taken_while_its_table_lives(
    lake: LakeHarness, table: TableSchema
) -> None:
    with pytest.raises(TableExists):
        await lake.create()
    again = await lake.catalog.create_table(name="t", columns=COLUMNS, if_not_exists=True)
    assert (again.created, again.schema) == (False, table)
    head = await lake.catalog.head()
    assert again.snapshot_id <= head.snapshot_id
    assert await lake.catalog.table("unknown") is None


async def test_A12_of_concurrent_creations_one_makes_the_table(lake: LakeHarness) -> None:
    view = await lake.second()
    outcomes = await asyncio.gather(
        *(
            catalog.create_table(name="t", columns=COLUMNS)
            for catalog in (lake.catalog, view.catalog) * 3
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, TableChange) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, TableExists) for outcome in outcomes) == 5
    assert len(await lake.catalog.tables()) == 1


async def test_A12_a_schema_change_makes_the_next_version_and_keeps_the_old(
    lake: LakeHarness, table: TableSchema
) -> None:
    renamed = dataclasses.replace(table.columns[0], name="number")
    wanted = dataclasses.replace(table, columns=(renamed, Column(0, "more", "double")))
    change = await lake.catalog.alter_table(schema=wanted, expected_version=1, actor="test")
    assert change.schema.version == 2
    assert change.schema.columns == (renamed, Column(3, "more", "double"))
    head = await lake.catalog.head()
    assert change.snapshot_id == head.snapshot_id
    assert (await lake.catalog.snapshot(head.snapshot_id)).operation == "alter"
    # A dropped column's id is never given again.
    fewer = dataclasses.replace(change.schema, columns=(renamed,))
    third = await lake.catalog.alter_table(schema=fewer, expected_version=2)
    back = dataclasses.replace(fewer, columns=(renamed, Column(0, "note", "varchar")))
    fourth = await lake.catalog.alter_table(schema=back, expected_version=3)
    assert fourth.schema.columns == (renamed, Column(4, "note", "varchar"))
    for schema in (table, change.schema, third.schema, fourth.schema):
        assert await lake.catalog.schema_version(table.table_id, schema.version) == schema
    assert await lake.catalog.schema_version(table.table_id, 5) is None
    assert await lake.catalog.schema_version(table.table_id, 0) is None
    assert await lake.catalog.schema_version(table.table_id + 99, 1) is None


async def test_A12_a_schema_change_meets_the_version_it_expects_or_changes_nothing(
    lake: LakeHarness, table: TableSchema
) -> None:
    head = await lake.catalog.head()
    with pytest.raises(SchemaVersionMismatch):
        await lake.catalog.alter_table(schema=table, expected_version=2)
    with pytest.raises(TableNotFound):
        await lake.catalog.alter_table(
            schema=dataclasses.replace(table, table_id=table.table_id + 99), expected_version=1
        )
    assert (await lake.catalog.head()).snapshot_id == head.snapshot_id
    view = await lake.second()
    outcomes = await asyncio.gather(
        *(
            catalog.alter_table(schema=table, expected_version=1)
            for catalog in (lake.catalog, view.catalog) * 2
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, TableChange) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, SchemaVersionMismatch) for outcome in outcomes) == 3


async def test_A12_a_drop_survives_a_crash_between_its_steps(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept(entry_of(table, [1]))
    ticket = await lake.catalog.begin_drop(name="t", actor="test")
    assert ticket.positions[accepted.shard] == accepted.position + 1
    assert (ticket.table_id, ticket.name) == (table.table_id, "t")
    await lake.restart()
    assert list(await lake.catalog.closing_tables()) == [ticket]
    assert await lake.catalog.begin_drop(name="t") == ticket
    state = await lake.catalog.table("t")
    assert state is not None
    assert not state.open
    with pytest.raises(TableNotFound):
        await lake.catalog.alter_table(schema=table, expected_version=1)
    with pytest.raises(TableExists):
        await lake.create()
    with pytest.raises(Unavailable):
        await lake.catalog.finish_drop(ticket)
    await lake.drain()
    dropped = await lake.catalog.finish_drop(ticket)
    assert dropped == (await lake.catalog.head()).snapshot_id
    assert await lake.catalog.finish_drop(ticket) == dropped
    assert (await lake.catalog.head()).snapshot_id == dropped
    assert list(await lake.catalog.closing_tables()) == []
    assert await lake.catalog.table("t") is None
    assert (await lake.catalog.snapshot(dropped)).operation == "drop"
    with pytest.raises(TableNotFound):
        await lake.catalog.begin_drop(name="t")


async def test_A12_a_dropped_name_is_free_for_another_table(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="t"))
    fresh = await lake.create()
    assert fresh.table_id != table.table_id
    assert [state.schema for state in await lake.catalog.tables()] == [fresh]


async def test_A12_what_is_not_being_dropped_cannot_be_finished(
    lake: LakeHarness, table: TableSchema
) -> None:
    with pytest.raises(TableNotFound):
        await lake.catalog.finish_drop(DropTicket(table.table_id, "t", {}))
    with pytest.raises(TableNotFound):
        await lake.catalog.begin_drop(name="unknown")
    state = await lake.catalog.table("t")
    assert state is not None
    assert state.open


async def test_D10_tables_are_listed_by_name(lake: LakeHarness) -> None:
    for name in ("b", "a.z", "c", "a.y"):
        await lake.create(name)
    assert [s.schema.name for s in await lake.catalog.tables()] == ["a.y", "a.z", "b", "c"]


# --- snapshots ------------------------------------------------------------------------------------


async def test_D2_the_head_is_the_newest_snapshot_and_the_clock(lake: LakeHarness) -> None:
    head = await lake.catalog.head()
    identity = await lake.catalog.identity()
    genesis = await lake.catalog.snapshot(1)
    assert (head.snapshot_id, head.oldest_snapshot_id) == (1, 1)
    assert head.history == genesis.history == identity.history
    assert head.watermark == dict.fromkeys(range(lake.bus.shards), 0) == genesis.watermark
    assert (genesis.parent_id, genesis.operation) == (None, "genesis")
    assert head.published_at == genesis.published_at <= head.now
    await lake.create()
    view = await lake.second()
    assert (await view.catalog.head()).snapshot_id == 2


async def test_D2_unknown_snapshots_are_not_found(lake: LakeHarness, table: TableSchema) -> None:
    newest = (await lake.catalog.head()).snapshot_id
    for unknown in (0, -1, newest + 1, 2**62, 2**70):
        with pytest.raises(SnapshotNotFound):
            await lake.catalog.snapshot(unknown)


async def test_D2_times_before_the_lake_and_in_the_future_have_errors_of_their_own(
    lake: LakeHarness,
) -> None:
    genesis = await lake.catalog.snapshot(1)
    with pytest.raises(SnapshotNotFound):
        await lake.catalog.snapshot_at(genesis.published_at - dt.timedelta(microseconds=1))
    assert await lake.catalog.snapshot_at(genesis.published_at) == genesis
    now = (await lake.catalog.head()).now
    with pytest.raises(TimeInFuture):
        await lake.catalog.snapshot_at(now + dt.timedelta(minutes=1))


async def test_D2_expired_snapshots_say_so_and_name_the_oldest(lake: LakeHarness) -> None:
    lake.needs(Capability.EXPIRE_SNAPSHOTS)
    for name in ("a", "b", "c"):
        await lake.advance_s(0.002)
        await lake.create(name)
    second = await lake.catalog.snapshot(2)
    await lake.expire_snapshots(before=3)
    for call in (lake.catalog.snapshot(2), lake.catalog.snapshot_at(second.published_at)):
        with pytest.raises(SnapshotExpired) as caught:
            await call
        assert caught.value.members["oldest_snapshot_id"] == 3
    assert (await lake.catalog.head()).oldest_snapshot_id == 3
    assert [s.snapshot_id for s in await lake.catalog.snapshots(limit=10)] == [4, 3]
    assert (await lake.catalog.snapshot(3)).snapshot_id == 3


async def test_D2_a_lost_line_of_history_has_an_error_of_its_own(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    backup = await lake.take_backup()
    kept = await lake.catalog.head()
    await lake.advance_s(0.01)
    await lake.create("lost")
    lost = await lake.catalog.head()
    await lake.advance_s(0.01)
    await lake.restore(backup)
    with pytest.raises(HistoryLost):
        await lake.catalog.snapshot(lost.snapshot_id)
    with pytest.raises(HistoryLost):
        await lake.catalog.snapshot_at(lost.published_at)
    assert (await lake.catalog.snapshot(kept.snapshot_id)).snapshot_id == kept.snapshot_id
    head = await lake.catalog.head()
    assert head.snapshot_id > lost.snapshot_id
    assert head.history != kept.history
    fork = (await lake.catalog.identity()).histories[-1]
    assert (fork.parent, fork.snapshot_id) == (kept.history, kept.snapshot_id)
    assert await lake.catalog.table("lost") is None


async def test_D2_snapshots_are_listed_newest_first_in_pages(lake: LakeHarness) -> None:
    for name in ("a", "b", "c"):
        await lake.create(name)
    assert [s.snapshot_id for s in await lake.catalog.snapshots(limit=10)] == [4, 3, 2, 1]
    assert [s.snapshot_id for s in await lake.catalog.snapshots(limit=2, before=4)] == [3, 2]
    assert list(await lake.catalog.snapshots(limit=2, before=1)) == []


async def test_D1_a_snapshot_is_the_same_whatever_is_published_later(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept(entry_of(table, [1, 2]))
    await lake.drain()
    head = await lake.catalog.head()
    snapshot = await lake.catalog.snapshot(head.snapshot_id)
    rows = await lake.rows_by_entry()
    await lake.accept(entry_of(table, [3]))
    await lake.drain()
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="t"))
    await lake.restart()
    assert await lake.catalog.snapshot(head.snapshot_id) == snapshot
    assert await lake.files.rows_at(lake.catalog, head.snapshot_id) == rows


# --- the manifest ---------------------------------------------------------------------------------


async def test_D8_deltas_add_up_to_the_manifest(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    await _busy_history(lake)
    newest = (await lake.catalog.head()).snapshot_id
    whole = _Manifest()
    whole.apply(await lake.catalog.manifest_delta(after=0, until=newest))
    stepwise = _Manifest()
    for snapshot_id in range(1, newest + 1):
        stepwise.apply(await lake.catalog.manifest_delta(after=snapshot_id - 1, until=snapshot_id))
        full = _Manifest()
        full.apply(await lake.catalog.manifest_delta(after=0, until=snapshot_id))
        assert full.at(snapshot_id) == stepwise.at(snapshot_id)
    for snapshot_id in range(1, newest + 1):
        assert whole.at(snapshot_id) == stepwise.at(snapshot_id)


async def test_D8_a_delta_says_nothing_of_what_comes_after_it(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1)
    await _busy_history(lake)
    newest = (await lake.catalog.head()).snapshot_id
    for until in range(1, newest + 1):
        delta = await lake.catalog.manifest_delta(after=0, until=until)
        ends = [file.last_snapshot for file in delta.files]
        ends += [life.last_snapshot for life in delta.schemas]
        ends += [life.table_last_snapshot for life in delta.schemas]
        assert all(end is None or end <= until for end in ends)
        assert all(file.first_snapshot <= until for file in delta.files)
    assert await lake.catalog.manifest_delta(after=newest, until=newest) == ManifestDelta(
        newest, newest, (), {}, ()
    )


async def test_D8_files_keep_what_was_recorded_of_them(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept(entry_of(table, [1, 2]))
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    published = await worker.publish(commit)
    assert published.snapshot_id is not None
    delta = await lake.catalog.manifest_delta(after=0, until=published.snapshot_id)
    (file,) = delta.files
    assert file == dataclasses.replace(
        commit.files[0], first_snapshot=published.snapshot_id, last_snapshot=None
    )


async def _busy_history(lake: LakeHarness) -> None:
    """Creations, rows, changes and a drop, in snapshots of their own."""

    first, second = await lake.create("t"), await lake.create("u")
    await lake.accept(entry_of([first, second], [1]))
    await lake.drain()
    changed = dataclasses.replace(first, columns=(*first.columns, Column(0, "more", "bigint")))
    first = (await lake.catalog.alter_table(schema=changed, expected_version=1)).schema
    await lake.accept(entry_of(first, [2]))
    await lake.drain()
    await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="u"))
    await lake.accept(entry_of(first, [3]))
    await lake.create("u")
    await lake.drain()


class _Manifest:
    """A reader's memory: deltas applied one after the other."""

    def __init__(self) -> None:
        self._files: dict[uuid.UUID, tuple[int, int | None]] = {}
        self._schemas: dict[tuple[int, int], SchemaLife] = {}

    def apply(self, delta: ManifestDelta) -> None:
        for file in delta.files:
            self._files[file.file_id] = (file.first_snapshot, file.last_snapshot)
        for file_id, last in delta.ended.items():
            self._files[file_id] = (self._files[file_id][0], last)
        for life in delta.schemas:
            self._schemas[(life.schema.table_id, life.schema.version)] = life

    def at(self, snapshot_id: int) -> tuple[set[uuid.UUID], set[tuple[int, int]]]:
        files = {f for f, life in self._files.items() if _holds(*life, snapshot_id)}
        schemas = {
            key
            for key, life in self._schemas.items()
            if _holds(life.first_snapshot, life.last_snapshot, snapshot_id)
        }
        return files, schemas


def _holds(first: int, last: int | None, snapshot_id: int) -> bool:
    return first <= snapshot_id and (last is None or snapshot_id < last)
