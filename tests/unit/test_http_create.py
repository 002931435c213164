"""Tables made from the first rows sent to them, over HTTP: `create=true`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import pytest

from lakebus.schemas import TableSchema
from storage.ingesting.grants import Grant
from storage.rows.segment import decode_segment
from tests.unit.http_rig import ARROW, EVENTS, NDJSON, Server, problem, server

CREATE = "?create=true"
ROWS: list[dict[str, Any]] = [
    {"id": 1, "Note": "a", "share": 1, "at": "2026-01-31T13:00:00+01:00", "gone": None},
    {"id": 2, "note": None, "share": 0.5, "flag": True, "more": {"x": [1]}},
]
TYPES = {
    "id": "bigint",
    "note": "varchar",
    "share": "double",
    "at": "timestamptz",
    "flag": "boolean",
    "more": "json",
}


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        yield made


async def schema_of(lake: Server, name: str) -> TableSchema | None:
    state = await lake.catalog.table(name)
    return None if state is None else state.schema


async def types_of(lake: Server, name: str) -> dict[str, str] | None:
    schema = await schema_of(lake, name)
    return None if schema is None else {column.name: column.type for column in schema.columns}


def as_ndjson(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_arrow(**columns: pa.Array) -> bytes:
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def stored(lake: Server) -> list[list[dict[str, Any]]]:
    """The rows of every entry of one table, by column id."""

    found = []
    for shard in lake.lake.state.shards:
        for entry in shard.log.values():
            segment = decode_segment(lake.lake.state.segments[entry.segment_id].payload)
            found.append([r for p in segment.parts(entry.index) for r in p.batch.to_pylist()])
    return found


async def test_A12_a_missing_table_is_made_from_its_first_rows(lake: Server) -> None:
    sending = asyncio.create_task(lake.send(ROWS, query=CREATE + "&wait=visible", table="New"))
    async with asyncio.timeout(5):
        while not lake.entries:
            await asyncio.sleep(0)
    await lake.publish()
    answer = await sending
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert (document["receipt"]["rows"], document["receipt"]["target"]) == (2, "new")
    assert document["columns_skipped"] == ["gone"]
    schema = await schema_of(lake, "new")
    assert schema is not None
    assert {column.name: column.type for column in schema.columns} == TYPES
    assert [column.column_id for column in schema.columns] == [1, 2, 3, 4, 5, 6]
    assert all(column.nullable for column in schema.columns)
    (rows,) = stored(lake)
    assert [row["1"] for row in rows] == [1, 2]
    assert [row["3"] for row in rows] == [1.0, 0.5]
    assert rows[1]["6"] == '{"x":[1]}'
    # The table was made in the snapshot before the one with the rows.
    snapshots = await lake.catalog.snapshots(limit=9)
    assert [snapshot.operation for snapshot in snapshots] == ["append", "create", "genesis"]
    shown = (await lake.get("/v1/tables/new")).json()
    assert [column["name"] for column in shown["columns"]] == list(TYPES)
    records = (await lake.get("/v1/admin/audit")).json()["records"]
    assert [(r["action"], r["subject"]) for r in records if r["action"] == "table.create"] == [
        ("table.create", "new")
    ]


async def test_A3_a_retry_is_a_replay_in_any_encoding(lake: Server) -> None:
    first = await lake.send(ROWS, query=CREATE, key="k", table="new")
    assert first.status_code == 202, first.text
    for body, kind in (
        (json.dumps(ROWS, indent=2).encode(), "application/json"),
        (as_ndjson(ROWS), NDJSON),
    ):
        again = await lake.send(body, query=CREATE, key="k", table="new", content_type=kind)
        assert again.status_code == 202, again.text
        assert again.json()["receipt"] == first.json()["receipt"]
        assert again.json()["replayed"] is True
        assert again.json()["columns_skipped"] == ["gone"]
    other = [ROWS[0] | {"gone": 1}, ROWS[1]]
    problem(await lake.send(other, query=CREATE, key="k", table="new"), 422, "idempotency_conflict")
    problem(
        await lake.send(ROWS[:1], query=CREATE, key="k", table="new"), 422, "idempotency_conflict"
    )
    assert lake.entries == 1


async def test_A3_a_retry_after_changes_and_a_drop_makes_nothing(lake: Server) -> None:
    first = await lake.send(ROWS, query=CREATE, key="k", table="new")
    await lake.publish()
    change = {"drop_columns": ["note"], "add_columns": [{"name": "gone", "type": "bigint"}]}
    changed = await lake.http.patch("/v1/tables/new", json=change, headers=lake.headers())
    assert changed.status_code == 200, changed.text
    again = await lake.send(ROWS, query=CREATE, key="k", table="new")
    assert again.json()["receipt"] == first.json()["receipt"]
    dropped = await lake.http.delete("/v1/tables/new", headers=lake.headers())
    assert dropped.json()["state"] == "dropped"
    head = await lake.catalog.head()
    again = await lake.send(ROWS, query=CREATE, key="k", table="new")
    assert again.json()["receipt"] == first.json()["receipt"]
    reader = await lake.new_key(Grant("ingest"), principal="root")
    again = await lake.send(ROWS, query=CREATE, key="k", table="new", api_key=reader)
    assert again.json()["receipt"] == first.json()["receipt"]
    problem(
        await lake.send(ROWS[:1], query=CREATE, key="k", table="new"), 422, "idempotency_conflict"
    )
    assert await schema_of(lake, "new") is None
    assert (await lake.catalog.head()).snapshot_id == head.snapshot_id
    assert lake.entries == 1


async def test_A6_a_lost_reply_is_resolved_by_the_same_key(lake: Server) -> None:
    lake.lake.faults.lose_replies.add("append")
    problem(await lake.send(ROWS, query=CREATE, key="k", table="new"), 503, "outcome_unknown")
    assert await types_of(lake, "new") == TYPES
    again = await lake.send(ROWS, query=CREATE, key="k", table="new")
    assert again.json()["replayed"] is True
    assert lake.entries == 1


async def test_A5_concurrent_first_requests_make_one_table(lake: Server) -> None:
    same = [lake.send(ROWS, query=CREATE, key="k", table="new") for _ in range(6)]
    others = [lake.send([{"id": n, "gone": None}], query=CREATE, table="new") for n in range(6)]
    answers = await asyncio.gather(*same, *others)
    assert {answer.status_code for answer in answers} <= {202, 422}
    assert sum("gone" in a.json().get("columns_skipped", ()) for a in answers) > 0
    names = [t.schema.name for t in await lake.catalog.tables()]
    assert names == ["new"]
    assert lake.entries == 1 + sum(a.status_code == 202 for a in answers[6:])


async def test_A10_the_loser_of_a_race_is_held_to_the_winners_table(lake: Server) -> None:
    bodies = [[{"id": 1}], [{"id": "text"}], [{"other": 1}]]
    answers = await asyncio.gather(*(lake.send(body, query=CREATE, table="new") for body in bodies))
    assert sorted(answer.status_code for answer in answers) == [202, 422, 422]
    for answer in answers:
        if answer.status_code == 422:
            problem(answer, 422, "rows_invalid")
    assert lake.entries == 1


async def test_an_existing_table_takes_the_rows_as_always(lake: Server) -> None:
    await lake.create()
    limited = await lake.new_key(Grant("ingest"), principal="limited")
    ok = await lake.send([{"id": 1, "unknown": None}], query=CREATE, api_key=limited)
    assert (ok.status_code, ok.json()["columns_skipped"]) == (202, ["unknown"])
    document = problem(
        await lake.send([{"id": 1, "unknown": 2}], query=CREATE, api_key=limited),
        422,
        "rows_invalid",
    )
    assert document["errors"][0]["column"] == "unknown"
    # Without `create`, a column that the table does not have is refused even without a value.
    problem(await lake.send([{"id": 1, "unknown": None}]), 422, "rows_invalid")
    diverted = await lake.send(
        [{"id": 1, "unknown": None}, {"id": "x"}], query=CREATE + "&on_invalid=quarantine"
    )
    assert (diverted.json()["receipt"]["rows"], diverted.json()["columns_skipped"]) == (
        1,
        ["unknown"],
    )


async def test_the_scope_create_is_named_where_it_is_missing(lake: Server) -> None:
    only = await lake.new_key(Grant("ingest"), principal="limited")
    document = problem(
        await lake.send(ROWS, query=CREATE, table="new", api_key=only), 403, "forbidden"
    )
    assert document["scope"] == "create"
    some = await lake.new_key(Grant("ingest"), Grant("create", ("a.*",)), principal="some")
    document = problem(
        await lake.send(ROWS, query=CREATE, table="b.new", api_key=some), 403, "forbidden"
    )
    assert document["scope"] == "create"
    assert "b.new" in document["detail"]
    assert (await lake.send(ROWS, query=CREATE, table="a.new", api_key=some)).status_code == 202
    # D10: what one may not write to is not there, whatever one may create.
    maker = await lake.new_key(Grant("ingest", ("a.*",)), Grant("create"), principal="maker")
    problem(await lake.send(ROWS, query=CREATE, table="c.new", api_key=maker), 403, "forbidden")
    problem(await lake.send(ROWS, table="new"), 404, "table_not_found")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ([{"a": 1}, {"a": "x"}], "rows_invalid", ["column a", "text", "a whole number"]),
        ([{"a": None}, {}], "schema_invalid", ["no column has a value"]),
        ([{"my column": 1}], "schema_invalid", ["my column"]),
        ([{"a": 1, "my column": None}], "schema_invalid", ["my column"]),
        ([{"a": 1, "A": 2}], "rows_invalid", ["twice"]),
        ([{"a": 2**63}], "rows_invalid", ["out of range"]),
        ([{"a": "2026-02-30T00:00:00Z"}], "rows_invalid", ["does not exist"]),
        ([{"a": "2026-02-03T00:00:00.0000001Z"}], "rows_invalid", ["microsecond"]),
        ([{"a": 1}, 7], "rows_invalid", ["object"]),
        ([{f"c{n}": 1 for n in range(1001)}], "schema_invalid", ["1000"]),
        ([{"a": 1} | {f"c{n}": None for n in range(1001)}], "schema_invalid", ["1000"]),
    ],
)
async def test_A10_rows_that_no_table_can_be_made_of_leave_nothing(
    lake: Server, body: Any, code: str, words: list[str]
) -> None:
    document = problem(await lake.send(body, query=CREATE, key="k", table="new"), 422, code)
    for word in words:
        assert word in json.dumps(document)
    assert await schema_of(lake, "new") is None
    assert (await lake.catalog.head()).snapshot_id == 1
    assert lake.untouched


async def test_A10_rows_set_aside_come_with_rows_that_fit(lake: Server) -> None:
    query = CREATE + "&on_invalid=quarantine"
    bad = [{"a": 2**63}]
    problem(await lake.send(bad, query=query, key="k", table="new"), 422, "rows_invalid")
    assert await schema_of(lake, "new") is None
    mixed = await lake.send([{"a": 1}, {"a": 2**63}], query=query, key="k", table="new")
    receipt = mixed.json()["receipt"]
    assert (receipt["rows"], receipt["rows_rejected"]) == (1, 1)
    again = await lake.send([{"a": 1}, {"a": 2**63}], query=query, key="k", table="new")
    assert again.json()["receipt"] == receipt
    assert lake.entries == 1


async def test_A10_arrow_and_csv_make_tables_too(lake: Server) -> None:
    body = as_arrow(
        Id=pa.array([1, 2], pa.int16()),
        amount=pa.array(["1.50", None]).cast(pa.decimal128(10, 2)),
        never=pa.nulls(2),
    )
    answer = await lake.send(body, query=CREATE, table="a", content_type=ARROW)
    assert (answer.status_code, answer.json()["columns_skipped"]) == (202, ["never"])
    assert await types_of(lake, "a") == {"id": "smallint", "amount": "decimal(10,2)"}
    answer = await lake.send(
        b'id,zip,at,never\n1,01234,2026-01-31T12:00:00,\n2,"",,\n',
        query=CREATE,
        table="c",
        content_type="text/csv",
    )
    assert (answer.status_code, answer.json()["columns_skipped"]) == (202, ["never"])
    assert await types_of(lake, "c") == {"id": "bigint", "zip": "varchar", "at": "timestamp"}
    assert sorted(len(rows) for rows in stored(lake)) == [2, 2]


async def test_A8_several_tables_are_made_with_one_entry(lake: Server) -> None:
    await lake.create()
    body = {"events": [{"id": 1}], "One": ROWS, "two": [{"a": 1, "b": None}]}
    before = (await lake.catalog.head()).snapshot_id
    first = await lake.send(body, query=CREATE, key="k", table="*")
    assert first.status_code == 202, first.text
    assert first.json()["columns_skipped"] == ["one.gone", "two.b"]
    assert (await lake.catalog.head()).snapshot_id == before + 1
    assert await types_of(lake, "one") == TYPES
    assert await types_of(lake, "two") == {"a": "bigint"}
    again = await lake.send(body, query=CREATE, key="k", table="*")
    assert again.json()["receipt"] == first.json()["receipt"]
    assert again.json()["columns_skipped"] == ["one.gone", "two.b"]
    assert lake.entries == 1
    # One bad table keeps the others from being made.
    bad = {"three": [{"a": 1}], "four": [{"a": 1}, {"a": "x"}], "events": [{"id": "x"}]}
    document = problem(await lake.send(bad, query=CREATE, table="*"), 422, "rows_invalid")
    assert [error["table"] for error in document["errors"]] == ["four", "events"]
    assert await schema_of(lake, "three") is None


# --- several tables as parts ----------------------------------------------------------------------


def multipart(*parts: tuple[str, str, bytes]) -> bytes:
    pieces = []
    for name, kind, body in parts:
        disposition = f'Content-Disposition: form-data; name="{name}"'
        head = f"--cut\r\n{disposition}\r\nContent-Type: {kind}\r\n\r\n"
        pieces.append(head.encode() + body + b"\r\n")
    return b"".join(pieces) + b"--cut--\r\n"


FORM = "multipart/form-data; boundary=cut"


async def test_A8_parts_in_their_own_formats_are_one_entry(lake: Server) -> None:
    await lake.create()
    await lake.create(EVENTS | {"name": "ns.others"})
    arrow = as_arrow(id=pa.array([1, 2]))
    body = multipart(("Events", "text/csv", b"id,note\n1,a\n"), ("ns.others", ARROW, arrow))
    first = await lake.send(body, table="*", key="k", content_type=FORM)
    assert first.status_code == 202, first.text
    assert (first.json()["receipt"]["rows"], first.json()["receipt"]["target"]) == (3, "*")
    # A2, A4: encodings do not enter; the same rows as JSON are a replay.
    same = {"ns.others": [{"id": 1}, {"id": 2}], "events": [{"id": 1, "note": "a"}]}
    again = await lake.send(same, table="*", key="k")
    assert again.json()["receipt"] == first.json()["receipt"]
    made = multipart(("new", NDJSON, as_ndjson(ROWS)), ("events", "text/csv", b"id\n7\n"))
    answer = await lake.send(made, table="*", query=CREATE, content_type=FORM)
    assert answer.json()["columns_skipped"] == ["new.gone"]
    assert await types_of(lake, "new") == TYPES
    assert lake.entries == 2


async def test_A10_a_bad_part_keeps_all_parts_out(lake: Server) -> None:
    await lake.create()
    await lake.create(EVENTS | {"name": "others"})
    good = ("events", "text/csv", b"id\n1\n")
    for parts, status, code in (
        ([good, ("others", "text/csv", b"id\nx\n")], 422, "rows_invalid"),
        ([good, ("others", "text/plain", b"id\n1\n")], 415, "unsupported_media_type"),
        ([good, ("Events", "text/csv", b"id\n2\n")], 400, "malformed_request"),
        ([good, ("nothing", "text/csv", b"id\n2\n")], 404, "table_not_found"),
        ([good, ("a b", "text/csv", b"id\n2\n")], 404, "table_not_found"),
        ([good, ("others", "text/csv", b"id\n")], 400, "malformed_request"),
        ([good, ("others", ARROW, b"cut")], 400, "malformed_body"),
    ):
        answer = await lake.send(multipart(*parts), table="*", key="k", content_type=FORM)
        problem(answer, status, code)
    cut = multipart(good)[:-4]
    problem(await lake.send(cut, table="*", content_type=FORM), 400, "malformed_body")
    nameless = "multipart/form-data"
    problem(
        await lake.send(multipart(good), table="*", content_type=nameless), 400, "malformed_request"
    )
    problem(await lake.send(multipart(good), content_type=FORM), 415, "unsupported_media_type")
    assert lake.untouched


async def test_A3_a_known_key_is_answered_before_a_bad_part_is_judged(lake: Server) -> None:
    await lake.create()
    good = multipart(("events", "text/csv", b"id\n1\n"))
    first = await lake.send(good, table="*", key="k", content_type=FORM)
    document = problem(
        await lake.send(good[:-4], table="*", key="k", content_type=FORM),
        422,
        "idempotency_conflict",
    )
    assert document["batch_id"] == first.json()["receipt"]["batch_id"]
