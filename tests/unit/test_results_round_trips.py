"""Whatever DuckDB has, a reader gets from each of the five forms of an answer: no digit, no sign,
no null and no empty text is lost on the way, and ingest reads it back (http-api.md)."""

from __future__ import annotations

import datetime as dt
import json
import math
import struct
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.results_page import Writers, writers
from lakebus.client_types import SqlType, parse_type
from lakebus.client_values import load_rows, python_rows
from lakebus.schemas import Column, TableSchema
from storage.rows.decode import ARROW_STREAM, CSV, NDJSON, PARQUET, decode_rows


@pytest.fixture(scope="module")
def made() -> Iterator[Writers]:
    with writers() as opened:
        yield opened


# --- values --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """A SQL type, its values in Python, and how SQL writes one."""

    sql: str
    values: st.SearchStrategy[Any]
    literal: Callable[[Any], str]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _scalar(sql: str, values: st.SearchStrategy[Any], text: Callable[[Any], str] = str) -> Kind:
    return Kind(sql, values, lambda value: f"CAST({_quoted(text(value))} AS {sql})")


def _integers(sql: str, bits: int, *, signed: bool = True) -> Kind:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return _scalar(sql, st.integers(low, high) | st.sampled_from([low, high, 0]))


def _decimal(precision: int, scale: int) -> Kind:
    most = 10**precision - 1
    numbers = st.integers(-most, most) | st.sampled_from([0, 1, -1, most])
    return _scalar(
        f"DECIMAL({precision},{scale})",
        numbers.map(lambda n: Decimal(f"{n}E-{scale}")),
        lambda value: format(value, "f"),
    )


_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
_TEXTS = _TEXT | st.sampled_from(
    ["", " ", '"', "\\", "a,b", "\n", "\r\n", "NULL", "null", "é\u2028"]
)
_TIMES = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30))  # noqa: DTZ001
SCALARS = [
    _scalar("BOOLEAN", st.booleans()),
    _integers("TINYINT", 8),
    _integers("INTEGER", 32),
    _integers("BIGINT", 64),
    _integers("UBIGINT", 64, signed=False),
    _integers("HUGEINT", 128),
    _scalar("FLOAT", st.floats(width=32), repr),
    _scalar("DOUBLE", st.floats(), repr),
    _decimal(9, 2),
    _decimal(38, 10),
    _decimal(5, 5),
    _scalar("VARCHAR", _TEXTS),
    _scalar("JSON", _TEXTS.map(lambda text: json.dumps([text, 1.5], separators=(",", ":")))),
    _scalar("BLOB", st.binary(max_size=7), lambda raw: "".join(f"\\x{byte:02X}" for byte in raw)),
    _scalar("UUID", st.uuids()),
    _scalar("DATE", st.dates()),
    _scalar("TIME", st.times()),
    _scalar("TIMESTAMP", _TIMES, lambda at: at.isoformat(" ")),
    _scalar("TIMESTAMPTZ", _TIMES.map(lambda at: at.replace(tzinfo=dt.UTC)), str),
]


def literal(kind: Kind, value: Any) -> str:
    return f"CAST(NULL AS {kind.sql})" if value is None else kind.literal(value)


def _list(item: Kind) -> Kind:
    sql = f"{item.sql}[]"

    def write(values: list[Any]) -> str:
        return f"CAST([{', '.join(literal(item, value) for value in values)}] AS {sql})"

    return Kind(sql, st.lists(st.none() | item.values, max_size=3), write)


def _struct(members: list[Kind], names: tuple[str, ...] = ("a", "B c", 'é"')) -> Kind:
    names = names[: len(members)]
    inner = ", ".join(
        '"' + name.replace('"', '""') + f'" {member.sql}'
        for name, member in zip(names, members, strict=True)
    )
    sql = f"STRUCT({inner})"

    def write(value: dict[str, Any]) -> str:
        parts = (literal(member, value[name]) for name, member in zip(names, members, strict=True))
        return f"CAST(row({', '.join(parts)}) AS {sql})"

    values = {name: st.none() | kind.values for name, kind in zip(names, members, strict=True)}
    return Kind(sql, st.fixed_dictionaries(values), write)


