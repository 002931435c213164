"""Payload identity (contract A4): published vectors, an independent second implementation, and
everything that must not enter."""

# ruff: noqa: DTZ001, DTZ901 - values of columns without a zone are times without a zone

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import math
import struct
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.schemas import Column, TableSchema
from storage.rows.decode import decode_rows
from storage.rows.fingerprint import fingerprint, fingerprint_text
from storage.rows.segment import EntryPart, decode_single_entry, single_entry_segment
from storage.rows.types import SCALARS, parse_type

VECTORS = json.loads(
    (Path(__file__).parent.parent / "vectors" / "fingerprint_v1.json").read_text("utf-8")
)
CASES = VECTORS["cases"]


# --- the second implementation: straight from the words of the module, value by value ------------


def slow_fingerprint(tables: list[dict[str, Any]]) -> str:
    """`tables`: [{table_id, columns: [{id, type}], rows: [[JSON value, …], …]}], in any order."""

    out = hashlib.sha256(b"lakebus.payload.v1\0")
    for table in sorted(tables, key=lambda t: int(t["table_id"])):
        rows = table["rows"]
        if not rows:
            continue
        out.update(b"T" + struct.pack("<QQ", table["table_id"], len(rows)))
        places = sorted(range(len(table["columns"])), key=lambda i: table["columns"][i]["id"])
        for place in places:
            column = table["columns"][place]
            values = [row[place] for row in rows]
            if any(value is not None for value in values):
                out.update(slow_column(column["id"], column["type"], values))
    out.update(b"E")
    return "v1:" + out.hexdigest()


def slow_column(column_id: int, sql: str, values: list[Any]) -> bytes:
    tag, parameter = slow_tag(sql)
    head = b"C" + struct.pack("<Q", column_id) + tag + bytes([parameter])
    if None in values:
        head += b"\x01" + bytes(value is not None for value in values)
    else:
        head += b"\x00"
    items = [slow_value(sql, value) for value in values]
    if tag in b"sx":
        lengths = b"".join(struct.pack("<I", len(item)) for item in items)
        return head + lengths + b"".join(items)
    return head + b"".join(items)


def slow_tag(sql: str) -> tuple[bytes, int]:
    if sql.startswith("decimal"):
        return b"d", int(sql.rstrip(")").split(",")[1])
    return {
        "boolean": b"b",
        "ubigint": b"u",
        "float": b"f",
        "double": b"f",
        "varchar": b"s",
        "json": b"s",
        "blob": b"x",
        "date": b"D",
        "time": b"t",
        "timestamp": b"p",
        "timestamptz": b"z",
        "uuid": b"g",
    }.get(sql, b"i"), 0


def slow_value(sql: str, value: Any) -> bytes:
    tag, scale = slow_tag(sql)
    if value is None:
        return bytes({b"b": 1, b"s": 0, b"x": 0, b"d": 16, b"g": 16}.get(tag, 8))
    match tag:
        case b"b":
            return bytes([value])
        case b"i":
            return int(value).to_bytes(8, "little", signed=True)
        case b"u":
            return int(value).to_bytes(8, "little")
        case b"f":
            number = float(value.replace("Infinity", "inf") if isinstance(value, str) else value)
            if math.isnan(number):
                return struct.pack("<Q", 0x7FF8000000000000)
            if sql == "float":
                number = struct.unpack("<f", struct.pack("<f", number))[0]
            return struct.pack("<d", 0.0 if number == 0 else number)
        case b"d":
            sign, digits, exponent = Decimal(value).as_tuple()
            unscaled = int("".join(map(str, digits)) + "0" * (scale + int(exponent)))
            return (-unscaled if sign else unscaled).to_bytes(16, "little", signed=True)
        case b"s":
            return str(value).encode("utf-8")
        case b"x":
            return base64.b64decode(value)
        case b"g":
            return uuid.UUID(value).bytes
    return slow_time(tag, value)


def slow_time(tag: bytes, value: str) -> bytes:
    microsecond = dt.timedelta(microseconds=1)
    if tag == b"D":
        number = (dt.date.fromisoformat(value) - dt.date(1970, 1, 1)).days
    elif tag == b"t":
        clock = dt.time.fromisoformat(value)
        number = (dt.datetime.combine(dt.date.min, clock) - dt.datetime.min) // microsecond
    elif tag == b"p":
        number = (dt.datetime.fromisoformat(value) - dt.datetime(1970, 1, 1)) // microsecond
    else:
        epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
        number = (dt.datetime.fromisoformat(value) - epoch) // microsecond
    return number.to_bytes(8, "little", signed=True)


# --- from readable tables to batches, through the door -------------------------------------


