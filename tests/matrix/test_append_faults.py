"""M02, M03, M05 and the append half of M19: the append transaction under faults."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Sequence

import pytest

from lakebus.errors import OutcomeUnknown, Unavailable
from lakebus.receipts import Receipt
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, KeyTaken, NewEntry, RejectSet, SchemaStale
from tests.conformance.creating import making
from tests.conformance.harness import LakeView, entry_of
from tests.failpoints.actions import Crash
from tests.failpoints.folder import FailpointFolder
from tests.failpoints.markers import markers_of
from tests.failpoints.sql import SqlBarrier, SqlError, SqlPause, SqlTerminate
from tests.matrix.ingest_process import end_of, start_ingest
from tests.matrix.rig import MatrixLake, Outcome, keyed_entries, locks_waited_for, named

pytestmark = pytest.mark.usefixtures("patient_sessions")

REFUSALS = ("40P01", "40001")


async def lock_waited_for(lake: MatrixLake) -> None:
    while not await locks_waited_for(lake.dsn):
        await asyncio.sleep(0.005)  # a lock that is waited for gives no signal


# --- M02 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["group_commit.after_take", "group_commit.before_append"])
async def test_M02_killed_while_requests_are_queued_nothing_is_durable_and_a_retry_works(
    matrix_lake: MatrixLake,
    matrix_table: TableSchema,
    failpoint_folder: FailpointFolder,
    place: str,
) -> None:
    lake, ids = matrix_lake, list(range(8))
    before = await lake.everything()
    failpoint_folder.arm(place, Crash())
    process = await start_ingest(lake, failpoint_folder, ids)
    assert await failpoint_folder.reached(place) == process.pid
    assert await end_of(process) == (-signal.SIGKILL, [])
    await lake.unchanged_since(before)

    outcomes = await lake.offer(keyed_entries(matrix_table, ids))
    assert {type(outcome) for outcome in outcomes} == {Accepted}
    await lake.drain()
    await lake.audit()
    await lake.replays()


async def test_M02_killed_after_the_commit_and_before_the_answer_a_retry_gets_the_receipt(
    matrix_lake: MatrixLake, matrix_table: TableSchema, failpoint_folder: FailpointFolder
) -> None:
    lake, ids = matrix_lake, list(range(8))
    failpoint_folder.arm("group_commit.after_append", Crash())
    process = await start_ingest(lake, failpoint_folder, ids)
    assert await end_of(process) == (-signal.SIGKILL, [])
    await lake.audit(others=len(ids), drained=False)

    before = await lake.everything()
    await lake.offer_again(keyed_entries(matrix_table, ids))
    await lake.unchanged_since(before)
    await lake.drain()
    await lake.audit()
    await lake.replays()


async def test_M02_killed_while_the_database_works_the_retry_waits_for_its_end(
    matrix_lake: MatrixLake, matrix_table: TableSchema, failpoint_folder: FailpointFolder
) -> None:
    """The session outlives its client: what it was asked for is done, and nobody hears of it."""
    lake, ids = matrix_lake, list(range(8))
    await lake.sql.arm("append_group.after_counter", SqlPause())
    process = await start_ingest(lake, failpoint_folder, ids)
    await lake.sql.reached("append_group.after_counter")
    process.kill()
    assert await end_of(process) == (-signal.SIGKILL, [])
    await lake.audit(drained=False)

    entries = keyed_entries(matrix_table, ids)
    retry = asyncio.ensure_future(lake.offer_again(entries))
    await lock_waited_for(lake)
    assert not retry.done()
    await lake.sql.resume("append_group.after_counter")
    await retry
    await lake.drain()
    await lake.audit()


async def test_M02_a_group_killed_at_any_statement_leaves_nothing(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    lake = matrix_lake
    for turn, place in enumerate(markers_of("append_group")):
        with named(place):
            entries = group(matrix_table, turn)
            before = await lake.everything()
            await lake.sql.arm(place, SqlTerminate())
            outcomes = await lake.offer(entries)
            assert {type(outcome) for outcome in outcomes} == {OutcomeUnknown}
            await lake.unchanged_since(before)
            again = await lake.offer(entries)
            assert {type(outcome) for outcome in again} == {Accepted}
    await lake.drain()
    await lake.audit()
    await lake.replays()


async def test_M02_the_making_of_a_table_killed_at_any_statement_leaves_neither_table_nor_rows(
    matrix_lake: MatrixLake,
) -> None:
    lake = matrix_lake
    for turn, place in enumerate(markers_of("create_and_append")):
        with named(place):
            entry = await making(lake.bus, [f"made{turn}"], key=f"key-{turn}")
            before = await lake.everything()
            await lake.sql.arm(place, SqlTerminate())
            assert {type(outcome) for outcome in await lake.offer([entry])} == {OutcomeUnknown}
            await lake.unchanged_since(before)
            assert {type(outcome) for outcome in await lake.offer([entry])} == {Accepted}
    await lake.drain()
    await lake.audit()
    assert [s.schema.name for s in await lake.catalog.tables()] == [
        f"made{turn}" for turn in range(len(markers_of("create_and_append")))
    ]


def group(table: TableSchema, turn: int) -> list[NewEntry]:
    """Four entries: with keys, without one, with rejected rows."""
    first = 10 * turn
    rejects = (RejectSet(table.table_id, table.version, rows=1, document=b"[1]"),)
    return [
        *keyed_entries(table, [first, first + 1]),
        entry_of(table, [first + 2], ordering_key="one"),
        entry_of(table, [first + 3], key=f"key-{first + 3}", ordering_key="one", rejects=rejects),
    ]


# --- M03 ------------------------------------------------------------------------------------------

#: Makes the time between two keys of one group long enough for another group to come between.
_SLOW_KEYS = """
CREATE FUNCTION lakebus.slow_key() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END';
CREATE TRIGGER slow_key BEFORE INSERT ON lakebus.idem_0
    FOR EACH ROW EXECUTE FUNCTION lakebus.slow_key();
