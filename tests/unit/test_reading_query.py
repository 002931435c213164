"""The query service: one budget, one snapshot, and what the caller may not see (D1, D9, D10)."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lakebus.errors import (
    MalformedRequest,
    QueryTimeout,
    SnapshotNotFound,
    SqlError,
    TableNotFound,
    Unavailable,
    VisibilityTimeout,
)
from storage.engine.plans import ParsedStatement
from storage.files.objects import LocalObjectStore
from storage.reading.query import QueryLimits, QueryRequest
from storage.reading.resolve import LATEST, SnapshotChoice, parse_choice
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.conformance.memory import MemoryHarness
from tests.conformance.sql import FileWriter, Replica, everything
from tests.unit.reading_rig import FakeEngine


@pytest.fixture
def lake() -> MemoryHarness:
    return MemoryHarness(SUITE_SETTINGS, live=True)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def writer(lake: MemoryHarness, tmp_path: Path) -> FileWriter:
    return FileWriter(lake, tmp_path)


@pytest.fixture
async def replica(
    lake: MemoryHarness, engine: FakeEngine, writer: FileWriter
) -> AsyncIterator[Replica]:
    async with Replica(lake, codec=lake.lake.codec, engine=engine, store=writer.store) as made:
        yield made


async def test_an_answer_says_what_it_read(
    lake: MemoryHarness, writer: FileWriter, replica: Replica, engine: FakeEngine
) -> None:
    table = await lake.create()
    await lake.accept(entry_of(table, [1, 2]))
    published = await writer.publish_one()
    answer = await replica.service.query(QueryRequest("t", max_rows=7), everything)
    text = (await answer.read_all()).decode()
    assert text.count(".parquet'") == 1
    assert answer.row_count == 1
    assert answer.snapshot_id == published.snapshot_id
    assert answer.snapshot_time == published.published_at
    token = lake.lake.codec.decode(answer.visibility_token)
    assert (token.floor, dict(token.positions), token.own) == (answer.snapshot_id, {}, frozenset())
    statistics = answer.statistics()
    assert (statistics["files_scanned"], statistics["files_pruned"]) == (1, 0)
    assert statistics["snapshots"] == [published.snapshot_id]
    assert isinstance(statistics["bytes_scanned"], int)
    assert statistics["bytes_scanned"] > 0
    (plan,) = engine.plans
    assert (plan.rows_max, plan.query_id) == (7, answer.query_id)
    assert 29 < plan.deadline_s <= 30
    assert plan.sources["t"].columns == (("id", 1, "bigint"), ("note", 2, "varchar"))


async def test_the_plan_is_kept_while_the_tables_read_do_not_change(
    lake: MemoryHarness, writer: FileWriter, replica: Replica, engine: FakeEngine
) -> None:
    one, two = await lake.create("one"), await lake.create("two")
    await lake.accept(entry_of(one, [1]))
    await writer.publish_one()
    await replica.service.query(QueryRequest("one"), everything)
    await lake.accept(entry_of(two, [1]))
    await writer.publish_one()
    await replica.service.query(QueryRequest("one"), everything)
    await lake.accept(entry_of(one, [2]))
    await writer.publish_one()
    await replica.service.query(QueryRequest("one"), everything)
    first, second, third = (plan.sources for plan in engine.plans)
    assert first is second
    assert third is not first
    assert third["one"].relation_sql.count(".parquet'") == 2


async def test_D8_a_deterministic_query_reads_in_source_order(
    lake: MemoryHarness, replica: Replica, writer: FileWriter, engine: FakeEngine
) -> None:
    await lake.accept(entry_of(await lake.create(), [1]))
    await writer.publish_one()
    await replica.service.query(QueryRequest("t"), everything)
    await replica.service.query(QueryRequest("t", deterministic=True), everything)
    plain, ordered = engine.plans
    assert "ORDER BY" not in plain.sources["t"].relation_sql
    assert 'ORDER BY "$shard", "$position", "$row"' in ordered.sources["t"].relation_sql
    assert (plain.deterministic, ordered.deterministic) == (False, True)


async def test_D10_an_invisible_table_is_answered_like_one_that_is_not_there(
    lake: MemoryHarness, replica: Replica
) -> None:
    for name in ("flights", "flight_secrets", "other"):
        await lake.create(name)

    def mine(name: str) -> bool:
        return name in ("flights", "other")

    answers = []
    for name in ("flight_secrets", "flight_secretz"):
        with pytest.raises(TableNotFound) as refusal:
            await replica.service.query(QueryRequest(name), mine)
        answers.append((str(refusal.value).replace(name, "…"), refusal.value.members))
    assert answers[0] == answers[1]
    assert answers[0][1]["did_you_mean"] == ["flights"]
    with pytest.raises(TableNotFound) as refusal:
        await replica.service.query(QueryRequest("flight_secretz"), everything)
    assert refusal.value.members["did_you_mean"][0] == "flight_secrets"
    # Asked before a kept plan is used.
    await replica.service.query(QueryRequest("flight_secrets"), everything)
    with pytest.raises(TableNotFound):
        await replica.service.query(QueryRequest("flight_secrets"), mine)
    _, view = await replica.service.view()
    assert [t.schema.name for t in replica.service.describe_all(view, mine)] == ["flights", "other"]
    with pytest.raises(TableNotFound):
        replica.service.describe(view, "flight_secrets", mine)


async def test_D10_suggestions_come_from_the_snapshot_that_is_read(
    lake: MemoryHarness, replica: Replica
) -> None:
    before = (await lake.catalog.head()).snapshot_id
    await lake.create("flights")
    with pytest.raises(TableNotFound) as refusal:
        await replica.service.query(
            QueryRequest("flight", snapshot=SnapshotChoice(snapshot_id=before)), everything
        )
    assert refusal.value.members["did_you_mean"] == []


async def test_a_table_is_described_at_a_snapshot(
    lake: MemoryHarness, replica: Replica, writer: FileWriter
) -> None:
    table = await lake.create()
    created = (await lake.catalog.head()).snapshot_id
    await lake.accept(entry_of(table, [1, 2, 3]))
    published = await writer.publish_one()
    await lake.create("later")
    _, view = await replica.service.view()
    described = replica.service.describe(view, "t", everything)
    assert (described.rows, described.files) == (3, 1)
    assert described.last_snapshot == published.snapshot_id
    _, old = await replica.service.view(SnapshotChoice(snapshot_id=created))
    described = replica.service.describe(old, "t", everything)
    assert (described.rows, described.files, described.size_bytes) == (0, 0, 0)
    assert described.last_snapshot == created


# --- D9: one budget -------------------------------------------------------------------------------


async def test_D9_the_budget_names_the_phase_wait(lake: MemoryHarness, replica: Replica) -> None:
    await lake.create()
    real = lake.catalog.head

    async def silent() -> object:
        await asyncio.Event().wait()
        return None

    lake.catalog.head = silent  # type: ignore[method-assign,assignment]
    with pytest.raises(QueryTimeout) as refusal:
        await replica.service.query(QueryRequest("t", timeout_ms=30), everything)
    assert refusal.value.members["phase"] == "wait"
    assert refusal.value.members["waited_ms"] >= 25
    lake.catalog.head = real  # type: ignore[method-assign]


async def test_D9_the_budget_names_the_phase_plan(
    lake: MemoryHarness, replica: Replica, engine: FakeEngine
) -> None:
    await lake.create()
    engine.gate.clear()
    with pytest.raises(QueryTimeout) as refusal:
        await replica.service.query(QueryRequest("t", timeout_ms=30), everything)
    assert refusal.value.members["phase"] == "plan"


async def test_D9_the_budget_counts_from_the_arrival(
    lake: MemoryHarness, replica: Replica, engine: FakeEngine
) -> None:
    await lake.create()
    arrived_s = time.monotonic() - 1.0
    await replica.service.query(
        QueryRequest("t", timeout_ms=10_000, arrived_s=arrived_s), everything
    )
    assert 8.0 < engine.plans[0].deadline_s <= 9.0
    with pytest.raises(QueryTimeout):
        await replica.service.query(
            QueryRequest("t", timeout_ms=900, arrived_s=arrived_s), everything
        )


async def test_D4_a_token_that_is_not_covered_in_time_is_a_visibility_timeout(
    lake: MemoryHarness, replica: Replica
) -> None:
    accepted = await lake.accept(entry_of(await lake.create()))
    request = QueryRequest(
        "t", min_visibility_tokens=[accepted.receipt.visibility_token], timeout_ms=40
    )
    with pytest.raises(VisibilityTimeout):
        await replica.service.query(request, everything)


async def test_a_wrong_statement_does_not_wait_for_its_token(
    lake: MemoryHarness, replica: Replica, engine: FakeEngine
) -> None:
    accepted = await lake.accept(entry_of(await lake.create()))

    async def refuse(sql: str) -> ParsedStatement:
        raise SqlError(f"no: {sql}", position=0)

    engine.parse = refuse  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(SqlError):
        await replica.service.query(
            QueryRequest(
                "t", min_visibility_tokens=[accepted.receipt.visibility_token], timeout_ms=60_000
            ),
            everything,
        )
    assert time.monotonic() - began < 10
    assert replica.watcher.waiting == 0


async def test_a_query_that_is_cancelled_leaves_nobody_waiting(
    lake: MemoryHarness, replica: Replica
) -> None:
    accepted = await lake.accept(entry_of(await lake.create()))
    query = asyncio.create_task(
        replica.service.query(
            QueryRequest("t", min_visibility_tokens=[accepted.receipt.visibility_token]),
            everything,
        )
    )
    while not replica.watcher.waiting:
        await asyncio.sleep(0)
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query
    assert replica.watcher.waiting == 0


async def test_D2_a_replica_that_cannot_ask_the_catalog_is_unavailable(
    lake: MemoryHarness, replica: Replica
) -> None:
    await lake.create()
    await replica.service.query(QueryRequest("t"), everything)
    lake.lake.faults.unreachable = True
    with pytest.raises(Unavailable):
        await replica.service.query(QueryRequest("t"), everything)
    relaxed = QueryRequest("t", max_staleness_ms=60_000)
    answer = await replica.service.query(relaxed, everything)
    assert answer.snapshot_id == replica.manifest.until


async def test_limits_of_the_service_bound_those_of_the_request(
    lake: MemoryHarness, engine: FakeEngine, tmp_path: Path
) -> None:
    await lake.create()
    limits = QueryLimits(rows_max=5, bytes_max=100, timeout_ms=1_000)
    store = LocalObjectStore(tmp_path)
    async with Replica(
        lake, codec=lake.lake.codec, engine=engine, store=store, limits=limits
    ) as replica:
        await replica.service.query(QueryRequest("t", max_rows=50), everything)
        for bad in (
            QueryRequest("t", timeout_ms=0),
            QueryRequest("t", timeout_ms=100_001),
            QueryRequest("t", max_rows=0),
            QueryRequest("t", max_staleness_ms=-1),
        ):
            with pytest.raises(MalformedRequest):
                await replica.service.query(bad, everything)
    (plan,) = engine.plans
    assert (plan.rows_max, plan.bytes_max) == (5, 100)
    assert plan.deadline_s <= 1


async def test_D8_now_is_the_database_clock_also_with_a_relaxed_head(
    lake: MemoryHarness, replica: Replica, engine: FakeEngine
) -> None:
    await lake.create()
    await replica.service.query(QueryRequest("t"), everything)
    await asyncio.sleep(0.02)
    await replica.service.query(QueryRequest("t", max_staleness_ms=60_000), everything)
    first, second = engine.plans
    assert second.started_at - first.started_at >= dt.timedelta(milliseconds=15)


# --- the choice of a snapshot ---------------------------------------------------------------------


def test_the_choice_of_a_snapshot_is_read() -> None:
    at = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)
    assert parse_choice("latest") == LATEST
    assert parse_choice(None) == LATEST
    assert parse_choice({"id": 12}) == SnapshotChoice(snapshot_id=12)
    assert parse_choice({"timestamp": "2026-01-31T13:00:00+01:00"}) == SnapshotChoice(time=at)


@pytest.mark.parametrize(
    "value",
    [
        "newest", 12, {}, {"id": 1, "timestamp": "2026-01-31T12:00:00Z"}, {"id": "1"}, {"id": True},
        {"id": 1.0}, {"timestamp": 5}, {"timestamp": "yesterday"}, {"timestamp": "2026-01-31"},
        {"timestamp": "2026-01-31T12:00:00"}, {"timestamp": "2026-01-31T12:00:00.1234567Z"},
        {"version": 1}, ["latest"],
    ],
)  # fmt: skip
def test_a_wrong_choice_is_refused(value: object) -> None:
    with pytest.raises(MalformedRequest):
        parse_choice(value)


@pytest.mark.parametrize("value", [-1, 2**63, 10**40])
def test_an_impossible_id_is_not_found(value: int) -> None:
    with pytest.raises(SnapshotNotFound):
        parse_choice({"id": value})