def parts_of(tables: list[dict[str, Any]]) -> list[EntryPart]:
    parts = []
    for table in tables:
        columns = tuple(Column(c["id"], f"c{c['id']}", c["type"]) for c in table["columns"])
        schema = TableSchema(table["table_id"], "t", 1, columns)
        rows = [
            {
                column.name: json.loads(value) if column.type == "json" and value else value
                for column, value in zip(columns, row, strict=True)
            }
            for row in table["rows"]
        ]
        body = json.dumps(rows).encode()
        if rows:
            batch = decode_rows(schema, "application/json", body, rows_max=10_000).batch
            parts.append(EntryPart(schema.table_id, 1, batch))
    return parts


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_A4_published_vectors(case: dict[str, Any]) -> None:
    assert fingerprint_text(fingerprint(parts_of(case["tables"]))) == case["fingerprint"]
    assert slow_fingerprint(case["tables"]) == case["fingerprint"]


def test_A4_vectors_cover_every_type_and_differ_where_they_say() -> None:
    types = {
        c["type"].split("(")[0] for case in CASES for t in case["tables"] for c in t["columns"]
    }
    assert types == {family.value for family in SCALARS} - {"integer"} | {
        "tinyint",
        "smallint",
        "integer",
        "bigint",
        "utinyint",
        "usmallint",
        "uinteger",
        "ubigint",
        "double",
    }
    groups: dict[str, set[str]] = {}
    for case in CASES:
        groups.setdefault(case["fingerprint"], set()).add(case["same_as"] or case["name"])
    assert all(len(names) == 1 for names in groups.values()), groups
    distinct = {case["name"] for case in CASES if not case["same_as"]}
    assert len(groups) == len(distinct)


# --- what must not enter --------------------------------------------------------------------------

TEXTS = ["x", None, "", "é", "x"]


def hash_of(columns: dict[str, Any], table_id: int = 1) -> bytes:
    return fingerprint([EntryPart(table_id, 1, pa.record_batch(columns))])


def test_A4_absent_equals_null() -> None:
    plain = hash_of({"1": pa.array(TEXTS)})
    assert hash_of({"1": pa.array(TEXTS), "2": pa.nulls(5, pa.int64())}) == plain
    assert hash_of({"1": pa.array(TEXTS), "2": pa.nulls(5)}) == plain
    empty = pa.DictionaryArray.from_arrays(pa.array([0] * 5), pa.array([None], pa.string()))
    assert hash_of({"1": pa.array(TEXTS), "2": empty}) == plain


def test_A4_null_differs_from_empty_and_from_zero() -> None:
    assert hash_of({"1": pa.array(["a", None])}) != hash_of({"1": pa.array(["a", ""])})
    assert hash_of({"1": pa.array([1, None])}) != hash_of({"1": pa.array([1, 0])})
    assert hash_of({"1": pa.array([b"", b"a"])}) != hash_of({"1": pa.array([b"a", b""])})


def test_A4_one_zero_and_one_nan() -> None:
    assert hash_of({"1": pa.array([-0.0, 1.0])}) == hash_of({"1": pa.array([0.0, 1.0])})
    other = struct.unpack("<d", struct.pack("<Q", 0xFFF8000000000123))[0]
    assert hash_of({"1": pa.array([math.nan, 1.0])}) == hash_of({"1": pa.array([other, 1.0])})
    odd32 = pa.array([0x7FC00001, 0], pa.int32()).view(pa.float32())
    assert hash_of({"1": odd32}) == hash_of({"1": pa.array([math.nan, -0.0], pa.float32())})


def test_A4_row_order_and_count_enter() -> None:
    assert hash_of({"1": pa.array([1, 2])}) != hash_of({"1": pa.array([2, 1])})
    assert hash_of({"1": pa.nulls(2)}) != hash_of({"1": pa.nulls(3)})
    assert hash_of({"1": pa.array([1])}) != hash_of({"2": pa.array([1])})
    assert hash_of({"1": pa.array([1])}, 1) != hash_of({"1": pa.array([1])}, 2)


def test_A4_encodings_field_order_and_widths_do_not_enter() -> None:
    texts, numbers = pa.array(TEXTS), pa.array([1, 2, None, 4, 5])
    plain = hash_of({"1": texts, "2": numbers})
    assert hash_of({"2": numbers, "1": texts}) == plain
    assert hash_of({"1": texts.dictionary_encode(), "2": numbers.dictionary_encode()}) == plain
    assert hash_of({"1": texts.cast(pa.large_string()), "2": numbers.cast(pa.int16())}) == plain
    assert hash_of({"1": texts.cast(pa.string_view()), "2": numbers.cast(pa.uint8())}) == plain


