"""The table of errors, row by row over HTTP: status, code, members, and that nothing was left.

One case a code at least. The cases make the error where it is made (a store that is away, a line of
history that was lost, a time that ran out), never at the door.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from lakebus import errors
from lakebus.errors import LakebusError, all_errors
from serve_app.dependencies import HttpLimits
from serve_app.limits import LimitSettings
from serve_app.openapi_problems import members_of
from storage.ingesting.grants import Grant
from storage.memory_clock import ManualClock
from tests.unit.http_errors_rig import (
    PROBLEM,
    Bench,
    Case,
    Make,
    bench,
    described,
    nothing_left,
)
from tests.unit.http_rig import problem

_KIB = 1024
_TABLE = Path(__file__).parents[2] / "docs" / "errors.md"


CASES: list[Case] = []


def case(code: str, *members: str, **given: Any) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        CASES.append(Case(code, make, members, **given))
        return make

    return add


# --- 400 ------------------------------------------------------------------------------------------


@case("malformed_request", why="unknown parameter")
async def unknown_parameter(one: Bench) -> httpx.Response:
    return await one.send([{"id": 1}], query="?wiat=visible")


@case("malformed_request", why="no rows")
async def no_rows(one: Bench) -> httpx.Response:
    return await one.send([], idempotency_key="k")


@case("malformed_body")
async def cut_short(one: Bench) -> httpx.Response:
    return await one.send(b'[{"id": 1}', idempotency_key="k")


@case("malformed_token", why="query")
async def damaged_token(one: Bench) -> httpx.Response:
    return await one.query(min_visibility_token="lb1.damaged")


@case("malformed_token", why="forged")
async def forged_token(one: Bench) -> httpx.Response:
    token = one.token(1)
    return await one.ask("GET", f"/v1/visibility?token={token[:-2]}AA")


@case("malformed_idempotency_key")
async def two_words(one: Bench) -> httpx.Response:
    return await one.send([{"id": 1}], idempotency_key="two words")


@case("sql_error", "position")
async def wrong_statement(one: Bench) -> httpx.Response:
    one.engine.fail = errors.SqlError("no such function", position=7)
    return await one.query()


# --- 401, 403 -------------------------------------------------------------------------------------


@case("unauthenticated")
async def revoked_key(one: Bench) -> httpx.Response:
    key = await one.lake.new_key(Grant("ingest"), principal="p")
    await one.lake.keyring.revoke(key.split("_")[1])
    return await one.ask("POST", "/v1/tables/events/rows", api_key=key, json=[{"id": 1}])


@case("forbidden", "scope")
async def missing_scope(one: Bench) -> httpx.Response:
    key = await one.lake.new_key(Grant("query"), principal="p")
    return await one.ask("POST", "/v1/tables/events/rows", api_key=key, json=[{"id": 1}])


@case("forbidden", "scope", why="create")
async def may_not_create(one: Bench) -> httpx.Response:
    key = await one.lake.new_key(Grant("ingest"), principal="p")
    return await one.ask("POST", "/v1/tables/new/rows?create=true", api_key=key, json=[{"id": 1}])


@case("statement_not_allowed", "kind")
async def forbidden_statement(one: Bench) -> httpx.Response:
    one.engine.fail = errors.StatementNotAllowed("COPY is not allowed", kind="COPY")
    return await one.query()


# --- 404, 405, 415 --------------------------------------------------------------------------------


@case("table_not_found", "did_you_mean")
async def rows_for_no_table(one: Bench) -> httpx.Response:
    return await one.ask("POST", "/v1/tables/event/rows", json=[{"id": 1}])


@case("table_not_found", "did_you_mean", why="query")
async def query_of_no_table(one: Bench) -> httpx.Response:
    answer = await one.query(sql="from event")
    assert one.pins.given == 1, "the snapshot was held before the table was missed"
    return answer


@case("snapshot_not_found")
async def no_snapshot(one: Bench) -> httpx.Response:
    return await one.query(snapshot={"id": 999_999})


@case("batch_not_found")
async def others_batch(one: Bench) -> httpx.Response:
    batch = (await one.lake.send([{"id": 1}])).json()["receipt"]["batch_id"]
    key = await one.lake.new_key(Grant("ingest"), principal="other")
    return await one.ask("GET", f"/v1/batches/{batch}", api_key=key)


@case("query_not_found")
async def no_query(one: Bench) -> httpx.Response:
    return await one.ask("DELETE", "/v1/queries/none")


@case("job_not_found")
async def no_job(one: Bench) -> httpx.Response:
    return await one.ask("GET", "/v1/admin/jobs/00000000-0000-4000-8000-000000000000")


@case("not_found")
async def no_route(one: Bench) -> httpx.Response:
    return await one.ask("POST", "/v1/nothing", json=[{"id": 1}])


@case("not_found", why="tag")
async def no_tag(one: Bench) -> httpx.Response:
    return await one.ask("DELETE", "/v1/admin/tags/none")


@case("method_not_allowed", "supported")
async def other_method(one: Bench) -> httpx.Response:
    answer = await one.ask("PUT", "/v1/tables/events/rows", json=[{"id": 1}])
    assert answer.headers["allow"] == "POST"
    return answer


@case("unsupported_media_type", "supported", why="body")
async def other_body(one: Bench) -> httpx.Response:
    return await one.send(b"<rows/>", content_type="application/xml")


@case("unsupported_media_type", "supported", why="answer")
async def other_answer(one: Bench) -> httpx.Response:
    return await one.ask("GET", "/v1/query?sql=from+events", headers={"accept": "text/html"})


# --- 409 ------------------------------------------------------------------------------------------


@case("table_exists")
async def same_table(one: Bench) -> httpx.Response:
    new = {"name": "EVENTS", "columns": [{"name": "id", "type": "bigint"}]}
    return await one.ask("POST", "/v1/tables", json=new)


@case("tag_exists", "snapshot_id")
async def same_tag(one: Bench) -> httpx.Response:
    headers = one.lake.headers()
    tag = {"name": "v1", "snapshot_id": 1}
    await one.lake.http.post("/v1/admin/tags", json=tag, headers=headers)
    return await one.ask("POST", "/v1/admin/tags", json=tag | {"snapshot_id": 2})


@case("token_not_covered", "snapshot_id")
async def older_snapshot(one: Bench) -> httpx.Response:
    return await one.query(min_visibility_token=one.token(2), snapshot={"id": 1})


@case("quarantined", "batch_id", "reason")
async def own_rows_set_aside(one: Bench) -> httpx.Response:
    receipt = (await one.lake.send([{"id": 1}])).json()["receipt"]
    await one.lake.publish(quarantine=True)
    answer = await one.query(min_visibility_token=receipt["visibility_token"])
    assert answer.json()["batch_id"] == receipt["batch_id"]
    return answer


@case("schema_version_mismatch")
async def changed_meanwhile(one: Bench) -> httpx.Response:
    change = {"drop_columns": ["note"]}
    headers = {"if-match": "7"}
    return await one.ask("PATCH", "/v1/tables/events", json=change, headers=headers)


# --- 410 ------------------------------------------------------------------------------------------


@case("snapshot_expired", "oldest_snapshot_id")
async def expired(one: Bench) -> httpx.Response:
    await one.lake.send([{"id": 1}])
    await one.lake.publish()
    one.lake.lake.expire_snapshots(before=3)
    return await one.query(snapshot={"id": 2})


async def restored(one: Bench) -> tuple[str, int]:
    """Rows that a restore has lost: their token, and the snapshot that showed them."""

    backup = one.lake.lake.backup()
    receipt = (await one.lake.send([{"id": 1}])).json()["receipt"]
    (published,) = await one.lake.publish()
    assert published.snapshot_id is not None
    one.lake.lake.restore(backup)
    await one.lake.get("/v1/tables")  # the first question on the new line brings it up to date
    return receipt["visibility_token"], published.snapshot_id


@case("token_history_lost")
async def lost_token(one: Bench) -> httpx.Response:
    token, _ = await restored(one)
    return await one.query(min_visibility_token=token)


@case("history_lost")
async def lost_snapshot(one: Bench) -> httpx.Response:
    _, snapshot_id = await restored(one)
    return await one.query(snapshot={"id": snapshot_id})


@case("idempotency_expired")
async def old_attempt(one: Bench) -> httpx.Response:
    old = (dt.datetime.now(dt.UTC) - dt.timedelta(days=2)).isoformat()
    return await one.send([{"id": 1}], idempotency_key="k", idempotency_not_before=old)


# --- 413, 422 -------------------------------------------------------------------------------------


@case("body_too_large", "limit_bytes", given={"limits": HttpLimits(body_bytes_max=_KIB)})
async def large_body(one: Bench) -> httpx.Response:
    return await one.send([{"id": 1, "note": "x" * _KIB}], idempotency_key="k")


@case("result_too_large", "limit_rows")
async def large_result(one: Bench) -> httpx.Response:
    one.engine.parts = [b"[[1],", errors.ResultTooLarge("more than 1 row", limit_rows=1)]
    answer = await one.query(max_rows=1)
    assert one.engine.results, "the statement ran"
    return answer


@case("rows_invalid", "errors", "error_count")
async def bad_rows(one: Bench) -> httpx.Response:
    answer = await one.send([{"id": 1}, {"id": "x"}], idempotency_key="k")
    (found,) = answer.json()["errors"]
    assert set(found) == {"row", "column", "reason", "value"}
    assert (found["row"], found["column"], answer.json()["error_count"]) == (1, "id", 1)
    return answer


@case("idempotency_conflict", "batch_id")
async def other_rows(one: Bench) -> httpx.Response:
    first = await one.lake.send([{"id": 1}], key="k")
    answer = await one.send([{"id": 2}], idempotency_key="k")
    assert answer.json()["batch_id"] == first.json()["receipt"]["batch_id"]
    return answer


@case("token_unknown")
async def token_from_elsewhere(one: Bench) -> httpx.Response:
    return await one.query(min_visibility_token=one.token(999))


@case("time_in_future")
async def tomorrow(one: Bench) -> httpx.Response:
    return await one.query(snapshot={"timestamp": "2999-01-01T00:00:00Z"})


@case("schema_invalid")
async def bad_definition(one: Bench) -> httpx.Response:
    new = {"name": "new", "columns": [{"name": "id", "type": "nonsense"}]}
    return await one.ask("POST", "/v1/tables", json=new)


@case("schema_invalid", why="made from rows")
async def nothing_to_make_it_of(one: Bench) -> httpx.Response:
    return await one.ask("POST", "/v1/tables/new/rows?create=true", json=[{"a": None}])


@case("schema_change_invalid")
async def bad_change(one: Bench) -> httpx.Response:
    change = {"widen_columns": {"id": "integer"}}
    return await one.ask("PATCH", "/v1/tables/events", json=change)


# --- 429, 499 -------------------------------------------------------------------------------------


@case("rate_limited", "limit", "limit_value", "retry_after_ms", retryable=True)
async def too_many_requests(one: Bench) -> httpx.Response:
    dependencies = one.lake.app.dependencies
    assert dependencies is not None
    key = await one.lake.new_key(Grant("ingest"), principal="busy")
    settings = LimitSettings(requests_per_s=1, burst_s=1.0)
    dependencies.admission._settings = settings
    dependencies.admission._clock = ManualClock()
    await one.lake.send([{"id": 1}], api_key=key)
    return await one.ask("POST", "/v1/tables/events/rows", api_key=key, json=[{"id": 2}])


@case(
    "backpressure",
    "limit",
    "limit_value",
    retryable=True,
    given={"limits": HttpLimits(inflight_bytes_max=_KIB)},
)
async def full_of_bodies(one: Bench) -> httpx.Response:
    one.lake.budget.add(999, _KIB)
    return await one.send([{"id": 1}], idempotency_key="k")


@case("cancelled")
async def cancelled(one: Bench) -> httpx.Response:
    one.engine.gate = asyncio.Event()
    asked = asyncio.create_task(one.query())
    await asyncio.wait_for(one.engine.executing.wait(), 30)
    (listed,) = (await one.lake.get("/v1/queries")).json()["queries"]
    path = f"/v1/queries/{listed['query_id']}"
    assert one.pins.held == 1
    assert (await one.lake.http.delete(path, headers=one.lake.headers())).status_code == 200
    return await asked


# --- 503, 504 -------------------------------------------------------------------------------------


@case("unavailable", retryable=True, why="rows")
async def bus_away(one: Bench) -> httpx.Response:
    one.lake.lake.faults.unreachable = True
    return await one.send([{"id": 1}], idempotency_key="k")


@case("unavailable", retryable=True, why="query")
async def catalog_away(one: Bench) -> httpx.Response:
    one.lake.lake.faults.unreachable = True
    return await one.query()


@case("unavailable", retryable=True, why="engine")
async def engine_away(one: Bench) -> httpx.Response:
    one.engine.parts = [b"[[1],", errors.Unavailable("the engine is being replaced")]
    return await one.query()


@case("outcome_unknown", retryable=True, stored=True)
async def reply_lost(one: Bench) -> httpx.Response:
    one.lake.lake.faults.lose_replies.add("append")
    answer = await one.send([{"id": 1}], idempotency_key="k")
    before = one.lake.entries
    assert (await one.lake.send([{"id": 1}], key="k")).json()["replayed"] is True
    assert one.lake.entries == before, "the retry found the entry and made no other"
    return answer


@case("history_rewound")
async def catalog_went_back(one: Bench) -> httpx.Response:
    async def refuse(*_: Any) -> NoReturn:
        raise errors.HistoryRewound("an operator must decide")

    one.lake.lake.reach = refuse  # type: ignore[method-assign]
    return await one.send([{"id": 1}], idempotency_key="k")


@case("visibility_timeout", "waited_ms", retryable=True)
async def never_visible(one: Bench) -> httpx.Response:
    receipt = (await one.lake.send([{"id": 1}])).json()["receipt"]
    return await one.query(min_visibility_token=receipt["visibility_token"], timeout_ms=20)


@case("query_timeout", "waited_ms", "phase", retryable=True, why="plan")
async def never_parsed(one: Bench) -> httpx.Response:
    one.engine.parsing.clear()
    return await one.query(timeout_ms=20)


@case("query_timeout", "waited_ms", "phase", retryable=True, why="execute")
async def never_ends(one: Bench) -> httpx.Response:
    late = errors.QueryTimeout("the time ran out", waited_ms=20.5, phase="execute")
    one.engine.parts = [b"[[1],", late]
    return await one.query()


# --- 500: what is not told ------------------------------------------------------------------------


def fault_inside(kind: type[Exception]) -> Make:
    async def make(one: Bench) -> httpx.Response:
        async def broken(*_: Any) -> NoReturn:
            raise kind("secret path /var/lib/lake")

        one.lake.bus.append = broken  # type: ignore[method-assign, assignment]
        answer = await one.send([{"id": 1}], idempotency_key="k")
        assert "secret" not in answer.text
        return answer

    return make


INSIDE = (errors.LeaseLost, errors.Corrupt, errors.StartRefused, errors.ConfigurationError)
CASES.append(Case("internal_error", fault_inside(RuntimeError)))
CASES += [Case("internal_error", fault_inside(kind), inside=kind.code) for kind in INSIDE]


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
async def test_every_error_is_whole_and_leaves_nothing(row: Case) -> None:
    async with bench(**row.given) as one:
        await one.lake.create()
        await one.lake.publish()
        answer = await row.make(one)
        document = problem(answer, row.status, row.code)
        assert set(PROBLEM) <= set(document)
        assert {*row.members} <= set(document)
        assert document["retryable"] is row.retryable
        assert ("retry-after" in answer.headers) == (row.status in (429, 503))
        described(one, answer)
        if not row.stored:
            nothing_left(one)


def test_every_code_has_a_case() -> None:
    made = {row.inside or row.code for row in CASES}
    assert {kind.code for kind in all_errors()} == made


def test_every_case_has_a_name_of_its_own() -> None:
    names = [row.name for row in CASES]
    assert len(set(names)) == len(names)


def test_the_page_names_the_members_that_are_described() -> None:
    """And the cases show no others; of those that are sometimes there, none needs to be."""

    for line in _TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[0].isdigit():
            continue
        code = cells[1].strip("`")
        told = re.sub(r"`\{.*?\}`", "", cells[4])
        named = set(re.findall(r"`([a-z_]+)`", told))
        assert named == set(members_of(code)), code
        assert named >= {member for row in CASES if row.code == code for member in row.members}


def test_what_may_be_retried_is_said_of_its_class() -> None:
    kinds: dict[str, type[LakebusError]] = {kind.code: kind for kind in all_errors()}
    for row in CASES:
        assert kinds[row.code].retryable == row.retryable, row.name