def _map(key: Kind, value: Kind) -> Kind:
    """Its values are pairs, for not all keys are keys of dicts."""

    sql = f"MAP({key.sql}, {value.sql})"
    pair = st.tuples(key.values, st.none() | value.values)

    def write(pairs: list[tuple[Any, Any]]) -> str:
        keys = ", ".join(literal(key, one) for one, _ in pairs)
        values = ", ".join(literal(value, one) for _, one in pairs)
        return f"CAST(MAP([{keys}], [{values}]) AS {sql})"

    unique = st.lists(pair, max_size=3, unique_by=lambda one: key.literal(one[0]))
    return Kind(sql, unique, write)


def _nested(scalars: list[Kind], struct: Callable[[list[Kind]], Kind]) -> st.SearchStrategy[Kind]:
    keys = [kind for kind in scalars if kind.sql not in ("FLOAT", "DOUBLE")]
    return st.recursive(
        st.sampled_from(scalars),
        lambda inner: st.one_of(
            inner.map(_list),
            st.lists(inner, min_size=1, max_size=3).map(struct),
            st.builds(_map, st.sampled_from(keys), inner),
        ),
        max_leaves=4,
    )


#: What queries can give.
KINDS = st.one_of(
    _nested(SCALARS, _struct),
    st.builds(_map, st.sampled_from(SCALARS[:4]).map(_list), st.sampled_from(SCALARS)),
)
#: What tables can have. Ingest takes what NDJSON has of json, a text, for a text.
STORED = _nested(
    [kind for kind in SCALARS if kind.sql not in ("HUGEINT", "JSON")],
    lambda members: _struct(members, ("a", "b", "c")),
) | st.sampled_from([kind for kind in SCALARS if kind.sql == "JSON"])


@dataclass(frozen=True, slots=True)
class Answer:
    kinds: tuple[Kind, ...]
    rows: list[tuple[Any, ...]]

    @property
    def sql(self) -> str:
        rows = ", ".join(
            "(" + ", ".join(literal(k, v) for k, v in zip(self.kinds, row, strict=True)) + ")"
            for row in self.rows
        )
        names = ", ".join(f"c{place}" for place in range(len(self.kinds)))
        return f"SELECT * FROM (VALUES {rows}) t({names})"


@st.composite
def answers(draw: st.DrawFn, kinds: st.SearchStrategy[Kind]) -> Answer:
    chosen = draw(st.lists(kinds, min_size=1, max_size=3))
    row = st.tuples(*[st.none() | kind.values for kind in chosen])
    return Answer(tuple(chosen), draw(st.lists(row, min_size=1, max_size=4)))


# --- comparing -----------------------------------------------------------------------------------


def same(kind: SqlType, value: Any) -> Any:
    """Equal for equal values of the type, however a reader holds them."""

    if value is None:
        return None
    match kind.name:
        case "list":
            return [same(kind.children[0], item) for item in value]
        case "struct":
            members = zip(kind.names, kind.children, strict=True)
            return {name: same(child, value[name]) for name, child in members}
        case "map":
            items = value.items() if isinstance(value, dict) else value
            return [tuple(map(same, kind.children, pair)) for pair in items]
        case "float" | "double" if math.isnan(value):
            return "NaN"
        case "float":  # its text has the digits that tell it from other floats, no more
            return struct.pack("f", value)
        case "double":
            return repr(value)
        case "decimal":
            return format(value, "f").removeprefix("-" if value == 0 else "")
        case "bigint" | "ubigint" | "hugeint":
            return int(value)
        case "uuid":
            return str(value)
    return value


def canonical(columns: tuple[tuple[str, str], ...], rows: Any) -> list[list[Any]]:
    kinds = [parse_type(kind) for _, kind in columns]
    return [[same(k, v) for k, v in zip(kinds, row, strict=True)] for row in rows]


# --- reading -------------------------------------------------------------------------------------


def csv_fields(text: str) -> list[list[str | None]]:
    """RFC 4180, with null for an empty field without quotes: no reader of Python's tells those."""

    rows: list[list[str | None]] = [[]]
    field, at = "", 0
    quoted = False
    while at < len(text):
        if text[at] == '"':
            end = text.index('"', at + 1)
            while text[end + 1 : end + 2] == '"':
                end = text.index('"', end + 2)
            field, quoted, at = text[at + 1 : end].replace('""', '"'), True, end + 1
        elif text[at] in ",\n":
            rows[-1].append(field if field or quoted else None)
            field, quoted = "", False
            if text[at] == "\n":
                rows.append([])
            at += 1
        else:
            field, at = field + text[at], at + 1
    assert rows.pop() == []
    return rows


