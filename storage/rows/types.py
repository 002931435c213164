"""The types of columns: their SQL spelling, their Arrow type, and the ranges they hold.

One table maps every accepted spelling to one canonical DuckDB name in lower case. The Arrow type
is the one that Parquet and DuckDB read back as that SQL type without a hint; for `uuid` that is
Arrow's own extension type (a bare 16-byte column would come back as BLOB).

Lists, structs and maps are made of other types, `children`. One recursive description serves all
who read, write, hash and check values; a scalar has no children. What is inside a nested type never
changes once a table has it, so its fields need no ids: they are known by name.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import types as pt

from lakebus.errors import SchemaInvalid
from lakebus.schemas import fold_name
from storage.rows.type_text import (
    DEPTH_MAX,
    LEAVES_MAX,
    TYPE_TEXT_MAX,
    ListText,
    MapText,
    StructText,
    TypeText,
    read_type,
)

DECIMAL_PRECISION_MAX = 38
#: DuckDB's default for a bare `decimal`.
_DECIMAL_DEFAULT = (18, 3)
_TYPE_TEXT_SHOWN = 80


class Family(enum.Enum):
    """What kind of value a type holds; one rule set each for decoding and for hashing."""

    BOOLEAN = "boolean"
    INTEGER = "integer"
    FLOAT = "float"
    DECIMAL = "decimal"
    VARCHAR = "varchar"
    BLOB = "blob"
    DATE = "date"
    TIME = "time"
    TIMESTAMP = "timestamp"
    TIMESTAMPTZ = "timestamptz"
    UUID = "uuid"
    JSON = "json"
    LIST = "list"
    STRUCT = "struct"
    MAP = "map"


NESTED = frozenset({Family.LIST, Family.STRUCT, Family.MAP})
SCALARS = frozenset(Family) - NESTED


@dataclass(frozen=True, slots=True)
class ColumnType:
    """`sql`: canonical spelling; `arrow`: type of the column in batches and files.

    `bits`: width of integers and floats. `low` and `high`: inclusive range of integers.
    `precision` and `scale`: of decimals; zero elsewhere. `children`: a list's element, a struct's
    fields as declared with their `names`, a map's key and value; nothing for scalars.
    """

    sql: str
    arrow: pa.DataType
    family: Family
    bits: int = 0
    low: int = 0
    high: int = 0
    precision: int = 0
    scale: int = 0
    children: tuple[ColumnType, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def storage(self) -> pa.DataType:
        """The Arrow type of a scalar's buffers: `arrow` without its extension."""

        if isinstance(self.arrow, pa.BaseExtensionType):
            return self.arrow.storage_type
        return self.arrow

    @property
    def integer_text_allowed(self) -> bool:
        """True where JSON may spell the integer as a string: wider than a double is exact."""

        return self.family is Family.INTEGER and self.bits == 64

    @property
    def is_nested(self) -> bool:
        return bool(self.children)


def _integer(sql: str, bits: int, *, signed: bool) -> ColumnType:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    arrow = getattr(pa, f"{'' if signed else 'u'}int{bits}")()
    return ColumnType(sql, arrow, Family.INTEGER, bits=bits, low=low, high=high)


_SIMPLE: dict[str, ColumnType] = {
    kind.sql: kind
    for kind in (
        ColumnType("boolean", pa.bool_(), Family.BOOLEAN),
        _integer("tinyint", 8, signed=True),
        _integer("smallint", 16, signed=True),
        _integer("integer", 32, signed=True),
        _integer("bigint", 64, signed=True),
        _integer("utinyint", 8, signed=False),
        _integer("usmallint", 16, signed=False),
        _integer("uinteger", 32, signed=False),
        _integer("ubigint", 64, signed=False),
        ColumnType("float", pa.float32(), Family.FLOAT, bits=32),
        ColumnType("double", pa.float64(), Family.FLOAT, bits=64),
        ColumnType("varchar", pa.string(), Family.VARCHAR),
        ColumnType("blob", pa.binary(), Family.BLOB),
        ColumnType("date", pa.date32(), Family.DATE),
        ColumnType("time", pa.time64("us"), Family.TIME),
        ColumnType("timestamp", pa.timestamp("us"), Family.TIMESTAMP),
        ColumnType("timestamptz", pa.timestamp("us", "UTC"), Family.TIMESTAMPTZ),
        ColumnType("uuid", pa.uuid(), Family.UUID),
        ColumnType("json", pa.string(), Family.JSON),
    )
}

