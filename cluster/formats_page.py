"""docs/formats.md: what becomes of a value, by format and column type, by asking the decoders.

Nothing on the page is said by hand but which values are worth showing: each is sent in every format
that can carry it, and the page says what was stored, or why it was refused.
"""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from lakebus.errors import LakebusError, RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.ingesting.plain_rows import rows_as_json
from storage.rows.decode import ARROW_STREAM, CSV, JSON, NDJSON, PARQUET, decode_rows
from storage.rows.inferring import infer_columns

_HEAD: Final = """\
# Formats

<!-- Made by asking the decoders (cluster/formats_page.py): `make docs`; a test compares them. -->

What becomes of a value that is sent to a column, in each format. A value is stored whole or
refused: a row error names row, column, value and reason, and nothing is stored (or, with
`on_invalid=quarantine`, the row is set aside). *Made* is the type that the column gets where the
table is made from such a row (`create=true`).

NDJSON is judged as JSON is, Parquet as Arrow is. A missing member, an empty CSV field without
quotes and JSON `null` are null in every type. Lists, structs and maps hold values of all types by
the rules of these types; in CSV they are JSON text. `c.b[0]` says where in the column `c` a value
does not fit, elements counted from 0 as rows are.

"""

#: Column type: values as JSON writes them. A CSV field holds the same, of strings what they say.
_TEXTS: Final[dict[str, tuple[str, ...]]] = {
    "boolean": ("true", "null", '"true"', "1"),
    "tinyint": ("-128", "128", "1.0", "1.5", '"1"'),
    "bigint": ("9223372036854775807", '"9223372036854775807"', "9223372036854775808", "1e3"),
    "ubigint": ("18446744073709551615", "-1"),
    "float": ("0.1", "1e39", '"NaN"'),
    "double": ("9007199254740993", "0.1", "-0.0", '"-Infinity"', "1e999", '"1.5"'),
    "decimal(5,2)": ("1.5", '"123.45"', "1e2", "1.005", "1000"),
    "varchar": ('"caf\u00e9"', '""', "1", "true", '["a"]'),
    "blob": ('"aGk="', '"aGk"', '"hi"'),
    "date": ('"2026-01-31"', '"2026-02-30"', '"2026-01-31T00:00:00"'),
    "time": ('"12:00:00.5"', '"24:00:00"', '"12:00:00Z"', '"12:00"'),
    "timestamp": (
        '"2026-01-31T12:00:00"',
        '"2026-01-31 12:00:00.123456"',
        '"2026-01-31T12:00:00.1234567"',
        '"2026-01-31T12:00:00Z"',
        "1769860800",
    ),
    "timestamptz": (
        '"2026-01-31T12:00:00Z"',
        '"2026-01-31T12:00:00+05:30"',
        '"2026-01-31T12:00:00"',
        '"2016-12-31T23:59:60Z"',
    ),
    "uuid": ('"0F2B4C1E-0000-4000-8000-000000000000"', '"0f2b4c1e000040008000000000000000"'),
    "json": ('{"a": [1, 2.50]}', '"text"', "1", "null"),
    "integer[]": ("[1, null]", "[]", "[1, 2.5]", "1"),
    "decimal(5,2)[][]": ('[[1.5, "2"], null]', "[[1.005]]"),
    "struct(a integer, b varchar)": (
        '{"B": "x", "a": 1}',
        "{}",
        '{"a": "1"}',
        '{"a": 1, "c": 2}',
        '{"a": 1, "A": 2}',
    ),
    "map(varchar, integer)": (
        '{"x": 1, "y": null}',
        '[{"key": "x", "value": 1}]',
        '{"x": 1, "x": 2}',
        '{"x": 1.5}',
    ),
    "map(date, boolean)": ('{"2026-01-31": true}', '{"today": true}', '[{"key": null}]'),
}


def _utc(*parts: int) -> dt.datetime:
    return dt.datetime(*parts, tzinfo=dt.UTC)  # type: ignore[arg-type, misc]