def json_of(kind: SqlType, field: str | None) -> Any:
    """What the JSON form has for a field of CSV."""

    if field is None or kind.name not in ("boolean", "tinyint", "integer", "float", "double"):
        return json.loads(field) if field is not None and kind.children else field
    return field if field in ("NaN", "Infinity", "-Infinity") else json.loads(field)


def read_json(made: Writers, sql: str, integers: Any) -> list[tuple[Any, ...]]:
    columns, body = made.body(sql, "json", integers=integers)
    described = [{"name": name, "type": kind} for name, kind in columns]
    whole = b'{"columns":' + json.dumps(described).encode() + b',"rows":' + body + b"}"
    rows = (load_rows if integers == "number" else json.loads)(whole)["rows"]
    return python_rows(columns, rows)


def read_ndjson(made: Writers, sql: str) -> list[tuple[Any, ...]]:
    columns, body = made.body(sql, "ndjson")
    *lines, end = body.decode().removesuffix("\n").split("\n")
    assert json.loads(end) == {"complete": True, "row_count": len(lines)}
    return python_rows(columns, [list(json.loads(line).values()) for line in lines])


def read_csv(made: Writers, sql: str) -> list[tuple[Any, ...]]:
    columns, body = made.body(sql, "csv")
    header, *rows = csv_fields(body.decode())
    assert header == [name for name, _ in columns]
    kinds = [parse_type(kind) for _, kind in columns]
    fields = [[json_of(k, f) for k, f in zip(kinds, row, strict=True)] for row in rows]
    return python_rows(columns, fields)


def read_columns(table: pa.Table) -> list[tuple[Any, ...]]:
    table.validate(full=True)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


MANY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MANY
@given(answer=answers(KINDS))
def test_D8_every_form_gives_what_was_asked_for(made: Writers, answer: Answer) -> None:
    columns, stream = made.body(answer.sql, "arrow")
    wanted = canonical(columns, answer.rows)
    assert canonical(columns, read_columns(pa.ipc.open_stream(stream).read_all())) == wanted
    parquet = pq.read_table(pa.BufferReader(made.body(answer.sql, "parquet")[1]))
    assert canonical(columns, read_columns(parquet)) == wanted
    assert canonical(columns, read_json(made, answer.sql, "string")) == wanted
    assert canonical(columns, read_json(made, answer.sql, "number")) == wanted
    assert canonical(columns, read_ndjson(made, answer.sql)) == wanted
    assert canonical(columns, read_csv(made, answer.sql)) == wanted


@settings(parent=MANY, max_examples=20)
@given(answer=answers(STORED))
def test_A10_an_answer_is_ingested_again_as_it_was(made: Writers, answer: Answer) -> None:
    columns, ndjson = made.body(answer.sql, "ndjson")
    bodies = {
        NDJSON: ndjson[: ndjson.rindex(b"\n", 0, -1) + 1],
        CSV: made.body(answer.sql, "csv")[1],
        ARROW_STREAM: made.body(answer.sql, "arrow")[1],
        PARQUET: made.body(answer.sql, "parquet")[1],
    }
    schema = TableSchema(
        table_id=1,
        name="t",
        version=1,
        columns=tuple(Column(n, name, kind) for n, (name, kind) in enumerate(columns, start=1)),
    )
    if any(kind == "json" for _, kind in columns):
        del bodies[NDJSON]
    wanted = canonical(columns, answer.rows)
    for media_type, body in bodies.items():
        batch = decode_rows(schema, media_type, body, rows_max=9).batch
        rows = zip(*(batch.column(n).to_pylist() for n in range(len(columns))), strict=True)
        found = canonical(columns, [[_held(value) for value in row] for row in rows])
        assert found == [[_held(value) for value in row] for row in wanted], media_type


def _held(value: Any) -> Any:
    """Uuids are sixteen bytes where they are stored."""

    return str(value) if isinstance(value, uuid.UUID) else value
