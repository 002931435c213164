"""Section D of the contract, as far as it needs no SQL: snapshots, tokens, waits."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import time

import pytest

from lakebus.errors import (
    HistoryLost,
    MalformedToken,
    Quarantined,
    SnapshotExpired,
    SnapshotNotFound,
    TimeInFuture,
    TokenHistoryLost,
    TokenNotCovered,
    TokenUnknown,
    VisibilityTimeout,
)
from lakebus.schemas import Column, TableSchema
from lakebus.tokens import VisibilityToken, merge_all
from storage.reading.resolve import SnapshotChoice
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.reader import Read, Reader, reading

_HANG_S = 10.0


def _places(read: Read, table: str) -> dict[tuple[int, int], int]:
    return {place: rows for (name, place), rows in read.rows.items() if name == table}


async def _soon(awaitable: object) -> None:
    """Lets a task get as far as it gets without anything happening."""

    assert awaitable is not None
    for _ in range(20):
        await asyncio.sleep(0)


# --- D1 -------------------------------------------------------------------------------------------


async def test_D1_a_read_sees_one_snapshot_of_all_tables_while_publishing_goes_on(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    tables = [await lake.create(name) for name in ("a", "b", "c")]
    done = asyncio.Event()

    async def write() -> None:
        for n in range(30):
            await lake.accept(entry_of(tables, [n, n]))
            await lake.worker().publish_one()
        done.set()

    seen: set[int] = set()

    async def look(reader: Reader) -> None:
        newest = 0
        while not done.is_set():
            read = await reader.read()
            assert _places(read, "a") == _places(read, "b") == _places(read, "c")
            assert read.snapshot_id >= newest
            newest = read.snapshot_id
            seen.add(newest)

    async with reading(lake) as one, reading(lake, await lake.second()) as two:
        await asyncio.gather(write(), look(one), look(two))
    assert len(seen) > 3


async def test_D1_names_are_resolved_at_the_snapshot(lake: LakeHarness) -> None:
    first = await lake.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
    await lake.accept(entry_of(first.schema, [1]))
    await lake.drain()
    altered = await lake.catalog.alter_table(
        schema=TableSchema(
            first.schema.table_id, "t", 1, (*first.schema.columns, Column(0, "more", "varchar"))
        ),
        expected_version=1,
    )
    before_drop = (await lake.catalog.head()).snapshot_id
    dropped = await lake.catalog.finish_drop(await lake.catalog.begin_drop(name="t"))
    again = await lake.catalog.create_table(name="t", columns=(Column(0, "other", "double"),))
    async with reading(lake) as reader:
        reads = {
            snapshot_id: await reader.read(SnapshotChoice(snapshot_id=snapshot_id))
            for snapshot_id in range(first.snapshot_id - 1, again.snapshot_id + 1)
        }
    assert reads[first.snapshot_id - 1].view.schema("t") is None
    assert reads[first.snapshot_id].view.schema("t") == first.schema
    assert reads[altered.snapshot_id - 1].view.schema("t") == first.schema
    assert reads[altered.snapshot_id].view.schema("t") == altered.schema
    assert sum(reads[before_drop].rows.values()) == 1
    assert reads[dropped].view.schema("t") is None
    assert reads[dropped].rows == {}
    assert reads[again.snapshot_id].view.schema("t") == again.schema
    assert reads[again.snapshot_id].rows == {}


# --- D2 -------------------------------------------------------------------------------------------


async def test_D2_latest_is_at_least_the_newest_published_before_the_request(
    lake: LakeHarness, table: TableSchema
) -> None:
    async with reading(lake) as one, reading(lake, await lake.second()) as two:
        for n in range(5):
            await lake.accept(entry_of(table, [n]))
            published = await lake.worker().publish_one()
            assert published.snapshot_id is not None
            for reader in (one, two):
                assert (await reader.read()).snapshot_id >= published.snapshot_id


async def test_D2_a_caller_may_relax_latest(lake: LakeHarness, table: TableSchema) -> None:
    async with reading(lake) as reader:
        old = await reader.read()
        await lake.accept(entry_of(table))
        await lake.worker().publish_one()
        assert (await reader.read(staleness_s=3_600)).snapshot_id == old.snapshot_id
        token = (await reader.read()).token
        assert (await reader.read(tokens=[token], staleness_s=3_600)).snapshot_id >= token.floor


async def test_D2_every_way_of_not_finding_a_snapshot_has_its_own_error(
    lake: LakeHarness, table: TableSchema
) -> None:
    head = await lake.catalog.head()
    first = await lake.catalog.snapshot(head.oldest_snapshot_id)
    async with reading(lake) as reader:
        with pytest.raises(SnapshotNotFound):
            await reader.read(SnapshotChoice(snapshot_id=head.snapshot_id + 1))
        with pytest.raises(SnapshotNotFound):
            await reader.read(SnapshotChoice(time=first.published_at - dt.timedelta(days=1)))
        with pytest.raises(TimeInFuture):
            await reader.read(SnapshotChoice(time=head.now + dt.timedelta(hours=1)))


async def test_D2_an_expired_snapshot_is_never_answered_by_a_neighbour(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.EXPIRE_SNAPSHOTS)
    for n in range(4):
        await lake.accept(entry_of(table, [n]))
        await lake.worker().publish_one()
    newest = (await lake.catalog.head()).snapshot_id
    expired = await lake.catalog.snapshot(newest - 2)
    async with reading(lake) as reader:
        # Known to the replica before it expires: what it remembers must not answer.
        by_id = SnapshotChoice(snapshot_id=expired.snapshot_id)
        by_time = SnapshotChoice(time=expired.published_at)
        for choice in (by_id, by_time):
            assert (await reader.read(choice)).snapshot_id == expired.snapshot_id
        await lake.expire_snapshots(before=newest)
        for choice in (by_id, by_time):
            with pytest.raises(SnapshotExpired):
                await reader.read(choice)
        assert len((await reader.read()).rows) == 4


# --- D3 -------------------------------------------------------------------------------------------


async def test_D3_a_covered_token_shows_every_published_entry_below_it(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=2)
    table = await lake.create()
    accepted = await lake.accept_many(table, 6)
    worker, other = lake.worker(), lake.worker()
    first, second, third = await worker.claim(), await other.claim(), await worker.claim()
    async with reading(lake) as reader:
        # The later ranges first: visible ahead of the watermark, and covering nothing yet.
        await other.publish(await other.stage(second))
        await worker.publish(await worker.stage(third))
        read = await reader.read()
        assert len(read.rows) == 4
        with pytest.raises(VisibilityTimeout):
            await reader.read(tokens=[accepted[5].receipt.visibility_token], within_s=0.05)
        await worker.publish(await worker.stage(first))
        read = await reader.read(tokens=[accepted[3].receipt.visibility_token])
        places = set(_places(read, "t"))
        assert {(a.shard, a.position) for a in accepted[:4]} <= places


# --- D4 -------------------------------------------------------------------------------------------


async def test_D4_a_query_waits_until_its_token_is_covered(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept(entry_of(table, [1, 2, 3]))
    async with reading(lake) as reader:
        waiting = asyncio.create_task(reader.read(tokens=[accepted.receipt.visibility_token]))
        await _soon(waiting)
        assert not waiting.done()
        published = await lake.worker().publish_one()
        read = await asyncio.wait_for(waiting, _HANG_S)
        assert published.snapshot_id is not None
        assert read.snapshot_id >= published.snapshot_id
        assert read.rows == {("t", (accepted.shard, accepted.position)): 3}


async def test_D4_many_waiters_each_see_their_own_rows(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=7)
    table = await lake.create()
    accepted = [await lake.accept(entry_of(table, [n])) for n in range(60)]

    async def see(reader: Reader, n: int) -> None:
        read = await reader.read(tokens=[accepted[n].receipt.visibility_token])
        assert ("t", (accepted[n].shard, accepted[n].position)) in read.rows

    async with reading(lake) as one, reading(lake, await lake.second()) as two:
        waits = [asyncio.create_task(see((one, two)[n % 2], n)) for n in range(60)]
        await lake.drain()
        await asyncio.wait_for(asyncio.gather(*waits), _HANG_S)


async def test_D4_the_wait_ends_in_quarantined_exactly_for_ones_own_entry(
    lake: LakeHarness, table: TableSchema
) -> None:
    bad, good = await lake.accept_many(table, 2)
    async with reading(lake) as reader:
        waits = [
            asyncio.create_task(reader.read(tokens=[accepted.receipt.visibility_token]))
            for accepted in (bad, good)
        ]
        await _soon(waits)
        worker = lake.worker()
        commit = await worker.stage(await worker.claim(), quarantine={bad.position})
        await worker.publish(commit)
        with pytest.raises(Quarantined) as refusal:
            await asyncio.wait_for(waits[0], _HANG_S)
        assert refusal.value.members["batch_id"] == bad.receipt.batch_id
        assert refusal.value.members["reason"] == "poison"
        read = await asyncio.wait_for(waits[1], _HANG_S)
        assert set(read.rows) == {("t", (good.shard, good.position))}
        # Also when it is covered already, with a fixed snapshot, and merged with other tokens.
        tokens = [good.receipt.visibility_token, bad.receipt.visibility_token]
        for choice in (SnapshotChoice(), SnapshotChoice(snapshot_id=read.snapshot_id)):
            with pytest.raises(Quarantined):
                await reader.read(choice, tokens=tokens)
        # A later token of somebody else covers the same positions and owns nothing of it.
        assert (await reader.read(tokens=[read.token])).snapshot_id == read.snapshot_id


async def test_D4_a_replayed_entry_is_not_quarantined_any_more(
    lake: LakeHarness, table: TableSchema
) -> None:
    bad = await lake.accept(entry_of(table, [1]))
    worker = lake.worker()
    await worker.publish(await worker.stage(await worker.claim(), quarantine={bad.position}))
    async with reading(lake) as reader:
        with pytest.raises(Quarantined):
            await reader.read(tokens=[bad.receipt.visibility_token])
        successor = await lake.accept(entry_of(table, [2]))
        (item,) = await lake.bus.quarantine_items()
        await lake.bus.mark_replayed(item.quarantine_id, successor.receipt.batch_id)
        await reader.read(tokens=[bad.receipt.visibility_token])


async def test_D4_the_wait_ends_at_the_deadline(lake: LakeHarness, table: TableSchema) -> None:
    accepted = await lake.accept(entry_of(table))
    async with reading(lake) as reader:
        began = time.monotonic()
        with pytest.raises(VisibilityTimeout) as refusal:
            await asyncio.wait_for(
                reader.read(tokens=[accepted.receipt.visibility_token], within_s=0.1), _HANG_S
            )
        assert time.monotonic() - began >= 0.1
        assert refusal.value.members["waited_ms"] >= 90
        assert refusal.value.retryable
        assert reader.watcher.waiting == 0


# --- D5 -------------------------------------------------------------------------------------------


async def test_D5_a_damaged_or_forged_token_is_refused(
    lake: LakeHarness, table: TableSchema
) -> None:
    token = (await lake.accept(entry_of(table))).receipt.visibility_token
    raw = bytearray(base64.urlsafe_b64decode(token[4:] + "=" * (-len(token[4:]) % 4)))
    raw[20] ^= 1
    forged = "lb1." + base64.urlsafe_b64encode(bytes(raw)).decode().rstrip("=")
    async with reading(lake) as reader:
        for bad in ("", "x", token[:-1], token + "A", forged, token.replace("lb1", "lb2"), "lb1."):
            with pytest.raises(MalformedToken):
                await reader.read(tokens=[bad])


async def test_D5_a_token_ahead_of_its_shard_is_refused_by_the_authoritative_end(
    lake: LakeHarness, table: TableSchema
) -> None:
    history = (await lake.catalog.identity()).history
    other = await lake.second()
    async with reading(lake) as reader:
        shard, end = 0, (await lake.bus.ends())[0]
        ahead = VisibilityToken(history, positions={shard: end + 1})
        with pytest.raises(TokenUnknown):
            await reader.read(tokens=[ahead])
        with pytest.raises(TokenUnknown):
            await reader.read(tokens=[VisibilityToken(history, positions={60_000: 1})])
        newest = (await lake.catalog.head()).snapshot_id
        with pytest.raises(TokenUnknown):
            await reader.read(tokens=[VisibilityToken(history, floor=newest + 1)])
        # Appended elsewhere a moment ago: never judged by an end known from before.
        for n in range(200):
            outcome = await other.bus.append(entry_of(table, [n], ordering_key=str(n)))
            if getattr(outcome, "shard", None) == shard:
                break
        with pytest.raises(VisibilityTimeout):
            await reader.read(tokens=[ahead], within_s=0.05)
        await lake.drain()
        await reader.read(tokens=[ahead])


async def test_D5_tokens_of_an_ancestor_history_are_honoured_up_to_the_fork(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.RESTORE)
    kept = await lake.accept(entry_of(table, [1], ordering_key="one"))
    await lake.drain()
    async with reading(lake) as reader:
        floor = (await reader.read()).token
    backup = await lake.take_backup()
    lost = await lake.accept(entry_of(table, [2], ordering_key="one"))
    await lake.drain()
    async with reading(lake) as reader:
        lost_read = await reader.read()
    await lake.restore(backup)
    async with reading(lake) as reader:
        read = await reader.read(tokens=[kept.receipt.visibility_token, floor])
        assert set(read.rows) == {("t", (kept.shard, kept.position))}
        assert read.token.history == (await lake.catalog.identity()).history
        with pytest.raises(TokenHistoryLost):
            await reader.read(tokens=[lost.receipt.visibility_token])
        with pytest.raises(TokenHistoryLost):
            await reader.read(tokens=[lost_read.token])
        with pytest.raises(HistoryLost):
            await reader.read(SnapshotChoice(snapshot_id=lost_read.snapshot_id))


# --- D6 -------------------------------------------------------------------------------------------


async def test_D6_reads_chain_monotonically_across_replicas(
    lake: LakeHarness, table: TableSchema
) -> None:
    async with reading(lake) as one, reading(lake, await lake.second()) as two:
        token = (await one.read()).token
        for n in range(6):
            await lake.accept(entry_of(table, [n]))
            await lake.drain()
            read = await (one, two)[n % 2].read(tokens=[token], staleness_s=3_600)
            assert read.snapshot_id >= token.floor
            assert read.token.floor == read.snapshot_id
            token = (await (two, one)[n % 2].read(tokens=[read.token])).token


async def test_D6_a_schema_change_is_seen_by_the_floor_of_its_snapshot(lake: LakeHarness) -> None:
    history = (await lake.catalog.identity()).history
    async with reading(lake) as reader:
        await reader.read()
        change = await lake.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
        token = VisibilityToken(history, change.snapshot_id)
        read = await reader.read(tokens=[token], staleness_s=3_600)
        assert read.view.schema("t") == change.schema


async def test_D6_several_tokens_are_one_merged_demand(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = [await lake.accept(entry_of(table, [n], ordering_key=str(n))) for n in range(12)]
    texts = [a.receipt.visibility_token for a in accepted]
    async with reading(lake) as reader:
        waiting = asyncio.create_task(reader.read(tokens=texts))
        await lake.drain()
        read = await asyncio.wait_for(waiting, _HANG_S)
        assert len(read.rows) == 12
        merged = merge_all(reader.codec.decode(text) for text in texts)
        assert merged is not None
        again = await reader.read(tokens=[reader.codec.encode(merged)])
        assert again.rows == read.rows


# --- D7 -------------------------------------------------------------------------------------------


async def test_D7_a_fixed_snapshot_that_does_not_cover_is_a_conflict_at_once(
    lake: LakeHarness, table: TableSchema
) -> None:
    old = await lake.catalog.snapshot((await lake.catalog.head()).snapshot_id)
    accepted = await lake.accept(entry_of(table))
    token = accepted.receipt.visibility_token
    choices = (SnapshotChoice(snapshot_id=old.snapshot_id), SnapshotChoice(time=old.published_at))
    async with reading(lake) as reader:

        async def refused_at_once() -> None:
            for choice in choices:
                began = time.monotonic()
                with pytest.raises(TokenNotCovered):
                    await reader.read(choice, tokens=[token], within_s=60)
                assert time.monotonic() - began < _HANG_S

        await refused_at_once()  # not published yet
        await lake.drain()
        await refused_at_once()  # published, and the choice is still older
        newest = (await lake.catalog.head()).snapshot_id
        read = await reader.read(SnapshotChoice(snapshot_id=newest), tokens=[token])
        assert len(read.rows) == 1


# --- D8 -------------------------------------------------------------------------------------------


async def test_D8_a_retained_snapshot_is_the_same_for_ever_by_id_and_by_time(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1)
    tables = [await lake.create("a"), await lake.create("b")]
    seen: dict[int, Read] = {}
    async with reading(lake) as reader:
        for n in range(50):
            await lake.accept(entry_of(tables[: 1 + n % 2], [n]))
            await lake.worker().publish_one()
            read = await reader.read()
            seen[read.snapshot_id] = read
        assert len(seen) == 50
        async with reading(lake, await lake.second()) as late:
            for snapshot_id, read in seen.items():
                by_id = SnapshotChoice(snapshot_id=snapshot_id)
                by_time = SnapshotChoice(time=read.resolved.published_at)
                for again in (reader, late):
                    for choice in (by_id, by_time):
                        found = await again.read(choice)
                        assert (found.snapshot_id, found.rows) == (snapshot_id, read.rows)