#: Other spellings that DuckDB 2.0 takes for the same types.
_ALIASES = {
    "bool": "boolean",
    "logical": "boolean",
    "int1": "tinyint",
    "int2": "smallint",
    "int16": "smallint",
    "short": "smallint",
    "int": "integer",
    "int4": "integer",
    "int32": "integer",
    "signed": "integer",
    "int8": "bigint",
    "int64": "bigint",
    "long": "bigint",
    "uint8": "utinyint",
    "uint16": "usmallint",
    "uint32": "uinteger",
    "uint64": "ubigint",
    "real": "float",
    "float4": "float",
    "float8": "double",
    "double precision": "double",
    "text": "varchar",
    "string": "varchar",
    "char": "varchar",
    "bpchar": "varchar",
    "bytea": "blob",
    "binary": "blob",
    "varbinary": "blob",
    "datetime": "timestamp",
    "timestamp without time zone": "timestamp",
    "timestamp with time zone": "timestamptz",
    "time without time zone": "time",
    "guid": "uuid",
}

#: Words that DuckDB reads as the name of a field only in quotes; a test asks it.
_RESERVED_WORDS = (
    "all analyse analyze and anti any array as asc asof asymmetric at authorization binary both "
    "by case cast check collate collation column concurrently constraint create cross default "
    "deferrable desc describe distinct do else end except false fetch for foreign freeze from "
    "full glob group having ilike in initially inner intersect into is isnull join lambda "
    "lateral leading left like limit natural not notnull null offset on only or order outer "
    "overlaps pivot pivot_longer pivot_wider placing positional primary qualify references "
    "returning right select semi show similar some summarize symmetric table tablesample then "
    "to trailing true union unique unpack unpivot using variadic verbose when where window with "
)
_RESERVED = frozenset(_RESERVED_WORDS.split())

_DECIMAL = re.compile(r"(?:decimal|numeric|dec)(?: ?\( ?([0-9]{1,3}) ?(?:, ?([0-9]{1,3}) ?)?\))?")
_NESTED = re.compile(r"(?:struct|row|map|list|array|union|enum)\b.*|.*\[.*", re.DOTALL)
_SIZED_TEXT = re.compile(r"(?:varchar|text|string|char|bpchar|blob|bytea)\b ?\(.*\)")


@functools.lru_cache(maxsize=1024)
def parse_type(text: str) -> ColumnType:
    """The type named by `text`. Raises SchemaInvalid with what to write instead."""

    if len(text) > TYPE_TEXT_MAX:
        raise SchemaInvalid("the name of the column type is too long")
    name = " ".join(text.lower().split())
    found = _SIMPLE.get(_ALIASES.get(name, name))
    if found is not None:
        return found
    decimal = _DECIMAL.fullmatch(name)
    if decimal:
        return _decimal(decimal, text)
    if _NESTED.fullmatch(name):
        return _made(read_type(text))
    if _SIZED_TEXT.fullmatch(name):
        raise SchemaInvalid(
            f"the type {_shown(text)} names a length, and lengths are not enforced; leave it out"
        )
    raise SchemaInvalid(
        f"{_shown(text)} is not a column type; use one of {', '.join(sorted(_SIMPLE))}, "
        "decimal(p,s), or a list, struct or map of them: integer[], struct(a integer, b varchar), "
        "map(varchar, integer)"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _TYPE_TEXT_SHOWN else text[:_TYPE_TEXT_SHOWN] + "…")


