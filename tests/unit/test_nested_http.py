"""Lists, structs and maps on the whole way: HTTP, bus, roles, files, DuckDB's child, HTTP."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from tests.unit.http_rig import ARROW, Server, problem
from tests.unit.test_http_engine import lake

__all__ = ["lake"]  # the fixture

_TABLE = {
    "name": "visits",
    "columns": [
        {"name": "id", "type": "BIGINT"},
        {"name": "tags", "type": "VARCHAR[]"},
        {"name": "s", "type": 'STRUCT(A INTEGER, "order" DECIMAL(9,2)[])'},
        {"name": "m", "type": "MAP(VARCHAR, UUID)"},
    ],
}
_KEY = "0f2b4c1e-0000-4000-8000-000000000000"
_ROWS: list[dict[str, Any]] = [
    {"id": 1, "tags": ["a", None, "b"], "s": {"a": 1, "order": ["1.50", 2]}, "m": {"k": _KEY}},
    {"id": 2, "tags": [], "s": {}, "m": {}},
    {"id": 3},
]


async def _rows(lake: Server, sql: str, **more: Any) -> Any:
    answer = await lake.http.post("/v1/query", json={"sql": sql, **more}, headers=lake.headers())
    assert answer.status_code == 200, answer.text
    return answer.json()["rows"]


async def test_D1_nested_columns_are_read_as_they_were_written(lake: Server) -> None:
    made = await lake.create(_TABLE)
    types = ["bigint", "varchar[]", 'struct(a integer, "order" decimal(9,2)[])']
    assert [c["type"] for c in made["columns"]] == [*types, "map(varchar, uuid)"]
    path = "/v1/tables/visits/rows?wait=visible&timeout_ms=20000"
    for content_type, body in (
        ("application/json", json.dumps(_ROWS).encode()),
        ("text/csv", b'id,tags,s\n4,"[""x""]","{""a"": 7}"\n'),
        (ARROW, _arrow()),
    ):
        headers = lake.headers() | {"content-type": content_type}
        sent = await lake.http.post(path, content=body, headers=headers)
        assert (sent.status_code, sent.json()["visible"]) == (200, True), sent.text

    assert await _rows(lake, "SELECT * FROM visits ORDER BY id") == [
        ["1", ["a", None, "b"], {"a": 1, "order": ["1.50", "2.00"]}, {"k": _KEY}],
        ["2", [], {"a": None, "order": None}, {}],
        ["3", None, None, None],
        ["4", ["x"], {"a": 7, "order": None}, None],
        ["5", ["é"], None, None],
    ]
    assert await _rows(
        lake, "SELECT tags[1], s.a, m['k'] FROM visits WHERE s.a > 0 OR s.a IS NULL ORDER BY id"
    ) == [["a", 1, _KEY], [None, None, None], [None, None, None], ["x", 7, None], ["é", None, None]]
    assert await _rows(lake, "SELECT id FROM visits WHERE tags IS NULL") == [["3"]]
    unnested = "SELECT t, count(*) FROM (SELECT unnest(tags) t FROM visits) GROUP BY t ORDER BY t"
    counted = [["a", "1"], ["b", "1"], ["x", "1"], ["é", "1"], [None, "1"]]
    assert await _rows(lake, unnested) == counted
    described = await _rows(lake, "DESCRIBE visits")
    struct = 'STRUCT(a INTEGER, "order" DECIMAL(9,2)[])'
    shown = ["BIGINT", "VARCHAR[]", struct, "MAP(VARCHAR, UUID)"]
    assert [row[1] for row in described] == shown
    listed = "SELECT data_type FROM information_schema.columns WHERE table_name = 'visits'"
    assert [row[0] for row in await _rows(lake, listed)] == shown


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"ID": pa.array([5]), "tags": pa.array([["é"]], pa.large_list(pa.string()))})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


async def test_D1_a_nested_column_added_later_reads_as_null(lake: Server) -> None:
    path = "/v1/tables/visits/rows?wait=visible&timeout_ms=20000"
    made = await lake.create(_TABLE)
    headers = lake.headers() | {"content-type": "application/json"}
    await lake.http.post(path, json=_ROWS[:1], headers=headers)
    change = {
        "add_columns": [{"name": "late", "type": "struct(x integer, y struct(z date))"}],
        "rename_columns": {"s": "t"},
        "drop_columns": ["m"],
    }
    matched = lake.headers() | {"if-match": str(made["schema_version"])}
    changed = await lake.http.patch("/v1/tables/visits", json=change, headers=matched)
    assert changed.status_code == 200, changed.text
    row = {"id": 9, "t": {"a": 5}, "late": {"y": {"z": "2026-01-31"}}}
    await lake.http.post(path, json=[row], headers=headers)
    sql = "SELECT t.a, late, late.x, late.y.z FROM visits ORDER BY id"
    assert await _rows(lake, sql) == [
        [1, None, None, None],
        [5, {"x": None, "y": {"z": "2026-01-31"}}, None, "2026-01-31"],
    ]
    assert await _rows(lake, "SELECT id FROM visits WHERE late.y.z IS NULL") == [["1"]]
    widened = {"widen_columns": {"t": "struct(a bigint)"}}
    matched = lake.headers() | {"if-match": str(changed.json()["schema_version"])}
    refused = await lake.http.patch("/v1/tables/visits", json=widened, headers=matched)
    found = problem(refused, 422, "schema_change_invalid")
    assert "does not change" in found["detail"]


async def test_A10_a_nested_value_that_does_not_fit_is_named_by_its_path(lake: Server) -> None:
    await lake.create(_TABLE)
    headers = lake.headers() | {"content-type": "application/json"}
    rows = [{"id": 1, "s": {"order": [1, "1.255"]}}, {"id": 2, "tags": ["a", 1]}, {"id": 3}]
    refused = await lake.http.post("/v1/tables/visits/rows", json=rows, headers=headers)
    found = problem(refused, 422, "rows_invalid")
    assert [(e["row"], e["column"]) for e in found["errors"]] == [(0, "s.order[1]"), (1, "tags[1]")]
