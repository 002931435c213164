"""The transactions of maintenance, killed at each statement and made to meet each other."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Awaitable, Callable

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import OutcomeUnknown, SnapshotExpired
from lakebus.schemas import TableSchema
from storage.files.objects import MemoryObjectStore
from storage.maintenance.interface import Swap, SwapOutcome
from storage.postgres import PostgresLake
from tests.conformance.harness import entry_of
from tests.conformance.upkeep import files_of, swap_of, swapped
from tests.failpoints.actions import Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.failpoints.sql import SqlPause, SqlTerminate
from tests.matrix.rig import MatrixLake, killed_at_each, locks_waited_for, named
from tests.matrix.test_purge_faults import objects

pytestmark = pytest.mark.usefixtures("patient_sessions")


async def _waits(lake: MatrixLake, *, within_s: float = 20.0) -> None:
    """Returns once a session waits for a lock."""

    async with asyncio.timeout(within_s):
        while not await locks_waited_for(lake.dsn):
            await asyncio.sleep(0.005)  # nothing tells when a session begins to wait


async def _expire_all(lake: MatrixLake) -> None:
    await lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=100)


# --- killed at each statement ---------------------------------------------------------------------


async def test_E1_a_swap_killed_at_any_statement_changes_nothing(matrix_lake: MatrixLake) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    await files_of(lake, table, 2)
    places = markers_of("publish_swap")
    assert len(places) >= 6
    for place in places:
        with named(place):
            swap = await swap_of(lake, table, await lake.upkeep.live_files(table.table_id))
            before = await lake.everything()
            await lake.sql.arm(place, SqlTerminate())
            with pytest.raises(OutcomeUnknown):
                await lake.upkeep.publish_swap(swap)
            await lake.unchanged_since(before)
            assert await lake.upkeep.swap_outcome(swap.publication_id) is None
            made = await lake.upkeep.publish_swap(swap)
            assert made.outcome is SwapOutcome.PUBLISHED
            assert await lake.upkeep.swap_outcome(swap.publication_id) == made


async def test_E3_every_call_of_upkeep_killed_at_any_statement_changes_nothing(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    files = await files_of(lake, table, 3)
    await swapped(lake, table, files)
    await lake.upkeep.register_intents(table.table_id, 1, owner=new_uuid(), ttl_s=0)
    floor = files[-1].first_snapshot
    pinned, live = new_uuid(), await lake.upkeep.live_files(table.table_id)

    # In the order in which each finds work to do.
    steps: list[tuple[list[str], Callable[[], Awaitable[object]]]] = [
        (markers_of("create_tag"), lambda: lake.upkeep.create_tag("a", 3, created_by="me")),
        (markers_of("hold_pin"), lambda: lake.upkeep.pin(pinned, kind="x", floor=floor, ttl_s=60)),
        (
            markers_of("expire_snapshots"),
            lambda: lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=100),
        ),
        (markers_of("drop_tag"), lambda: lake.upkeep.drop_tag("a")),
        (
            markers_of("condemn_orphans"),
            lambda: lake.upkeep.condemn_orphans(older_than_s=0, limit=100),
        ),
    ]
    for places, call in steps:
        await killed_at_each(lake, places, call)
    assert not await lake.upkeep.tags()
    await lake.upkeep.release_pin(pinned)
    await killed_at_each(lake, markers_of("condemn"), lambda: lake.upkeep.condemn(limit=100))
    await lake.condemn_regardless(live[0].file_id, "x")  # to be pardoned
    await killed_at_each(
        lake,
        markers_of("begin_deletes"),
        lambda: lake.upkeep.begin_deletes(window_s=0, limit=100),
    )
    assert {one.state for one in await lake.upkeep.condemned()} == {"deleting"}
    assert len(await lake.upkeep.condemned()) == 4
    assert list(await lake.upkeep.live_files(table.table_id)) == list(live)


# --- races ----------------------------------------------------------------------------------------


async def test_E2_a_swap_that_waits_for_another_finds_its_inputs_gone(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    files = await files_of(lake, table, 2)
    first, second = [await swap_of(lake, table, files) for _ in range(2)]
    await lake.sql.arm("publish_swap.after_inputs", SqlPause())
    winner = asyncio.ensure_future(lake.upkeep.publish_swap(first))
    await lake.sql.reached("publish_swap.after_inputs")
    loser = asyncio.ensure_future(lake.upkeep.publish_swap(second))
    await _waits(lake)
    await lake.sql.resume("publish_swap.after_inputs")
    assert (await winner).outcome is SwapOutcome.PUBLISHED
    assert (await loser).outcome is SwapOutcome.INPUTS_LOST
    assert sum((await lake.rows_by_entry()).values()) == 2


async def test_C7_an_append_waits_for_a_swap_and_both_are_published(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    files = await files_of(lake, table, 2)
    await lake.accept_many(table, 1)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    await lake.sql.arm("publish_swap.after_files", SqlPause())
    swap = asyncio.ensure_future(lake.upkeep.publish_swap(await swap_of(lake, table, files)))
    await lake.sql.reached("publish_swap.after_files")
    append = asyncio.ensure_future(worker.publish(commit))
    await _waits(lake)
    await lake.sql.resume("publish_swap.after_files")
    made, published = await swap, await append
    assert made.snapshot_id is not None
    assert published.snapshot_id == made.snapshot_id + 1
    assert sum((await lake.rows_by_entry()).values()) == 3


async def test_E3_a_pin_comes_before_an_expiry_or_is_refused(matrix_lake: MatrixLake) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    files = await files_of(lake, table, 2)
    floor = files[-1].first_snapshot
    await swapped(lake, table, files)
    await lake.sql.arm("hold_pin.after_check", SqlPause())
    pin = asyncio.ensure_future(lake.upkeep.pin(new_uuid(), kind="x", floor=floor, ttl_s=600))
    await lake.sql.reached("hold_pin.after_check")
    expiry = asyncio.ensure_future(_expire_all(lake))
    await _waits(lake)
    await lake.sql.resume("hold_pin.after_check")
    await pin
    await expiry
    assert not await lake.upkeep.condemn(limit=100)
    # The other way round: what expires first is refused.
    await files_of(lake, table, 1)
    floor = (await lake.catalog.head()).oldest_snapshot_id
    await lake.sql.arm("expire_snapshots.after_snapshots", SqlPause())
    expiry = asyncio.ensure_future(_expire_all(lake))
    await lake.sql.reached("expire_snapshots.after_snapshots")
    late = asyncio.ensure_future(lake.upkeep.pin(new_uuid(), kind="x", floor=floor, ttl_s=600))
    await _waits(lake)
    await lake.sql.resume("expire_snapshots.after_snapshots")
    await expiry
    with pytest.raises(SnapshotExpired):
        await late


async def test_E8_a_tag_comes_before_an_expiry_or_is_refused(matrix_lake: MatrixLake) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    await files_of(lake, table, 2)
    await lake.sql.arm("create_tag.after_insert", SqlPause())
    tag = asyncio.ensure_future(lake.upkeep.create_tag("a", 2, created_by="me"))
    await lake.sql.reached("create_tag.after_insert")
    expiry = asyncio.ensure_future(_expire_all(lake))
    await _waits(lake)
    await lake.sql.resume("create_tag.after_insert")
    await asyncio.gather(tag, expiry)
    assert (await lake.catalog.snapshot(2)).snapshot_id == 2

    await files_of(lake, table, 1)
    oldest = (await lake.catalog.head()).oldest_snapshot_id
    await lake.sql.arm("expire_snapshots.after_snapshots", SqlPause())
    expiry = asyncio.ensure_future(_expire_all(lake))
    await lake.sql.reached("expire_snapshots.after_snapshots")
    late = asyncio.ensure_future(lake.upkeep.create_tag("b", oldest, created_by="me"))
    await _waits(lake)
    await lake.sql.resume("expire_snapshots.after_snapshots")
    await expiry
    with pytest.raises(SnapshotExpired):
        await late


async def test_E8_the_last_tag_ends_before_another_is_made_or_after(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    await files_of(lake, table, 2)
    await lake.upkeep.create_tag("a", 2, created_by="me")
    await _expire_all(lake)
    await lake.sql.arm("drop_tag.after_expiry", SqlPause())
    drop = asyncio.ensure_future(lake.upkeep.drop_tag("a"))
    await lake.sql.reached("drop_tag.after_expiry")
    late = asyncio.ensure_future(lake.upkeep.create_tag("b", 2, created_by="me"))
    await _waits(lake)
    await lake.sql.resume("drop_tag.after_expiry")
    await drop
    with pytest.raises(SnapshotExpired):
        await late


async def test_E3_a_pin_waits_for_the_check_that_gives_files_up(matrix_lake: MatrixLake) -> None:
    """And the check for a pin that is on its way: a file that it keeps is pardoned."""

    lake, table = matrix_lake, await matrix_lake.create()
    first, second = await files_of(lake, table, 2)
    await lake.upkeep.create_tag("a", first.first_snapshot, created_by="me")
    await swapped(lake, table, [first, second])
    await _expire_all(lake)
    await lake.upkeep.condemn(limit=100)
    await lake.condemn_regardless(first.file_id, first.object_key)
    await lake.sql.arm("hold_pin.after_pin", SqlPause())
    pin = asyncio.ensure_future(
        lake.upkeep.pin(
            new_uuid(), kind="x", floor=None, snapshot_ids=[first.first_snapshot], ttl_s=600
        )
    )
    await lake.sql.reached("hold_pin.after_pin")
    # The tag goes in the same moment, so only the pin is left.
    untag = asyncio.ensure_future(lake.upkeep.drop_tag("a"))
    await _waits(lake)
    await lake.sql.resume("hold_pin.after_pin")
    await asyncio.gather(pin, untag)
    await lake.sql.arm("begin_deletes.after_check", SqlPause())
    deletes = asyncio.ensure_future(lake.upkeep.begin_deletes(window_s=0, limit=100))
    await lake.sql.reached("begin_deletes.after_check")
    late = asyncio.ensure_future(
        lake.upkeep.pin(
            new_uuid(), kind="x", floor=None, snapshot_ids=[first.first_snapshot], ttl_s=600
        )
    )
    await _waits(lake)
    await lake.sql.resume("begin_deletes.after_check")
    assert {one.file_id for one in await deletes} == {second.file_id}
    with pytest.raises(SnapshotExpired):
        await late


async def test_E3_a_payload_that_the_bus_names_is_pardoned(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    store, settings = MemoryObjectStore(), dataclasses.replace(lake.settings, claim_check_bytes=1)
    spilling = await PostgresLake.open(lake.dsn, bus_settings=settings, object_store=store)
    try:
        await spilling.bus.append(entry_of(table, [1], key="k"))
    finally:
        await spilling.close()
    (named,), _ = await objects(lake, store)
    file_id = uuid.UUID(named.removeprefix("bus/").removesuffix(".segment"))
    await lake.condemn_regardless(file_id, named)
    assert await lake.upkeep.begin_deletes(window_s=0, limit=100) == []
    assert not await lake.upkeep.condemned()


async def test_C6_collection_passes_over_an_intent_that_a_swap_has_locked(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    swap = await _late_swap(lake, table)
    await lake.sql.arm("publish_swap.after_intent_locks", SqlPause())
    publish = asyncio.ensure_future(lake.upkeep.publish_swap(swap))
    await lake.sql.reached("publish_swap.after_intent_locks")
    assert not await lake.upkeep.condemn_orphans(older_than_s=0, limit=100)
    await lake.sql.resume("publish_swap.after_intent_locks")
    assert (await publish).outcome is SwapOutcome.PUBLISHED
    assert not await lake.upkeep.condemned()


async def test_C6_a_swap_loses_to_a_collection_that_has_removed_its_intent(
    matrix_lake: MatrixLake,
) -> None:
    lake, table = matrix_lake, await matrix_lake.create()
    swap = await _late_swap(lake, table)
    await lake.sql.arm("condemn_orphans.after_intents", SqlPause())
    orphans = asyncio.ensure_future(lake.upkeep.condemn_orphans(older_than_s=0, limit=100))
    await lake.sql.reached("condemn_orphans.after_intents")
    publish = asyncio.ensure_future(lake.upkeep.publish_swap(swap))
    await _waits(lake)
    await lake.sql.resume("condemn_orphans.after_intents")
    assert [one.file_id for one in await orphans] == [swap.files[0].file_id]
    assert (await publish).outcome is SwapOutcome.INTENT_LOST


async def _late_swap(lake: MatrixLake, table: TableSchema) -> Swap:
    """One whose intent has expired already."""

    return await swap_of(lake, table, await files_of(lake, table, 2), ttl_s=0)


async def test_E2_what_happens_just_before_a_call_counts(
    matrix_lake: MatrixLake, failpoints: Failpoints
) -> None:
    """A process may be paused between its plan and its call for as long as it likes."""

    lake, table = matrix_lake, await matrix_lake.create()
    files = await files_of(lake, table, 2)
    other = await swap_of(lake, table, files[:1])

    async def win() -> None:
        assert (await lake.upkeep.publish_swap(other)).outcome is SwapOutcome.PUBLISHED

    late = await swap_of(lake, table, files)
    failpoints.arm("upkeep.before_swap", Run(win))
    assert (await lake.upkeep.publish_swap(late)).outcome is SwapOutcome.INPUTS_LOST

    await lake.upkeep.create_tag("a", files[0].first_snapshot, created_by="me")
    await _expire_all(lake)
    await lake.upkeep.drop_tag("a")
    (condemned,) = await lake.upkeep.condemn(limit=100)

    async def need_it_again() -> None:
        await lake.execute(
            "INSERT INTO lakebus.tag VALUES ('b', $1, clock_timestamp(), '')",
            files[0].first_snapshot,
        )

    failpoints.arm("upkeep.before_deletes", Run(need_it_again))
    assert await lake.upkeep.begin_deletes(window_s=0, limit=100) == []
    assert condemned.file_id == files[0].file_id
    assert not await lake.upkeep.condemned()