def _made(written: TypeText) -> ColumnType:
    match written:
        case ListText():
            return list_type(_made(written.element))
        case StructText():
            return struct_type(written.names, [_made(one) for one in written.types])
        case MapText():
            return map_type(_made(written.key), _made(written.value))
        case _:
            return parse_type(written)


def decimal_type(precision: int, scale: int) -> ColumnType:
    """decimal(precision, scale). Raises SchemaInvalid outside 1..38 and 0..precision."""

    if not 1 <= precision <= DECIMAL_PRECISION_MAX or not 0 <= scale <= precision:
        raise SchemaInvalid(
            f"decimal({precision},{scale}) is not possible: the precision goes from 1 to "
            f"{DECIMAL_PRECISION_MAX} and the scale from 0 to the precision"
        )
    return ColumnType(
        f"decimal({precision},{scale})",
        pa.decimal128(precision, scale),
        Family.DECIMAL,
        precision=precision,
        scale=scale,
    )


def list_type(element: ColumnType) -> ColumnType:
    """A list of any length; elements may be null."""

    return ColumnType(f"{element.sql}[]", pa.list_(element.arrow), Family.LIST, children=(element,))


def struct_type(names: Sequence[str], types: Sequence[ColumnType]) -> ColumnType:
    """Fields in this order, under folded names that differ; each may be null."""

    fields = [f"{spelled_name(name)} {kind.sql}" for name, kind in zip(names, types, strict=True)]
    return ColumnType(
        f"struct({', '.join(fields)})",
        pa.struct([(name, kind.arrow) for name, kind in zip(names, types, strict=True)]),
        Family.STRUCT,
        children=tuple(types),
        names=tuple(names),
    )


def map_type(key: ColumnType, value: ColumnType) -> ColumnType:
    """Keys are never null and differ; values may be null. Raises SchemaInvalid for keys that have
    no order."""

    if key.is_nested or key.family is Family.JSON:
        raise SchemaInvalid(
            f"{key.sql} cannot be the key of a map: keys are of a scalar type other than json"
        )
    return ColumnType(
        f"map({key.sql}, {value.sql})",
        pa.map_(key.arrow, value.arrow),
        Family.MAP,
        children=(key, value),
    )


def with_leaves(kind: ColumnType, leaf: Callable[[ColumnType], str]) -> str:
    """The SQL text of a type of this shape whose scalars are spelled by `leaf`."""

    match kind.family:
        case Family.LIST:
            return f"{with_leaves(kind.children[0], leaf)}[]"
        case Family.MAP:
            return f"map({', '.join(with_leaves(child, leaf) for child in kind.children)})"
        case Family.STRUCT:
            fields = zip(kind.names, kind.children, strict=True)
            inside = (f"{spelled_name(name)} {with_leaves(child, leaf)}" for name, child in fields)
            return f"struct({', '.join(inside)})"
        case _:
            return leaf(kind)


def leaves_of(kind: ColumnType) -> int:
    """How many scalars are in a type."""

    return sum(map(leaves_of, kind.children)) if kind.children else 1


def spelled_name(name: str) -> str:
    """The name of a field in the text of a type, which DuckDB must be able to read."""

    return f'"{name}"' if name in _RESERVED else name


def duckdb_spelling(kind: ColumnType) -> str:
    """A type as DuckDB's lists and DESCRIBE spell it."""

    match kind.family:
        case Family.TIMESTAMPTZ:
            return "TIMESTAMP WITH TIME ZONE"
        case Family.LIST:
            return f"{duckdb_spelling(kind.children[0])}[]"
        case Family.MAP:
            return f"MAP({', '.join(map(duckdb_spelling, kind.children))})"
        case Family.STRUCT:
            fields = zip(kind.names, kind.children, strict=True)
            inside = (f"{spelled_name(name)} {duckdb_spelling(child)}" for name, child in fields)
            return f"STRUCT({', '.join(inside)})"
        case _:
            return kind.sql.upper()


