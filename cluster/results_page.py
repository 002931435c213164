"""docs/results.md: what becomes of a value in each form of an answer, by asking the writers.

Nothing on the page is said by hand but which values are worth showing: each is written in every
form by what the engine's child runs, read back, and shown as a reader gets it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from storage.engine.child_faults import Refusal
from storage.engine.child_query import bind, stream
from storage.engine.child_sandbox import open_database
from storage.engine.plans import Integers, ResultFormat
from storage.engine.settings import EngineSettings
from storage.engine.wire import End, Header, RunRequest

_HEAD: Final = """\
# Results

<!-- Made by asking the writers (cluster/results_page.py): `make docs`; a test compares them. -->

What becomes of a value in an answer, in each of the five forms. The form depends on the type of the
column, never on the value. What a type's JSON looks like inside lists, structs and maps is what it
looks like alone.

- **JSON**: integers to 32 bits and floats are numbers; wider integers and decimals are strings, or
  numbers with `integers=number`. Lists are arrays, structs are objects, rows without names are
  arrays. Maps are objects when their keys are text (`varchar`, `enum`, `json`), otherwise lists of
  `{"key": …, "value": …}`.
- **NDJSON** holds the values of JSON, by column name.
- **CSV**: the text of the same values without quotes; lists, structs and maps are their JSON. Null
  is nothing, an empty text is `""`.
- **Arrow** and **Parquet**: the type of their own where they have one that holds every value, text
  where they have none. Cast in SQL for another one: `sum(n)::BIGINT`, `CAST(u AS VARCHAR)`.

A type that a form cannot carry is refused before the first byte, by an error that names the column.

"""

#: What is asked for, in groups.
VALUES: Final[dict[str, tuple[str, ...]]] = {
    "Numbers": (
        "true",
        "'-128'::TINYINT", "127::TINYINT", "'-32768'::SMALLINT", "32767::SMALLINT",
        "'-2147483648'::INTEGER", "2147483647::INTEGER",
        "'-9223372036854775808'::BIGINT", "9223372036854775807::BIGINT",
        "'-170141183460469231731687303715884105728'::HUGEINT",
        "170141183460469231731687303715884105727::HUGEINT",
        "sum(1)",
        "0::UTINYINT", "255::UTINYINT", "65535::USMALLINT", "4294967295::UINTEGER",
        "18446744073709551615::UBIGINT", "340282366920938463463374607431768211455::UHUGEINT",
        "'-1000000000000000000000000000000000000000000'::BIGNUM",
        "0.1::FLOAT", "3.4028235e38::FLOAT", "1e-45::FLOAT",
        "0.1::DOUBLE", "1::DOUBLE", "'-0.0'::DOUBLE", "1.7976931348623157e308::DOUBLE",
        "5e-324::DOUBLE", "'NaN'::DOUBLE", "'Infinity'::FLOAT", "'-Infinity'::DOUBLE",
        "'-1.50'::DECIMAL(4,2)", "0::DECIMAL(38,10)",
        "99999999999999999999999999999999999999::DECIMAL(38,0)",
        "'-0.00000000000000000000000000000000000001'::DECIMAL(38,38)",
    ),
    "Text and bytes": (
        "''", "'café'", "'say \"yes\", and'", "'two' || chr(10) || 'lines'", "' spaces '",
        "'back\\slash'", "chr(1)", "'NULL'", "''::BLOB", "'\\x00\\xFF'::BLOB", "'101'::BIT",
        "'0F2B4C1E-0000-4000-8000-000000000000'::UUID", "'{\"a\": [1, 2.50]}'::JSON",
        "'null'::JSON", "'b'::ENUM('a', 'b')",
    ),
    "Dates and times": (
        "DATE '1969-12-31'", "DATE '0001-01-01'", "DATE '9999-12-31'", "DATE '10000-01-01'",
        "DATE '0044-03-15 (BC)'", "'infinity'::DATE",
        "TIME '00:00:00'", "TIME '23:59:59.999999'", "TIME '24:00:00'",
        "TIME_NS '01:02:03.123456789'", "'01:02:03+05:30'::TIMETZ",
        "TIMESTAMP '1969-12-31 23:59:59.5'", "TIMESTAMP '9999-12-31 23:59:59.999999'",
        "TIMESTAMP '10000-01-01 00:00:00'", "'-infinity'::TIMESTAMP",
        "TIMESTAMP_S '2026-01-31 12:00:00'", "TIMESTAMP_MS '2026-01-31 12:00:00.125'",
        "TIMESTAMP_NS '2026-01-31 12:00:00.123456789'",
        "TIMESTAMPTZ '2026-01-31 12:00:00+05:30'", "'infinity'::TIMESTAMPTZ",
        "'2026-01-31 12:00:00.123456789Z'::TIMESTAMPTZ_NS",
        "INTERVAL '1 month -2 days 3 hours 1 microsecond'",
    ),
    "Lists, structs, maps": (
        "[1, NULL, 3]", "[]::INTEGER[]", "[9007199254740993, -1]::BIGINT[]",
        "[1, 2, 3]::INTEGER[3]", "[['a', ''], NULL, []]", "['NaN', '0.5']::DOUBLE[]",
        "[1.50]::DECIMAL(4,2)[]", "['\\xFF'::BLOB]", "[DATE '1969-12-31', NULL]",
        "[TIMESTAMPTZ '2026-01-31 12:00:00Z']", "[1::HUGEINT]", "['a'::ENUM('a')]",
        "[INTERVAL 1 DAY]", "['{\"a\": 1}'::JSON]",
        "{'a': 1, 'b c': NULL::VARCHAR}", "{'at': {'lat': 1.5::DOUBLE, 'lon': 'NaN'::DOUBLE}}",
        "[{'n': 1}, NULL]", "row(1::BIGINT, 'x')", "struct_pack()",
        "MAP {'k': 1, 'l': NULL}", "MAP {}::MAP(VARCHAR, INTEGER)", "MAP {'a'::ENUM('a'): 1}",
        "MAP {1: 'x'}", "MAP {1::BIGINT: 'x'}", "MAP {DATE '2026-01-31': [0.5::DOUBLE]}",
        "MAP {[1]: MAP {'k': 2}}", "MAP {}",
    ),
    "Null, and the rest": (
        "NULL", "NULL::INTEGER", "NULL::VARCHAR", "NULL::INTEGER[]", "NULL::STRUCT(a INTEGER)",
        "2::UNION(n INTEGER, s VARCHAR)", "{'a': [1, 2]}::VARIANT", "'POINT(1 2)'::GEOMETRY",
        "sum(1) EXPORT_STATE",
    ),
}  # fmt: skip

_NUMBER_BYTES_MAX = 1 << 30


class Writers:
    """The five writers over a database of their own: what the engine's child is, without the child.
    One thread at a time."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._cursor = connection.cursor()

    def body(
        self, sql: str, form: ResultFormat, *, integers: Integers = "string"
    ) -> tuple[tuple[tuple[str, str], ...], bytes]:
        """(columns, body) of a statement's answer. Raises Refusal, duckdb.Error."""

        most = _NUMBER_BYTES_MAX
        request = RunRequest(1, sql, "", (), form, integers, most, most, False, "")
        taken = _Taken()
        binding = bind(self._cursor, request, None)
        stream(binding, request, taken, lambda: None)
        return taken.columns, b"".join(taken.parts)


