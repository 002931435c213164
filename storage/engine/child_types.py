"""SQL types of a result: how they are spelled, how they are exported, how JSON writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from duckdb.sqltypes import DuckDBPyType

from storage.engine.child_sandbox import quote_name

#: The words for types whose DuckDB id differs from the name that the API uses.
_SPELLED = {
    "timestamp with time zone": "timestamptz",
    "time with time zone": "timetz",
    '"null"': "null",
}
#: Types whose text holds more than their name.
_BY_ID = frozenset({"list", "array", "struct", "tuple", "map", "decimal", "enum", "union"})
#: Forms in JSON that a type's name decides alone.
_SIMPLE_FORMS = {
    "boolean": "plain", "tinyint": "plain", "smallint": "plain", "integer": "plain",
    "utinyint": "plain", "usmallint": "plain", "uinteger": "plain",
    "float": "float", "double": "float", "null": "null",
    "blob": "blob", "date": "date", "time": "time",
    "timestamp": "timestamp", "timestamp_s": "timestamp", "timestamp_ms": "timestamp",
    "timestamp_ns": "timestamp", "timestamptz": "timestamptz", "timestamptz_ns": "timestamptz",
    "uuid": "quoted", "interval": "quoted", "bit": "quoted", "timetz": "quoted",
    "time_ns": "quoted",
}  # fmt: skip
#: Numbers in JSON or strings, as `integers` says.
_WIDE = frozenset({"bigint", "ubigint"})
#: Written by DuckDB's own cast to text: Arrow has no faithful or no plain form of them.
_AS_TEXT = frozenset(
    {"hugeint", "uhugeint", "bignum", "interval", "bit", "timetz", "time_ns", "variant",
     "geometry", "union", "enum"}
)  # fmt: skip
_NUMBER_TEXT = frozenset({"hugeint", "uhugeint", "bignum"})
#: Arrow carries these exactly; only what it cannot carry is sent as text.
_ARROW_AS_TEXT = frozenset(
    {"uhugeint", "hugeint", "bignum", "bit", "timetz", "time_ns", "variant", "geometry", "union",
     "enum"}
)  # fmt: skip
_TEXTS = {
    "json": _AS_TEXT,
    "arrow": _ARROW_AS_TEXT,
    # Parquet's interval has milliseconds, DuckDB's has microseconds.
    "parquet": _ARROW_AS_TEXT | {"interval"},
}
Carrier = Literal["json", "arrow", "parquet"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a column becomes JSON.

    `kind`: `plain` (text of the cast as it is), `text` (quoted, must be escaped), `quoted` (quoted,
    needs no escape), `float`, `blob`, `date`, `time`, `timestamp`, `timestamptz`, `list`,
    `struct`, `tuple`, `map`, `null`.
    """

    kind: str
    children: tuple[Form, ...] = ()
    names: tuple[str, ...] = ()


def type_id(kind: DuckDBPyType) -> str:
    text = str(kind).lower()
    if kind.id in _BY_ID:
        return str(kind.id)
    return _SPELLED.get(text, text)


def _children(kind: DuckDBPyType) -> list[tuple[str, Any]]:
    return list(kind.children)


def spell(kind: DuckDBPyType) -> str:
    """The API's spelling: lower case words, names and values of the caller as they are."""

    name = type_id(kind)
    if name in ("list", "array"):
        size = dict(_children(kind)).get("size")
        return f"{spell(_children(kind)[0][1])}[{'' if size is None else size}]"
    if name == "struct":
        return "struct(" + ", ".join(f"{_label(n)} {spell(c)}" for n, c in _children(kind)) + ")"
    if name == "tuple":
        return "tuple(" + ", ".join(spell(child) for _, child in _children(kind)) + ")"
    if name == "map":
        return "map(" + ", ".join(spell(child) for _, child in _children(kind)) + ")"
    if name == "decimal":
        parts = dict(_children(kind))
        return f"decimal({parts['precision']},{parts['scale']})"
    if name == "enum":
        return "enum" + str(kind)[4:]
    return name


def _label(name: str) -> str:
    return name if name.isidentifier() and name.islower() else quote_name(name)


def export_cast(kind: DuckDBPyType, *, carrier: Carrier) -> str | None:
    """The SQL type a column must be cast to before it leaves DuckDB, or None. `carrier`: what its
    values are written in; CSV and NDJSON hold the texts of JSON."""

    wanted = _export_type(kind, _TEXTS[carrier], carrier == "json")
    return None if wanted == str(kind) else wanted


def _export_type(kind: DuckDBPyType, as_text: frozenset[str], json: bool) -> str:
    name = type_id(kind)
    if name in as_text:
        return "VARCHAR"
    if name in ("timestamp_s", "timestamp_ms") and json:
        return "TIMESTAMP"
    children = _children(kind) if name in ("list", "array", "struct", "map") else []
    if name in ("list", "array"):
        size = dict(children).get("size")
        if size is not None and not json:
            return f"{_export_type(children[0][1], as_text, json)}[{size}]"
        return f"{_export_type(children[0][1], as_text, json)}[]"
    if name == "struct":
        inner = (f"{quote_name(n)} {_export_type(c, as_text, json)}" for n, c in children)
        wanted = f"STRUCT({', '.join(inner)})"
        same = all(_export_type(c, as_text, json) == str(c) for _, c in children)
        return str(kind) if same else wanted
    if name == "tuple":
        same = all(_export_type(c, as_text, json) == str(c) for _, c in _children(kind))
        return str(kind) if same else "VARCHAR"
    if name == "map":
        return f"MAP({', '.join(_export_type(c, as_text, json) for _, c in children)})"
    return str(kind)


def json_form(kind: DuckDBPyType, *, integers: str) -> Form:
    """How values of this type are written; depends on nothing else (http-api.md)."""

    name = type_id(kind)
    if name in _WIDE or name in _NUMBER_TEXT or name == "decimal":
        return Form("plain" if integers == "number" else "quoted")
    if name in _SIMPLE_FORMS:
        return Form(_SIMPLE_FORMS[name])
    if name in ("list", "array"):
        return Form("list", (json_form(_children(kind)[0][1], integers=integers),))
    if name == "tuple":
        if export_cast(kind, carrier="json") is not None:
            return Form("text")
        return Form("tuple", tuple(json_form(c, integers=integers) for _, c in _children(kind)))
    if name == "struct":
        parts = _children(kind)
        forms = tuple(json_form(child, integers=integers) for _, child in parts)
        return Form("struct", forms, tuple(n for n, _ in parts))
    if name == "map":
        return Form("map", tuple(json_form(c, integers=integers) for _, c in _children(kind)))
    return Form("text")