"""


def reversed_pair(table: TableSchema, turn: int) -> tuple[list[NewEntry], list[NewEntry]]:
    """The same keys and rows in opposite order, on the same or on another shard; some keys are in
    one of the groups alone."""
    first, other = "one", "one" if turn % 2 else "two"
    ids = list(range(10 * turn, 10 * turn + 6))
    mine = keyed_entries(table, [*ids, ids[-1] + 1], ordering_key=first)
    theirs = keyed_entries(table, [*reversed(ids), ids[-1] + 2], ordering_key=other)
    return mine, theirs


def check_one_winner(
    pair: tuple[list[NewEntry], list[NewEntry]], answers: Sequence[list[Outcome]]
) -> None:
    """Of each key exactly one entry, and its receipt for whoever asked; the winner took all that
    both wanted, because both take their keys in one order."""
    by_key: dict[str, list[Outcome]] = {}
    for entries, outcomes in zip(pair, answers, strict=True):
        for entry, outcome in zip(entries, outcomes, strict=True):
            assert entry.idempotency_key is not None
            by_key.setdefault(entry.idempotency_key, []).append(outcome)
    contested = [outcomes for outcomes in by_key.values() if len(outcomes) == 2]
    assert len(contested) == 6
    for outcomes in by_key.values():
        assert len({receipt_of(outcome) for outcome in outcomes}) == 1
        assert sum(isinstance(outcome, Accepted) for outcome in outcomes) == 1
    assert len({isinstance(mine, Accepted) for mine, _ in contested}) == 1


def receipt_of(outcome: Outcome) -> Receipt:
    if isinstance(outcome, KeyTaken):
        return outcome.record.receipt
    assert isinstance(outcome, Accepted), repr(outcome)
    return outcome.receipt


async def race(lake: MatrixLake, view: LakeView, table: TableSchema, turn: int) -> None:
    """Both groups at once, from two processes' pools, each past its look at the keys."""
    pair = reversed_pair(table, turn)
    answers = await asyncio.gather(lake.offer(pair[0]), lake.offer(pair[1], view))
    check_one_winner(pair, answers)