class _Taken:
    """An answer in memory."""

    def __init__(self) -> None:
        self.columns: tuple[tuple[str, str], ...] = ()
        self.parts: list[bytes] = []

    def header(self, header: Header) -> None:
        self.columns = header.columns

    def write(self, data: Any) -> None:
        self.parts.append(bytes(data))

    def finish(self, end: End) -> None:
        return


@contextmanager
def writers() -> Iterator[Writers]:
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings(allowed_directory=folder, temp_directory=f"{folder}/spill")
        connection = open_database(settings, threads=1)
        try:
            yield Writers(connection)
        finally:
            connection.close()


def results_page() -> str:
    """The whole page, the same each time."""

    with writers() as made:
        return "".join((_HEAD, *_groups(made))).rstrip("\n") + "\n"


def _groups(made: Writers) -> Iterator[str]:
    for title, values in VALUES.items():
        yield f"## {title}\n\n"
        yield "| SQL | type | JSON, NDJSON | CSV | Arrow | Parquet |\n|---|---|---|---|---|---|\n"
        for value in values:
            yield _line(_code(value), *_cells(made, f"SELECT {value} AS c"))
        yield "\n"


def _cells(made: Writers, sql: str) -> Iterator[str]:
    try:
        columns, body = made.body(sql, "json")
    except Refusal as refusal:
        yield from ("", f"refused: {_plain(refusal.failure.detail)}", *["as JSON"] * 3)
        return
    yield _code(columns[0][1])
    yield _json(made, sql, body)
    field = made.body(sql, "csv")[1].decode().removeprefix("c\n").removesuffix("\n")
    yield _code(field) if field else ""
    arrow = pa.ipc.open_stream(made.body(sql, "arrow")[1]).read_all()
    yield _column(arrow)
    try:
        parquet = pq.read_table(pa.BufferReader(made.body(sql, "parquet")[1]))
    except Refusal as refusal:
        yield f"refused: {_plain(refusal.failure.detail)}"
        return
    yield "as Arrow" if _column(parquet) == _column(arrow) else _column(parquet)


def _json(made: Writers, sql: str, body: bytes) -> str:
    text = _value(body)
    line = made.body(sql, "ndjson")[1].decode().splitlines()[0]
    if line != f'{{"c":{text}}}':
        raise AssertionError(f"NDJSON is told to hold the values of JSON: {line}, {text}")
    number = _value(made.body(sql, "json", integers="number")[1])
    return _code(text) if number == text else f"{_code(text)}, as number {_code(number)}"


def _value(body: bytes) -> str:
    json.loads(body)
    return body.decode().removeprefix("[[").removesuffix("]]")


def _column(table: pa.Table) -> str:
    column = table.column("c")
    return f"`{_type(column.type)}` {_code(_shown(column))}"


def _type(kind: pa.DataType) -> str:
    """Without the names of what has none in SQL."""

    if pa.types.is_map(kind):
        return f"map<{_type(kind.key_type)}, {_type(kind.item_type)}>"
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{_type(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list<{_type(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_type(field.type)}' for field in kind)}>"
    return str(kind)


def _shown(column: pa.ChunkedArray) -> str:
    """A value as pyarrow gives it, or the number inside when Python has nothing for it."""

    try:
        return repr(column.to_pylist()[0])
    except (OverflowError, ValueError):
        return str(column.cast(pa.int64() if column.type.bit_width == 64 else pa.int32())[0])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """Text that cannot end a cell of the table."""

    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.replace("|", "\\|"))


__all__: Sequence[str] = ("VALUES", "Writers", "results_page", "writers")
