"""One result in its five forms: the same values in each, and an end that can be told from a cut."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import ResultTooLarge, SqlError
from storage.engine.engine import QueryEngine
from tests.integration.engine_rig import plan, settings

#: One column a type, with a null, in the order in which all forms must give them.
_TYPES = """
SELECT * FROM (VALUES
  (true, 127::TINYINT, (-9223372036854775808)::BIGINT, 18446744073709551615::UBIGINT,
   170141183460469231731687303715884105727::HUGEINT, 1.5::FLOAT, 'NaN'::DOUBLE,
   12345678901234567890123456789012.345678::DECIMAL(38,6), 'quote " comma , line' || chr(10) || 'é',
   '\\x00\\xFF'::BLOB, DATE '2026-01-31', TIME '23:59:59.5', TIMESTAMP '2026-01-31 12:00:00.25',
   TIMESTAMPTZ '2026-01-31 12:00:00+02', UUID '0f2b4c1e-0000-4000-8000-000000000000',
   '{"a":[1,2]}'::JSON, [1, NULL, 3], {'a': 1, 'b': 'x,"y'}, MAP {'k': 1.5}, INTERVAL '1 day'),
  (NULL, NULL, NULL, NULL, NULL, NULL, '-Infinity', NULL, '', NULL, NULL, NULL, NULL, NULL, NULL,
   NULL, NULL, NULL, NULL, NULL)
) t(b, i1, i8, u8, h, f4, f8, d, s, x, dt, tm, ts, tz, id, js, l, st, m, iv)
"""


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[QueryEngine]:
    made = QueryEngine(settings(tmp_path, spare=False))
    await made.start()
    yield made
    await made.stop()


async def _bytes(engine: QueryEngine, sql: str, result_format: str, **more: Any) -> bytes:
    async with await engine.execute(plan(sql, result_format=result_format, **more)) as stream:
        return await stream.read_all()


async def test_every_type_is_the_same_in_json_ndjson_and_csv(engine: QueryEngine) -> None:
    rows = json.loads(await _bytes(engine, _TYPES, "json"))
    *lines, end = (await _bytes(engine, _TYPES, "ndjson")).decode().splitlines()
    assert json.loads(end) == {"complete": True, "row_count": 2}
    assert [list(json.loads(line).values()) for line in lines] == rows
    text = (await _bytes(engine, _TYPES, "csv")).decode()
    header, *fields = list(csv.reader(io.StringIO(text), strict=True))
    assert header == list(json.loads(lines[0]))
    for values, line in zip(rows, fields, strict=True):
        for value, field in zip(values, line, strict=True):
            if isinstance(value, list | dict):
                assert json.loads(field) == value
            elif isinstance(value, bool):
                assert field == json.dumps(value)
            else:
                assert field == ("" if value is None else str(value))
    # Null is nothing, an empty string is two quotes.
    assert text.splitlines()[-1] == ',,,,,,-Infinity,,""' + "," * 11


async def test_every_type_is_the_same_in_arrow_and_parquet(engine: QueryEngine) -> None:
    arrow = pa.ipc.open_stream(await _bytes(engine, _TYPES, "arrow")).read_all()
    parquet = pq.read_table(pa.BufferReader(await _bytes(engine, _TYPES, "parquet")))
    assert parquet.column_names == arrow.column_names
    assert parquet.num_rows == 2
    for name in arrow.column_names:
        if name not in ("f8", "iv"):
            assert parquet[name].to_pylist() == arrow[name].to_pylist(), name
    assert parquet["iv"].to_pylist() == ["1 day", None]
    assert str(parquet["f8"].to_pylist()) == "[nan, -inf]"
    assert parquet.schema.field("tz").type == pa.timestamp("us", "UTC")


@pytest.mark.parametrize("result_format", ["json", "ndjson", "csv", "arrow", "parquet"])
async def test_an_empty_answer_is_whole(engine: QueryEngine, result_format: str) -> None:
    body = await _bytes(engine, "SELECT 1 AS a, 'x' AS b WHERE false", result_format)
    match result_format:
        case "json":
            assert body == b"[]"
        case "ndjson":
            assert body == b'{"complete":true,"row_count":0}\n'
        case "csv":
            assert body == b"a,b\n"
        case "arrow":
            assert pa.ipc.open_stream(body).read_all().num_rows == 0
        case _:
            table = pq.read_table(pa.BufferReader(body))
            assert (table.num_rows, table.column_names) == (0, ["a", "b"])


@pytest.mark.parametrize("result_format", ["ndjson", "csv", "arrow", "parquet"])
async def test_many_rows_come_in_order_and_whole(engine: QueryEngine, result_format: str) -> None:
    sql = "SELECT range AS n, 'row ' || range AS t FROM range(300000)"
    body = await _bytes(engine, sql, result_format, deterministic=True)
    match result_format:
        case "ndjson":
            *lines, _ = body.splitlines()
            found = [int(json.loads(line)["n"]) for line in lines]
        case "csv":
            found = [int(line[0]) for line in list(csv.reader(io.StringIO(body.decode())))[1:]]
        case "arrow":
            found = pa.ipc.open_stream(body).read_all()["n"].to_pylist()
        case _:
            file = pq.ParquetFile(pa.BufferReader(body))
            assert file.num_row_groups > 1
            found = file.read()["n"].to_pylist()
    assert found == list(range(300_000))


@pytest.mark.parametrize("result_format", ["json", "ndjson", "csv", "arrow", "parquet"])
async def test_D9_a_limit_in_the_middle_never_looks_like_an_end(
    engine: QueryEngine, result_format: str
) -> None:
    sql = "SELECT range AS n, 'row ' || range AS t FROM range(300000)"
    whole = await _bytes(engine, sql, result_format)
    asked = plan(sql, result_format=result_format, bytes_max=len(whole) - 1)
    got: list[bytes] = []

    async def read() -> None:
        async with await engine.execute(asked) as stream:
            async for part in stream:
                got.append(part)

    with pytest.raises(ResultTooLarge):
        await read()
    cut = b"".join(got)
    assert len(cut) < len(whole)
    match result_format:
        case "json":
            assert not cut.endswith(b"]]")
        case "ndjson":
            assert b'"complete"' not in cut
        case "arrow":
            assert not cut.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00")
        case "parquet":
            assert not cut.endswith(b"PAR1")


@pytest.mark.parametrize("result_format", ["ndjson", "parquet"])
async def test_names_that_a_form_cannot_keep_apart_are_refused(
    engine: QueryEngine, result_format: str
) -> None:
    with pytest.raises(SqlError, match="named a"):
        await _bytes(engine, "SELECT 1 AS a, 2 AS a", result_format)
    assert b'"a b"' not in await _bytes(engine, 'SELECT 1 AS "a b"', "csv")
    assert await _bytes(engine, 'SELECT 1 AS "a,b", 2 AS "q""q"', "csv") == b'"a,b","q""q"\n1,2\n'
