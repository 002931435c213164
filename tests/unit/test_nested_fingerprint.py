"""Payload identity of lists, structs and maps (contract A4): published vectors, and a second
implementation, straight from the words of `storage/rows/fingerprint.py`, value by value."""

from __future__ import annotations

import hashlib
import json
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import LakebusError
from lakebus.schemas import Column, TableSchema
from storage.rows.decode import JSON, decode_rows
from storage.rows.fingerprint import fingerprint, fingerprint_text
from storage.rows.segment import EntryPart
from storage.rows.types import NESTED, ColumnType, Family, parse_type, struct_type
from tests.unit.nested_values import nested_types, texts_of
from tests.unit.test_rows_fingerprint import slow_tag, slow_value

VECTORS = Path(__file__).parent.parent / "vectors" / "fingerprint_nested_v1.json"
CASES = json.loads(VECTORS.read_text("utf-8"))["cases"] if VECTORS.exists() else []
_TAGS = {Family.LIST: b"l", Family.STRUCT: b"r", Family.MAP: b"m"}


# --- the second implementation --------------------------------------------------------------------


def slow_fingerprint(tables: list[dict[str, Any]]) -> str:
    """As that of scalars, for one table."""

    out = hashlib.sha256(b"lakebus.payload.v1\0")
    (table,) = tables
    rows = table["rows"]
    out.update(b"T" + struct.pack("<QQ", table["table_id"], len(rows)))
    for place, column in enumerate(table["columns"]):
        values = [row[place] for row in rows]
        if any(value is not None for value in values):
            out.update(b"C" + struct.pack("<Q", column["id"]))
            out.update(_block(parse_type(column["type"]), values))
    out.update(b"E")
    return "v1:" + out.hexdigest()


def _block(kind: ColumnType, values: list[Any]) -> bytes:
    if all(value is None for value in values):
        return b"0\0"
    tag, parameter = (_TAGS[kind.family], 0) if kind.is_nested else slow_tag(kind.sql)
    head = tag + bytes([parameter])
    if None in values:
        head += b"\x01" + bytes(value is not None for value in values)
    else:
        head += b"\x00"
    match kind.family:
        case Family.LIST:
            items = [item for value in values for item in value or ()]
            return head + _lengths(values) + _block(kind.children[0], items)
        case Family.MAP:
            maps = [None if v is None else _sorted(kind.children[0], _pairs(v)) for v in values]
            pairs = [pair for one in maps for pair in one or ()]
            parts = (_block(c, [p[n] for p in pairs]) for n, c in enumerate(kind.children))
            return head + _lengths(maps) + b"".join(parts)
        case Family.STRUCT:
            return head + _fields(kind, values)
    items = [slow_value(kind.sql, value) for value in values]
    lengths = b"".join(struct.pack("<I", len(i)) for i in items) if tag in b"sx" else b""
    return head + lengths + b"".join(items)


def _lengths(values: list[Any]) -> bytes:
    return b"".join(struct.pack("<I", len(value or ())) for value in values)


def _fields(kind: ColumnType, values: list[Any]) -> bytes:
    out = []
    for name, child in sorted(zip(kind.names, kind.children, strict=True), key=lambda f: f[0]):
        field = [None if value is None else value.get(name) for value in values]
        if any(value is not None for value in field):
            out.append(bytes([len(name)]) + name.encode() + _block(child, field))
    return struct.pack("<H", len(out)) + b"".join(out)


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [(pair["key"], pair.get("value")) for pair in value]


