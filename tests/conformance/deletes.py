"""Deletes (E7), what they leave to compaction (E2), and the change feed across them (D12)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lakebus.errors import (
    Fault,
    Forbidden,
    IdempotencyConflict,
    JobNotFound,
    LeaseLost,
    OutcomeUnknown,
    SchemaVersionMismatch,
    SnapshotExpired,
    SqlError,
    StatementNotAllowed,
    TableNotFound,
    VisibilityTimeout,
)
from lakebus.schemas import Column
from storage.ingesting.grants import Grant, Principal
from storage.maintenance import deletion
from storage.maintenance.jobs import JobState
from storage.maintenance.matching import join_places
from storage.maintenance.priority import tables_taken
from storage.reading.changes import ChangesRequest, Window
from storage.reading.resolve import SnapshotChoice
from tests.conformance.delete_rig import SOMEONE, DeleteRig, delete_rig, random_predicate
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Capability, entry_of
from tests.failpoints.actions import Pause, Raise, Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints


@pytest.fixture
async def rig(open_lake: OpenLake, tmp_path: Path) -> AsyncIterator[DeleteRig]:
    async with delete_rig(await open_lake(claim_entries_max=1), tmp_path) as made:
        await made.lake.create()
        yield made


async def test_E7_a_delete_takes_exactly_what_matched_at_one_snapshot(rig: DeleteRig) -> None:
    rig.own_cages = True
    await rig.publish(1, 2, 3, note="a")
    await rig.publish(4, 5)  # no note: null keeps the row
    await rig.publish(6, 7, note="b")
    before = await rig.publish(100, 101, note="c")
    found = await rig.delete("note = 'b' OR id = 2 OR (note = 'x' AND id = 4)")
    assert found.done
    assert (found.deleted_rows, found.evaluated_at_snapshot_id) == (3, before)
    assert found.snapshot_id == before + 1
    assert await rig.ids() == [1, 3, 4, 5, 100, 101]
    assert await rig.ids(found.snapshot_id) == [1, 3, 4, 5, 100, 101]
    assert await rig.ids(before) == [1, 2, 3, 4, 5, 6, 7, 100, 101]
    snapshot = await rig.lake.catalog.snapshot(found.snapshot_id)
    assert snapshot.operation == "delete"
    rows = await rig.stack.rows("SELECT count(*) FROM t", min_visibility_tokens=[_token(found)])
    assert rows == [[6]]
    # A file whose every row went has no successor; one without a match is as it was.
    (job,) = await rig.jobs()
    assert (job.report["files_removed"], job.report["files_added"]) == (2, 1)
    assert not await rig.lake.upkeep.pins()


def _token(answer: Any) -> str:
    assert answer.visibility_token is not None
    return str(answer.visibility_token)


async def test_E7_no_match_makes_no_snapshot(rig: DeleteRig) -> None:
    head = await rig.publish(1, 2)
    for where in ("id = 3", "note = 'x'", "false", "id > 3 AND note IS NULL"):
        found = await rig.delete(where)
        assert (found.deleted_rows, found.snapshot_id) == (0, head)
        assert found.evaluated_at_snapshot_id == head
        assert _token(found)
    counted = await rig.delete("id = 1", dry_run=True)
    assert (counted.deleted_rows, counted.dry_run) == (1, True)
    assert await rig.head() == head
    assert await rig.ids() == [1, 2]


async def test_E7_the_same_key_is_the_same_delete(rig: DeleteRig) -> None:
    await rig.publish(1, 2, 3)
    first = await rig.delete("id = ?", parameters=[1], idempotency_key="k")
    await rig.publish(1)
    again = await rig.delete("id = ?", parameters=[1], idempotency_key="k")
    assert again == dataclasses.replace(first, replayed=True)
    assert await rig.ids() == [1, 2, 3]
    for changed in (
        {"parameters": [2]},
        {"min_visibility_tokens": [_token(first)]},
        {"dry_run": True},
    ):
        more: dict[str, Any] = {"parameters": [1], **changed}
        with pytest.raises(IdempotencyConflict):
            await rig.delete("id = ?", idempotency_key="k", **more)
    other = dataclasses.replace(SOMEONE, principal_id=2, name="other")
    assert (await rig.delete("id = 1", idempotency_key="k", principal=other)).deleted_rows == 1
    # The key is looked up before anything is judged (A3).
    await rig.lake.catalog.finish_drop(await rig.lake.catalog.begin_drop(name="t"))
    gone = await rig.delete("id = ?", parameters=[1], idempotency_key="k")
    assert gone == again
    with pytest.raises(TableNotFound):
        await rig.delete("id = 1")


async def test_E7_a_delete_sees_the_rows_of_its_token_and_leaves_later_ones(
    rig: DeleteRig,
) -> None:
    await rig.publish(1)
    table = await rig.lake.catalog.table("t")
    assert table is not None
    accepted = await rig.lake.accept(entry_of(table.schema, [1, 2]))
    token = accepted.receipt.visibility_token
    with pytest.raises(VisibilityTimeout):
        await rig.service.delete(
            rig.request("id = 1", wait_s=0.05, min_visibility_tokens=[token]), rig.checker
        )
    assert not await rig.jobs()  # nothing was stored
    asking = asyncio.ensure_future(
        rig.service.delete(rig.request("id = 1", min_visibility_tokens=[token]), rig.checker)
    )
    await rig.stack.writer.publish_one()
    while not await rig.jobs():
        await asyncio.sleep(0.005)
    later = await rig.lake.accept(entry_of(table.schema, [1]))
    assert later.receipt
    await rig.work()
    found = await asking
    assert found.deleted_rows == 2
    await rig.stack.writer.publish_one()
    assert await rig.ids() == [1, 2]


async def test_E7_rows_published_while_it_runs_stay(rig: DeleteRig, failpoints: Failpoints) -> None:
    at = await rig.publish(1, 2)

    async def publish() -> None:
        await rig.publish(1)

    failpoints.arm("deletion.after_evaluate", Run(publish))
    found = await rig.delete("id = 1")
    assert (found.deleted_rows, found.evaluated_at_snapshot_id) == (1, at)
    assert found.snapshot_id == at + 2
    assert await rig.ids() == [1, 2]


async def test_E7_a_publication_beside_the_list_of_files_is_in_the_snapshot_or_not(
    rig: DeleteRig, failpoints: Failpoints
) -> None:
    await rig.publish(1, 2)

    async def publish() -> None:
        await rig.publish(1)
        await rig.compact()

    failpoints.arm("deletion.after_pin", Run(publish))
    failpoints.arm("deletion.after_list", Run(lambda: rig.publish(1)))
    found = await rig.delete("id = 1")
    assert found.evaluated_at_snapshot_id is not None
    before = await rig.ids(found.evaluated_at_snapshot_id)
    assert found.deleted_rows == before.count(1) == 3
    assert await rig.ids() == [2]


#: All that a delete comes by which loses to nobody.
_STEPS = [*markers_of("deletion"), *markers_of("swapping")]
_STEPS.remove("deletion.after_loss")


@pytest.mark.parametrize("point", _STEPS)
async def test_E7_a_delete_that_dies_is_done_once(rig: DeleteRig, point: str) -> None:
    await rig.publish(1, 2, 3)
    head = await rig.publish(1, 5)
    asked = await rig.ask("id = 1", idempotency_key="k")
    with Failpoints() as failpoints:
        failpoints.arm(point, Raise(KeyboardInterrupt()))
        with contextlib.suppress(KeyboardInterrupt):
            await rig.work()
    await rig.publish(1, 9)  # accepted between death and the second try
    while (await rig.answer_of(asked.job_id)).state is not JobState.DONE:
        await rig.work()
    found = await rig.answer_of(asked.job_id)
    assert found.snapshot_id is not None
    assert found.evaluated_at_snapshot_id is not None
    assert found.deleted_rows == (await rig.ids(found.evaluated_at_snapshot_id)).count(1)
    after = Counter(await rig.ids(found.snapshot_id))
    assert after[2] == after[3] == after[5] == 1
    if found.snapshot_id == head + 1:  # published before it died: what came later is untouched
        assert found.deleted_rows == 2
        assert await rig.ids() == [1, 2, 3, 5, 9]
    else:
        assert found.deleted_rows == 3
        assert await rig.ids() == [2, 3, 5, 9]
    kinds = [s.operation for s in await rig.lake.catalog.snapshots(limit=20)]
    assert kinds.count("delete") == 1


class _Unheard:
    """An Upkeep whose swaps take effect and whose replies are lost, `times` times."""

    def __init__(self, upkeep: Any, times: int) -> None:
        self._upkeep, self.left = upkeep, times

    async def publish_swap(self, swap: Any) -> Any:
        done = await self._upkeep.publish_swap(swap)
        if self.left:
            self.left -= 1
            raise OutcomeUnknown("the reply was lost")
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._upkeep, name)


async def test_E7_a_lost_reply_is_read_back(rig: DeleteRig) -> None:
    await rig.publish(1, 2)
    rig.upkeep = unheard = _Unheard(rig.lake.upkeep, 1)
    found = await rig.delete("id = 1")
    assert unheard.left == 0
    assert found.deleted_rows == 1
    assert await rig.ids() == [2]
    kinds = [s.operation for s in await rig.lake.catalog.snapshots(limit=20)]
    assert kinds.count("delete") == 1


async def test_E7_two_workers_of_one_delete_publish_once(
    rig: DeleteRig, failpoints: Failpoints
) -> None:
    await rig.publish(1, 2)
    await rig.ask("id = 1")
    first = await rig.claim(ttl_s=0.05)
    assert first is not None
    armed = failpoints.arm("swapping.before_publish", Pause())
    slow = asyncio.ensure_future(rig.work(first))
    await failpoints.reached("swapping.before_publish", 1)
    await rig.lake.advance_s(0.06)
    second = await rig.claim()
    assert second is not None
    report = await rig.work(second)
    armed.resume()
    with pytest.raises(LeaseLost):
        await slow
    assert report is not None
    assert report["deleted_rows"] == 1
    (job,) = await rig.jobs()
    assert (job.state, job.report["snapshot_id"]) == (JobState.DONE, report["snapshot_id"])
    kinds = [s.operation for s in await rig.lake.catalog.snapshots(limit=20)]
    assert kinds.count("delete") == 1


async def test_E2_a_delete_that_loses_to_compaction_starts_again(
    rig: DeleteRig, failpoints: Failpoints
) -> None:
    await rig.publish(1, 2, note="a")
    await rig.publish(1, 3, note="a")
    skipped: list[Any] = []

    async def merge() -> None:
        await rig.publish(1, 4, note="a")
        report = await rig.compact()
        skipped.extend(report["skipped"])

    async def look() -> None:
        assert not (await rig.jobs())[0].ended

    armed = failpoints.arm("deletion.before_swap", Run(merge), times=None)
    failpoints.arm("deletion.after_loss", Run(look), times=None)
    found = await rig.delete("id = 1")
    (job,) = await rig.jobs()
    assert job.report["swaps_lost"] == deletion.LOST_BEFORE_PRIORITY
    assert [one["table"] for one in skipped] == ["t"]
    assert armed.fired == deletion.LOST_BEFORE_PRIORITY + 1
    assert found.evaluated_at_snapshot_id is not None
    assert found.deleted_rows == (await rig.ids(found.evaluated_at_snapshot_id)).count(1)
    assert await rig.ids() == [1, 2, 3, 4, 4, 4, 4]  # the last 1 came after it was evaluated
    assert await tables_taken(rig.lake.upkeep) == frozenset()


async def test_E7_a_rewrite_that_takes_other_rows_is_never_published(rig: DeleteRig) -> None:
    before = await rig.publish(1, 2, 3)
    lossy = mock.patch.object(deletion, "join_places", lambda _, path: join_places((), path))
    with lossy, pytest.raises(Fault, match="left out 0 rows and not 2"):
        await rig.delete("id < 3")
    assert await rig.head() == before


async def test_E7_now_is_the_time_at_which_the_delete_was_accepted(
    rig: DeleteRig, failpoints: Failpoints
) -> None:
    await rig.publish(1)
    where = "now() = $1::timestamptz OR now()::timestamp > timestamp '2999-01-01'"
    asked = await rig.ask("epoch_us(now()) % 2 = 0")
    (job,) = await rig.jobs()
    at = str(job.parameters["now"])
    await rig.lake.advance_s(0.02)
    failpoints.arm("deletion.after_evaluate", Raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        await rig.work()
    await rig.work()
    answer = await rig.answer_of(asked.job_id)
    micros = int(at[-7:-1])
    assert answer.deleted_rows == (1 if micros % 2 == 0 else 0)
    assert (await rig.delete(where, parameters=["1999-01-01 00:00:00+00"])).deleted_rows == 0


async def test_E7_names_are_those_of_the_table_when_it_was_accepted(rig: DeleteRig) -> None:
    await rig.publish(1, 2, note="old")
    table = await rig.lake.catalog.table("t")
    assert table is not None
    renamed = dataclasses.replace(table.schema.columns[1], name="remark")
    columns = (table.schema.columns[0], renamed, Column(0, "note", "varchar"))
    asked = [await rig.ask("note = 'old'"), await rig.ask("t.id = 1")]
    changed = dataclasses.replace(table.schema, columns=columns)
    await rig.lake.catalog.alter_table(schema=changed, expected_version=1)
    await rig.work()
    await rig.work()
    mixed, plain = [await rig.answer_of(one.job_id) for one in asked]
    assert mixed.state is JobState.FAILED
    assert mixed.error is not None
    assert mixed.error["code"] == SchemaVersionMismatch.code
    assert plain.deleted_rows == 1
    # A renamed column is read under its new name in files that were written before.
    assert (await rig.delete("remark = 'old' AND note IS NULL")).deleted_rows == 1
    assert await rig.ids() == []


async def test_E7_a_predicate_that_fails_on_a_row_deletes_nothing(rig: DeleteRig) -> None:
    head = await rig.publish(1, 2, note="no number")
    with pytest.raises(SqlError) as caught:
        await rig.delete("CAST(note AS integer) = 1", idempotency_key="k")
    assert not caught.value.retryable
    with pytest.raises(SqlError):
        await rig.delete("CAST(note AS integer) = 1", idempotency_key="k")
    assert (await rig.head(), await rig.ids()) == (head, [1, 2])
    for where in ("id IN (SELECT 1)", "random() > 2", "id = 1) OR (true"):
        with pytest.raises((SqlError, StatementNotAllowed)):
            await rig.ask(where)
    assert len(await rig.jobs()) == 1  # a bad predicate makes no job


async def test_D10_deletes_of_others_do_not_exist(rig: DeleteRig) -> None:
    await rig.publish(1)
    mine = await rig.delete("id = 1")
    other = dataclasses.replace(SOMEONE, principal_id=2, name="other")
    for principal, table, job_id in (
        (other, "t", str(mine.job_id)),
        (SOMEONE, "u", str(mine.job_id)),
        (SOMEONE, "t", "nonsense"),
    ):
        with pytest.raises(JobNotFound):
            await rig.service.look(principal, table, job_id, deadline_s=0.0)
    reader = Principal(3, "reader", (Grant("query"),))
    partly = Principal(4, "partly", (Grant("query"), Grant("ingest", ("u",))))
    blind = Principal(5, "blind", (Grant("query", ("u",)), Grant("ingest", ("u",))))
    for principal in (reader, partly):
        with pytest.raises(Forbidden):
            await rig.delete("id = 1", principal=principal)
    with pytest.raises(TableNotFound) as hidden:
        await rig.delete("id = 1", principal=blind)
    with pytest.raises(TableNotFound) as absent:
        await rig.delete("id = 1", principal=blind, table="absent")
    assert str(hidden.value).replace("table t", "table absent") == str(absent.value)


async def _feed(rig: DeleteRig, after: int, until: int) -> list[tuple[int, ...]]:
    window, found = Window(after, until), []
    table = await rig.lake.catalog.table("t")
    assert table is not None
    while True:
        request = ChangesRequest("t", window, limit=3, integers="number")
        page = await rig.stack.replica.changes.page(request)
        found += [tuple(row[:5]) for row in json.loads(page.body)]
        if page.cursor is None:
            assert [row[1:4] for row in found] == sorted({row[1:4] for row in found})
            return found
        window = Window.decode(page.cursor, table.schema.table_id)


async def test_D12_a_window_keeps_the_rows_that_were_deleted_in_it(rig: DeleteRig) -> None:
    begin = await rig.head()
    made = [await rig.publish(n, n + 10, note="a") for n in range(4)]
    whole = await _feed(rig, begin, made[-1])
    assert len(whole) == 8
    ends = []
    for where in ("id = 1", "id IN (2, 12)", "id < 11"):
        await rig.compact()
        ends.append((await rig.delete(where)).snapshot_id)
        await rig.compact()
        ends.append(await rig.head())
    later = await rig.publish(50)
    for until in (*ends, later):
        assert until is not None
        found = await _feed(rig, begin, until)
        assert [row for row in found if row[0] <= made[-1]] == whole
        for cut in made:
            assert await _feed(rig, cut, until) == [row for row in found if row[0] > cut]
    assert await rig.ids() == [11, 13, 50]
    # A window that begins behind the publication of a row does not bring it back.
    assert [row[4] for row in await _feed(rig, made[-1], later)] == [50]


async def test_D12_a_feed_that_would_be_shorter_is_refused(rig: DeleteRig) -> None:
    rig.lake.needs(Capability.EXPIRE_SNAPSHOTS)
    begin = await rig.head()
    await rig.publish(1, 2)
    await rig.publish(3)
    await rig.compact()
    kept = await rig.publish(4)
    await rig.lake.expire_snapshots(before=kept)
    assert len(await _feed(rig, begin, kept)) == 4  # only moved: nothing is missing
    deleted = (await rig.delete("id = 1")).snapshot_id
    assert deleted is not None
    assert len(await _feed(rig, begin, deleted)) == 4
    last = await rig.publish(5)
    await rig.lake.expire_snapshots(before=deleted)
    with pytest.raises(SnapshotExpired) as caught:
        await _feed(rig, begin, last)
    assert caught.value.members["oldest_snapshot_id"] == deleted
    assert [row[4] for row in await _feed(rig, deleted, last)] == [5]
    # Another table's deletes do not matter.
    await rig.lake.create("u")
    request = ChangesRequest("u", Window(begin, await rig.head()))
    assert (await rig.stack.replica.changes.page(request)).row_count == 0


@pytest.mark.parametrize("seed", range(3))
async def test_E7_random_deletes_among_writes_and_compaction_agree_with_a_model(
    rig: DeleteRig, seed: int
) -> None:
    chance = random.Random(seed)
    rows: list[tuple[int, str | None]] = []
    states: dict[int, Counter[tuple[int, str | None]]] = {}
    published = 0
    begin = await rig.head()
    for step in range(24):
        kind = chance.choice("wwwdddc")
        if kind == "w":
            ids = [chance.randrange(40) for _ in range(chance.randint(1, 5))]
            note = chance.choice([None, "n0", "n1", "n2", "n3"])
            await rig.publish(*ids, note=note, ordering_key=str(step % 3))
            rows += [(n, note) for n in ids]
            published += len(ids)
        elif kind == "c":
            await rig.compact()
        else:
            where, matches = random_predicate(chance)
            found = await rig.delete(where)
            gone = [row for row in rows if matches(row)]
            assert found.deleted_rows == len(gone), (seed, step, where)
            rows = [row for row in rows if not matches(row)]
        states[await rig.head()] = Counter(rows)
    for snapshot_id, expected in states.items():
        found_rows = await rig.stack.rows(
            "SELECT id, note FROM t", snapshot=SnapshotChoice(snapshot_id=snapshot_id)
        )
        assert Counter(tuple(row) for row in found_rows) == expected, (seed, snapshot_id)
    assert len(await _feed(rig, begin, await rig.head())) == published


async def test_E7_deletes_beside_writers_and_compaction(rig: DeleteRig) -> None:
    for n in range(6):
        await rig.publish(n, n + 100, ordering_key=str(n % 3))
    written = [row for n in range(6) for row in (n, n + 100)]
    gone: list[int] = []

    async def write() -> None:
        for n in range(200, 212):
            await rig.publish(n, n + 100, ordering_key=str(n % 3))
            written.extend((n, n + 100))

    async def merge() -> None:
        for _ in range(4):
            await rig.compact()

    async def remove() -> None:
        for n in (1, 104, 3, 5, 100):
            found = await rig.delete("id = ?", parameters=[n])
            assert found.deleted_rows == 1
            assert found.snapshot_id is not None
            assert n not in await rig.ids(found.snapshot_id)
            assert n in await rig.ids(found.snapshot_id - 1)
            gone.append(n)

    await asyncio.gather(write(), merge(), remove())
    assert await rig.ids() == sorted(set(written) - set(gone))