def test_A4_timestamps_count_in_microseconds_of_utc() -> None:
    noon = pa.array([dt.datetime(2026, 1, 31, 12), None])
    plain = hash_of({"1": noon})
    assert hash_of({"1": noon.cast(pa.timestamp("s"))}) == plain
    zoned = noon.cast(pa.timestamp("us", "UTC"))
    assert hash_of({"1": zoned}) != plain
    assert hash_of({"1": zoned.cast(pa.timestamp("ns", "+05:30"))}) == hash_of({"1": zoned})


def test_A4_bytes_behind_a_null_do_not_enter() -> None:
    hidden = pa.Array.from_buffers(
        pa.string(),
        3,
        [
            pa.py_buffer(b"\x05"),
            pa.array([0, 1, 3, 4], pa.int32()).buffers()[1],
            pa.py_buffer(b"abbc"),
        ],
    )
    assert hidden.to_pylist() == ["a", None, "c"]
    assert hash_of({"1": hidden}) == hash_of({"1": pa.array(["a", None, "c"])})
    numbers = pa.Array.from_buffers(
        pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.array([1, 9]).buffers()[1]]
    )
    assert hash_of({"1": numbers}) == hash_of({"1": pa.array([1, None])})


def test_A4_parts_of_a_table_are_its_rows_in_order() -> None:
    first = pa.record_batch({"1": pa.array([1, 2]), "2": pa.array(["a", "b"])})
    second = pa.record_batch({"1": pa.array([3])})
    third = pa.record_batch({"1": pa.array([4]), "2": pa.array(["d"]).dictionary_encode()})
    whole = pa.record_batch({"1": pa.array([1, 2, 3, 4]), "2": pa.array(["a", "b", None, "d"])})
    split = [EntryPart(9, 1, batch) for batch in (first, second, first.slice(0, 0), third)]
    assert fingerprint(split) == fingerprint([EntryPart(9, 1, whole)])
    other = EntryPart(4, 1, first)
    assert fingerprint([other, *split]) == fingerprint([*split, other])


def test_a_type_that_no_column_has_is_refused() -> None:
    with pytest.raises(ValueError, match="not the type of a column"):
        hash_of({"1": pa.array([1], pa.duration("s"))})


# --- property: both implementations, over slices and round trips ----------------------------------

_VALUES = {
    "boolean": st.booleans(),
    "tinyint": st.integers(-128, 127),
    "uinteger": st.integers(0, 2**32 - 1),
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "ubigint": st.integers(0, 2**64 - 1),
    "double": st.one_of(
        st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["NaN", "-Infinity"])
    ),
    "float": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "decimal(9,3)": st.decimals(-(10**5), 10**5, places=3).map(str),
    "decimal(38,6)": st.decimals(-(10**15), 10**15, places=6).map(str),
    "varchar": st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    "blob": st.binary(max_size=6).map(lambda b: base64.b64encode(b).decode()),
    "date": st.dates().map(str),
    "time": st.times().map(str),
    "timestamp": st.datetimes().map(lambda d: d.isoformat()),
    "timestamptz": st.datetimes().map(lambda d: d.isoformat() + "+00:00"),
    "uuid": st.uuids().map(str),
}

_TYPES = sorted(_VALUES)


@st.composite
def readable_tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    tables = []
    for table_id in draw(st.lists(st.integers(1, 2**63), min_size=1, max_size=2, unique=True)):
        ids = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
        columns: list[dict[str, Any]] = []
        for column_id in ids:
            columns.append({"id": column_id, "type": draw(st.sampled_from(_TYPES))})
        row = st.tuples(*(st.one_of(st.none(), _VALUES[c["type"]]) for c in columns))
        rows = draw(st.lists(row.map(list), min_size=1, max_size=12))
        tables.append({"table_id": table_id, "columns": columns, "rows": rows})
    return tables


@settings(max_examples=120, deadline=None)
@given(readable_tables(), st.integers(0, 12))
def test_A4_equals_the_slow_implementation(tables: list[dict[str, Any]], cut: int) -> None:
    parts = parts_of(tables)
    wanted = slow_fingerprint(tables)
    assert fingerprint_text(fingerprint(parts)) == wanted
    halves = []
    for part in parts:
        for piece in (part.batch.slice(0, cut), part.batch.slice(cut)):
            halves.append(EntryPart(part.table_id, 1, piece))
    assert fingerprint_text(fingerprint(halves)) == wanted
    stored = decode_single_entry(single_entry_segment(halves))
    assert fingerprint_text(fingerprint(stored)) == wanted


def test_every_type_has_a_form() -> None:
    for sql in [*_VALUES, "json", "integer", "smallint", "utinyint", "usmallint"]:
        kind = parse_type(sql)
        batch = pa.record_batch({"1": pa.nulls(1, kind.arrow)})
        assert len(fingerprint([EntryPart(1, 1, batch)])) == 32