def type_of_arrow(arrow: pa.DataType) -> ColumnType:
    """The column type that holds every value of an Arrow type. Raises SchemaInvalid."""

    found = _type_of_arrow(arrow, 0)
    if leaves_of(found) > LEAVES_MAX:
        raise SchemaInvalid(f"the type of a column has at most {LEAVES_MAX} scalars in it")
    return found


def _type_of_arrow(arrow: pa.DataType, depth: int) -> ColumnType:
    if is_list(arrow) or pt.is_map(arrow) or pt.is_struct(arrow):
        if depth == DEPTH_MAX:
            raise SchemaInvalid(f"types are nested at most {DEPTH_MAX} deep")
        return _nested_of_arrow(arrow, depth + 1)
    if isinstance(arrow, pa.BaseExtensionType) and pt.is_nested(arrow.storage_type):
        return _type_of_arrow(arrow.storage_type, depth)
    return _scalar_of_arrow(arrow)


def is_list(arrow: pa.DataType) -> bool:
    """The layouts of lists that ingest takes."""

    return bool(pt.is_list(arrow) or pt.is_large_list(arrow) or pt.is_fixed_size_list(arrow))


def _nested_of_arrow(arrow: pa.DataType, depth: int) -> ColumnType:
    if pt.is_map(arrow):
        return map_type(
            _type_of_arrow(arrow.key_type, depth), _type_of_arrow(arrow.item_type, depth)
        )
    if not pt.is_struct(arrow):
        return list_type(_type_of_arrow(arrow.value_type, depth))
    names = [fold_name(field.name) for field in arrow]
    if not names:
        raise SchemaInvalid("a struct without fields cannot be the type of a column")
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise SchemaInvalid(f"the struct has two fields named {double} (names fold to lower case)")
    return struct_type(names, [_type_of_arrow(field.type, depth) for field in arrow])


def _scalar_of_arrow(arrow: pa.DataType) -> ColumnType:
    if isinstance(arrow, pa.JsonType):
        return _SIMPLE["json"]
    if isinstance(arrow, pa.UuidType):
        return _SIMPLE["uuid"]
    if isinstance(arrow, pa.BaseExtensionType):
        return _scalar_of_arrow(arrow.storage_type)
    if pt.is_dictionary(arrow) or pt.is_run_end_encoded(arrow):
        return _scalar_of_arrow(arrow.value_type)
    if pt.is_decimal(arrow):
        return decimal_type(arrow.precision, arrow.scale)
    for is_type, name in _ARROW_NAMES:
        if is_type(arrow):
            return _SIMPLE[name]
    by_storage = next((kind for kind in _SIMPLE.values() if kind.arrow == arrow), None)
    if by_storage is None:
        raise SchemaInvalid(f"Arrow type {arrow} cannot be the type of a column")
    return by_storage


#: Arrow types of which several become one column type; the others are their own in `_SIMPLE`.
_ARROW_NAMES: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pt.is_float16, "float"),
    (pt.is_string, "varchar"),
    (pt.is_large_string, "varchar"),
    (pt.is_string_view, "varchar"),
    (pt.is_binary, "blob"),
    (pt.is_large_binary, "blob"),
    (pt.is_binary_view, "blob"),
    (pt.is_fixed_size_binary, "blob"),
    (pt.is_date, "date"),
    (pt.is_time, "time"),
    (lambda arrow: pt.is_timestamp(arrow) and arrow.tz is None, "timestamp"),
    (pt.is_timestamp, "timestamptz"),
)


def _decimal(match: re.Match[str], text: str) -> ColumnType:
    if match[1] is None:
        return decimal_type(*_DECIMAL_DEFAULT)
    return decimal_type(int(match[1]), int(match[2] or 0))