_DAY: Final = _utc(2026, 1, 31, 12)
_LOCAL: Final = _DAY.replace(tzinfo=None)
#: Column type: Arrow types and values.
_ARRAYS: Final[dict[str, tuple[tuple[pa.DataType, Any], ...]]] = {
    "boolean": ((pa.bool_(), True), (pa.int8(), 1)),
    "tinyint": ((pa.int64(), 127), (pa.int64(), 128), (pa.float64(), 1.0), (pa.float64(), 1.5)),
    "bigint": ((pa.uint64(), 2**63), (pa.string(), "1")),
    "float": ((pa.float64(), 0.1), (pa.float64(), 1e39), (pa.float64(), float("nan"))),
    "double": ((pa.int64(), 2**53 + 1), (pa.decimal128(5, 2), decimal.Decimal("1.50"))),
    "decimal(5,2)": (
        (pa.decimal128(9, 1), decimal.Decimal("1.5")),
        (pa.decimal128(9, 3), decimal.Decimal("1.005")),
        (pa.int64(), 1000),
        (pa.float64(), 1.5),
    ),
    "varchar": ((pa.large_string(), "a"), (pa.dictionary(pa.int32(), pa.string()), "a")),
    "blob": ((pa.binary(2), b"hi"), (pa.string(), "hi")),
    "date": ((pa.date32(), _DAY.date()), (pa.timestamp("us"), _LOCAL)),
    "time": ((pa.time32("s"), dt.time(12)), (pa.string(), "12:00:00")),
    "timestamp": (
        (pa.timestamp("s"), _LOCAL),
        (pa.timestamp("ns"), 1_769_860_800_000_000_001),
        (pa.timestamp("us", "UTC"), _DAY),
        (pa.date32(), _DAY.date()),
    ),
    "timestamptz": ((pa.timestamp("ms", "Europe/Berlin"), _DAY), (pa.timestamp("us"), _LOCAL)),
    "uuid": ((pa.binary(16), bytes(15) + b"\x07"), (pa.binary(4), b"four")),
    "json": ((pa.string(), '{"a": 1}'), (pa.string(), "{"), (pa.int64(), 1)),
    "integer[]": (
        (pa.list_(pa.int64()), [1, None]),
        (pa.large_list(pa.int64()), [1, 2**40]),
        (pa.list_(pa.float32(), 2), [1.0, 2.0]),
        (pa.list_(pa.string()), ["1"]),
        (pa.int64(), 1),
    ),
    "struct(a integer, b varchar)": (
        (pa.struct([("B", pa.large_string()), ("A", pa.int8())]), {"B": "x", "A": 1}),
        (pa.struct([("a", pa.int32())]), {"a": 1}),
        (pa.struct([("a", pa.int32()), ("c", pa.int32())]), {"a": 1, "c": 2}),
        (pa.struct([("a", pa.float64())]), {"a": 1.5}),
    ),
    "map(varchar, integer)": (
        (pa.map_(pa.string(), pa.int64()), [("x", 1), ("y", None)]),
        (
            pa.list_(pa.struct([("key", pa.string()), ("value", pa.int32())])),
            [{"key": "x", "value": 1}],
        ),
        (pa.map_(pa.string(), pa.int64()), [("x", 1), ("x", 2)]),
        (pa.map_(pa.int32(), pa.int32()), [(1, 1)]),
    ),
}


def formats_page() -> str:
    """The whole page, the same each time."""

    return "".join((_HEAD, *_texts(), *_arrays())).rstrip("\n") + "\n"


def _texts() -> Iterable[str]:
    yield "## JSON, NDJSON, CSV\n\n"
    yield "| column | JSON | in JSON, NDJSON | made | in CSV | made |\n|---|---|---|---|---|---|\n"
    for kind, values in _TEXTS.items():
        for text in values:
            value = json.loads(text)
            row = b'{"c": ' + text.encode() + b', "n": 1}'
            field = value if isinstance(value, str) else "" if value is None else text
            cell = '"' + field.replace('"', '""') + '"' if value is not None else ""
            line = b"c,n\n" + cell.encode() + b",1\n"
            yield _line(
                f"`{kind}`",
                _code(text),
                _same(_outcome(kind, JSON, row), _outcome(kind, NDJSON, row)),
                _made(JSON, row),
                _outcome(kind, CSV, line),
                _made(CSV, line),
            )
    yield "\n"


def _arrays() -> Iterable[str]:
    yield "## Arrow, Parquet\n\n"
    yield "| column | Arrow type | value | in Arrow, Parquet | made |\n|---|---|---|---|---|\n"
    for kind, arrays in _ARRAYS.items():
        for arrow, value in arrays:
            table = pa.table({"c": pa.array([value], arrow), "n": pa.array([1])})
            stream, file = pa.BufferOutputStream(), io.BytesIO()
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
            pq.write_table(table, file)
            body = stream.getvalue().to_pybytes()
            yield _line(
                f"`{kind}`",
                f"`{arrow}`",
                _code(str(table.column("c")[0])),
                _same(_outcome(kind, ARROW_STREAM, body), _outcome(kind, PARQUET, file.getvalue())),
                _made(ARROW_STREAM, body),
            )


def _outcome(kind: str, media_type: str, body: bytes) -> str:
    columns = (Column(1, "c", kind), Column(2, "n", "bigint"))
    schema = TableSchema(table_id=1, name="t", version=1, columns=columns)
    try:
        batch = decode_rows(schema, media_type, body, rows_max=9).batch
    except RowsInvalid as refusal:
        (error,) = refusal.members["errors"]
        where = "" if error["column"] == "c" else f"`{error['column']}` "
        return f"refused: {_plain(where + error['reason'])}"
    stored = rows_as_json(schema, batch, rows_max=1)[0]["c"]
    return "null" if stored is None else _code(json.dumps(stored, ensure_ascii=False))


def _made(media_type: str, body: bytes) -> str:
    try:
        types = infer_columns("t", media_type, body, rows_max=9).types
    except LakebusError as refusal:
        return f"refused: {_plain(refusal.detail)}"
    return f"`{types['c'].sql}`" if "c" in types else "left out"


def _same(first: str, second: str) -> str:
    if first != second:
        raise AssertionError(f"two formats are told to be judged alike: {first}, {second}")
    return first


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """Text that cannot end a cell of the table."""

    return text.replace("|", "\\|").replace("\n", " ")


__all__: Sequence[str] = ("formats_page",)