async def test_M03_groups_with_the_same_keys_in_reverse_order_have_one_winner(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    lake, rounds = matrix_lake, 20
    view = await lake.second()
    await lake.sql.arm("append_group.before_keys", SqlBarrier(2), times=None)
    for turn in range(rounds):
        with named(f"pair {turn}"):
            await race(lake, view, matrix_table, turn)
    assert await lake.sql.hits("append_group.before_keys") == 2 * rounds
    await lake.sql.disarm("append_group.before_keys")
    await lake.drain()
    await lake.audit()
    await lake.replays()


async def test_M03_it_is_the_order_of_the_keys_that_keeps_them_from_a_deadlock(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    """With time between two keys of a group, the product's function has one winner still; the same
    function without its ORDER BY ends in a deadlock."""
    lake = matrix_lake
    view = await lake.second()
    await lake.execute(_SLOW_KEYS)
    await lake.sql.arm("append_group.before_keys", SqlBarrier(2), times=None)
    await race(lake, view, matrix_table, 0)

    source = await lake.value("SELECT pg_get_functiondef('lakebus.append_group'::regproc)")
    assert source.count(" ORDER BY k.key_hash") == 3
    await lake.execute("SET search_path = lakebus")
    await lake.execute(source.replace(" ORDER BY k.key_hash", ""))
    pair = reversed_pair(matrix_table, 1)
    answers = await asyncio.gather(lake.offer(pair[0]), lake.offer(pair[1], view))
    losers = [one for outcomes in answers for one in outcomes if isinstance(one, Unavailable)]
    assert len(losers) == 7, answers
    assert await lake.value(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    # Even so nothing is there twice: the loser left nothing, and its retry gets the receipts.
    await lake.sql.disarm("append_group.before_keys")
    lost = pair[0] if isinstance(answers[0][0], Unavailable) else pair[1]
    outcomes = await lake.offer(lost)
    assert sorted(type(one).__name__ for one in outcomes) == ["Accepted", *["KeyTaken"] * 6]
    await lake.drain()
    await lake.audit()


# --- M05 ------------------------------------------------------------------------------------------


async def test_M05_a_slow_neighbour_between_counter_and_commit_delays_its_own_shard_alone(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    lake, table = matrix_lake, matrix_table
    slow, behind, other = await held_shard(lake, table)
    shard = other.shard
    worker = lake.worker()
    published = await worker.publish_one()
    assert published.watermark == {**dict.fromkeys(lake_shards(lake), 0), shard: 1}
    assert await worker.bus.claim(worker.owner) is None, "a position was claimed over a hole"
    assert await lake.bus.ends() == published.watermark
    await lake.audit(drained=False)

    assert not slow.done()
    assert not behind.done()
    await lake.sql.resume("append_group.after_counter")
    first, second = await asyncio.gather(slow, behind)
    places = [(a.shard, a.position) for a in (*first, *second) if isinstance(a, Accepted)]
    held = places[0][0]
    assert places == [(held, n) for n in range(4)]
    claim = await worker.claim()
    assert (claim.lease.shard, claim.lease.lo, claim.lease.hi) == (held, 0, 4)
    await worker.publish(await worker.stage(claim))
    await lake.audit()
    await lake.replays()


async def test_M05_the_position_of_a_slow_neighbour_that_dies_is_given_to_the_next(
    matrix_lake: MatrixLake, matrix_table: TableSchema
) -> None:
    lake, table = matrix_lake, matrix_table
    slow, behind, other = await held_shard(lake, table)
    await lake.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event = 'PgSleep'"
    )
    assert {type(one) for one in await slow} == {OutcomeUnknown}
    (accepted,) = await behind
    assert isinstance(accepted, Accepted)
    assert accepted.position == 0
    assert accepted.shard != other.shard
    await lake.sql.disarm("append_group.after_counter")
    again = await lake.offer(keyed_entries(table, range(3), ordering_key="one"))
    assert [one.position for one in again if isinstance(one, Accepted)] == [1, 2, 3]
    await lake.drain()
    await lake.audit()
    await lake.replays()


async def held_shard(
    lake: MatrixLake, table: TableSchema
) -> tuple[asyncio.Task[list[Outcome]], asyncio.Task[list[Outcome]], Accepted]:
    """A group that stands between its counter and its commit, one that waits for it on the same
    shard, and an entry that another shard took meanwhile."""
    await lake.sql.arm("append_group.after_counter", SqlPause())
    slow = asyncio.create_task(lake.offer(keyed_entries(table, range(3), ordering_key="one")))
    await lake.sql.reached("append_group.after_counter")
    view = await lake.second()
    behind = asyncio.create_task(lake.offer(keyed_entries(table, [3], ordering_key="one"), view))
    await lock_waited_for(lake)
    other = await lake.accept(entry_of(table, [4], key="key-4", ordering_key="two"))
    assert not slow.done()
    assert not behind.done()
    return slow, behind, other


def lake_shards(lake: MatrixLake) -> range:
    return range(lake.settings.shards)


# --- M19 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sqlstate", REFUSALS)
async def test_M19_a_refused_append_left_nothing_and_is_sent_again_whole(
    matrix_lake: MatrixLake, matrix_table: TableSchema, sqlstate: str
) -> None:
    lake = matrix_lake
    for turn, place in enumerate(markers_of("append_group")):
        with named(place):
            entries = group(matrix_table, turn)
            before = await lake.everything()
            await lake.sql.arm(place, SqlError(sqlstate))
            outcomes = await lake.offer(entries)
            assert {type(outcome) for outcome in outcomes} == {Unavailable}
            await lake.unchanged_since(before)
            again = await lake.offer(entries)
            assert {type(outcome) for outcome in again} == {Accepted}
    await lake.drain()
    await lake.audit()


@pytest.mark.parametrize("sqlstate", REFUSALS)
async def test_M19_an_append_sent_again_meets_the_schema_fence_again(
    matrix_lake: MatrixLake, matrix_table: TableSchema, sqlstate: str
) -> None:
    """The first try was checked against the old version; the table changed before the second."""
    lake, table = matrix_lake, matrix_table
    entries = keyed_entries(table, range(4))
    await lake.sql.arm("append_group.after_log", SqlError(sqlstate))
    assert {type(outcome) for outcome in await lake.offer(entries)} == {Unavailable}
    columns = (*table.columns, Column(0, "more", "bigint"))
    changed = await lake.catalog.alter_table(
        schema=dataclasses.replace(table, columns=columns), expected_version=table.version
    )
    before = await lake.everything()
    assert await lake.offer(entries) == [SchemaStale((table.table_id,))] * 4
    await lake.unchanged_since(before)
    outcomes = await lake.offer(keyed_entries(changed.schema, range(4)))
    assert {type(outcome) for outcome in outcomes} == {Accepted}
    await lake.drain()
    await lake.audit()
