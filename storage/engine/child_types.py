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
_BY_ID = frozenset(
    {"list", "array", "struct", "tuple", "map", "decimal", "enum", "union", "geometry"}
)
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
    "varchar": "text", "json": "text", "enum": "text", "geometry": "text", "type": "text",
    "union": "text", "variant": "text",
}  # fmt: skip
#: Numbers in JSON or strings, as `integers` says.
_WIDE = frozenset({"bigint", "ubigint"})
_NUMBER_TEXT = frozenset({"hugeint", "uhugeint", "bignum"})
#: What DuckDB's cast to text says whole, and Arrow has no faithful form of.
_ARROW_CASTS = dict.fromkeys(
    (*_NUMBER_TEXT, "bit", "timetz", "time_ns", "geometry", "enum", "type"), "VARCHAR"
) | {
    # Their text would not tell a number from a text, nor which member it is: their JSON does.
    "union": "JSON",
    "variant": "JSON",
}
#: What a type must be cast to before it is written, by carrier.
_CASTS = {
    "json": _ARROW_CASTS
    | {"interval": "VARCHAR", "timestamp_s": "TIMESTAMP", "timestamp_ms": "TIMESTAMP"}
    # Arrow's cast writes 0.0000001 as 1E-7.
    | {"decimal": "VARCHAR"},
    "arrow": _ARROW_CASTS,
    # Parquet's interval has milliseconds, DuckDB's has microseconds; and it has no seconds, of
    # which pyarrow would make milliseconds where they fit.
    "parquet": _ARROW_CASTS | {"interval": "VARCHAR", "timestamp_s": "TIMESTAMP"},
}
#: Types that can be written; all others are refused.
KNOWN = (
    frozenset(_SIMPLE_FORMS)
    | _WIDE
    | _NUMBER_TEXT
    | {"decimal", "list", "array", "struct", "tuple", "map"}
)
#: Keys of maps that are names of a JSON object. What is text only after a cast is none: two keys
#: could have one text.
_NAMES = frozenset({"varchar", "enum", "json"})
Carrier = Literal["json", "arrow", "parquet"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a column becomes JSON.

    `kind`: `plain` (text of the cast as it is), `text` (quoted, must be escaped), `quoted` (quoted,
    needs no escape), `fraction_plain` and `fraction_quoted` (decimals with nothing before the
    point), `float`, `blob`, `date`, `time`, `timestamp`, `timestamptz`, `list`, `struct`, `tuple`,
    `object` (a map by its keys), `pairs` (a map of other keys), `null`.
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
    if name in ("struct", "union"):
        members = ", ".join(f"{_label(n)} {spell(child)}" for n, child in _members(kind))
        return f"{name}({members})"
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


def _members(kind: DuckDBPyType) -> list[tuple[str, Any]]:
    """Of a struct or union; a union has its tag before them."""

    children = _children(kind)
    return children[1:] if kind.id == "union" else children


def is_fraction(kind: DuckDBPyType) -> bool:
    """True for decimals without digits before the point: DuckDB writes nothing there."""

    if kind.id != "decimal":
        return False
    parts = dict(_children(kind))
    return bool(parts["precision"] == parts["scale"])


def _label(name: str) -> str:
    return name if name.isidentifier() and name.islower() else quote_name(name)


def uncarried(kind: DuckDBPyType, *, carrier: Carrier) -> str | None:
    """The type, of `kind` or inside it, that cannot be written, or None."""

    name = type_id(kind)
    if name not in KNOWN:
        return spell(kind)
    if name not in ("list", "array", "struct", "tuple", "map"):
        return None
    children = [child for label, child in _children(kind) if label != "size"]
    if name == "struct" and not children and carrier == "parquet":
        return spell(kind)
    found = (uncarried(child, carrier=carrier) for child in children)
    return next((each for each in found if each is not None), None)


def export_cast(kind: DuckDBPyType, *, carrier: Carrier) -> str | None:
    """The SQL type a column must be cast to before it leaves DuckDB, or None. `carrier`: what its
    values are written in; CSV and NDJSON hold the texts of JSON."""

    wanted = _export_type(kind, carrier)
    return None if wanted == str(kind) else wanted


def _export_type(kind: DuckDBPyType, carrier: Carrier) -> str:
    name = type_id(kind)
    if name in _CASTS[carrier]:
        return _CASTS[carrier][name]
    if name not in ("list", "array", "struct", "tuple", "map"):
        return str(kind)
    parts = [(label, child) for label, child in _children(kind) if label != "size"]
    inner = [_export_type(child, carrier) for _, child in parts]
    if name == "map" and inner[0] == '"NULL"':  # of an empty map; Arrow's keys cannot be null
        inner[0] = "VARCHAR"
    if name == "array" and carrier == "json":
        return f"{inner[0]}[]"
    if all(wanted == str(child) for wanted, (_, child) in zip(inner, parts, strict=True)):
        return str(kind)
    if name in ("list", "array"):
        size = dict(_children(kind)).get("size")
        return f"{inner[0]}[{'' if size is None else size}]"
    if name == "struct":
        named = (f"{quote_name(n)} {wanted}" for (n, _), wanted in zip(parts, inner, strict=True))
        return f"STRUCT({', '.join(named)})"
    return f"{name.upper()}({', '.join(inner)})"


def json_form(kind: DuckDBPyType, *, integers: str) -> Form:
    """How values of this type are written; depends on nothing else (http-api.md)."""

    name = type_id(kind)
    if name in _WIDE or name in _NUMBER_TEXT or name == "decimal":
        fraction = "fraction_" if is_fraction(kind) else ""
        return Form(fraction + ("plain" if integers == "number" else "quoted"))
    if name in _SIMPLE_FORMS:
        return Form(_SIMPLE_FORMS[name])
    parts = [(label, child) for label, child in _children(kind) if label != "size"]
    forms = tuple(json_form(child, integers=integers) for _, child in parts)
    if name in ("list", "array"):
        return Form("list", forms)
    if name == "struct":
        return Form("struct", forms, tuple(label for label, _ in parts))
    if name == "map":
        return Form("object" if type_id(parts[0][1]) in _NAMES else "pairs", forms)
    return Form("tuple", forms)