def _sorted(key: ColumnType, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    def order(pair: tuple[Any, Any]) -> Any:
        if key.family in (Family.INTEGER, Family.DECIMAL):
            return Decimal(str(pair[0]))
        if key.family is Family.FLOAT:
            number = float(str(pair[0]).replace("Infinity", "inf"))
            return (number != number, number)
        if key.family in (Family.VARCHAR, Family.BLOB, Family.UUID, Family.BOOLEAN):
            return slow_value(key.sql, pair[0])
        return int.from_bytes(slow_value(key.sql, pair[0]), "little", signed=True)

    return sorted(pairs, key=order)


# --- vectors --------------------------------------------------------------------------------------


def parts_of(table: dict[str, Any]) -> list[EntryPart]:
    columns = tuple(Column(c["id"], f"c{c['id']}", c["type"]) for c in table["columns"])
    schema = TableSchema(table["table_id"], "t", 1, columns)
    rows = [dict(zip((c.name for c in columns), row, strict=True)) for row in table["rows"]]
    body = json.dumps(rows).replace('"j": "[1]"', '"j": [1]').encode()
    return [EntryPart(table["table_id"], 1, decode_rows(schema, JSON, body, rows_max=99).batch)]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_A4_published_vectors_of_nested_values(case: dict[str, Any]) -> None:
    (table,) = case["tables"]
    assert fingerprint_text(fingerprint(parts_of(table))) == case["fingerprint"]
    assert slow_fingerprint(case["tables"]) == case["fingerprint"]


def test_A4_nested_vectors_cover_the_types_and_differ_where_they_say() -> None:
    kinds = [parse_type(c["type"]) for case in CASES for t in case["tables"] for c in t["columns"]]
    assert {kind.family for kind in kinds} >= NESTED
    groups: dict[str, set[str]] = {}
    for case in CASES:
        groups.setdefault(case["fingerprint"], set()).add(case["same_as"] or case["name"])
    assert all(len(names) == 1 for names in groups.values()), groups
    assert len(groups) == sum(not case["same_as"] for case in CASES)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_A4_the_order_of_a_map_and_of_fields_never_enters(data: st.DataObject) -> None:
    kind = data.draw(nested_types(2))
    schema = TableSchema(1, "t", 1, (Column(1, "c", kind.sql),))
    texts = data.draw(st.lists(texts_of(kind), min_size=1, max_size=4))
    digests = set()
    for flip in (False, True):
        rows = ",".join(f'{{"c":{_written(kind, _read(text), flip=flip)}}}' for text in texts)
        try:
            body = f"[{rows}]".encode("utf-8", "surrogatepass")
            batch = decode_rows(schema, JSON, body, rows_max=9).batch
        except LakebusError:
            return
        digests.add(fingerprint([EntryPart(1, 1, batch)]))
    assert len(digests) == 1


class _Number(str):
    """A number as it is written."""

    __slots__ = ()


class _Object(list[tuple[str, Any]]):
    """The members of an object, in their order."""


def _read(text: str) -> Any:
    return json.loads(text, parse_int=_Number, parse_float=_Number, object_pairs_hook=_Object)


def _written(kind: ColumnType | None, value: Any, *, flip: bool) -> str:
    """JSON text; with the fields of every struct and the pairs of every map from last to first.
    Documents of json, of which the order enters, have no type inside."""

    if isinstance(value, _Object):
        members = value[::-1] if flip and kind is not None and kind.is_nested else value
        inside = ((name, _written(_child(kind, name), v, flip=flip)) for name, v in members)
        return "{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in inside) + "}"
    if isinstance(value, list):
        if kind is not None and kind.family is Family.MAP:
            pair = struct_type(("key", "value"), kind.children)
            items = [_written(pair, item, flip=flip) for item in value]
            return "[" + ",".join(items[::-1] if flip else items) + "]"
        child = kind.children[0] if kind is not None and kind.is_nested else None
        return "[" + ",".join(_written(child, item, flip=flip) for item in value) + "]"
    return str(value) if isinstance(value, _Number) else json.dumps(value)


def _child(kind: ColumnType | None, name: str) -> ColumnType | None:
    if kind is None or not kind.is_nested:
        return None
    if kind.family is Family.MAP:
        return kind.children[1]
    return dict(zip(kind.names, kind.children, strict=False)).get(name.lower())
