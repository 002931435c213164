"""The scalar types of columns: their SQL spelling, their Arrow type, and the ranges they hold.

One table maps every accepted spelling to one canonical DuckDB name in lower case. The Arrow type
is the one that Parquet and DuckDB read back as that SQL type without a hint; for `uuid` that is
Arrow's own extension type (a bare 16-byte column would come back as BLOB).
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import types as pt

from lakebus.errors import SchemaInvalid

DECIMAL_PRECISION_MAX = 38
#: DuckDB's default for a bare `decimal`.
_DECIMAL_DEFAULT = (18, 3)
_TYPE_TEXT_MAX = 200


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


@dataclass(frozen=True, slots=True)
class ColumnType:
    """`sql`: canonical spelling; `arrow`: type of the column in batches and files.

    `bits`: width of integers and floats. `low` and `high`: inclusive range of integers.
    `precision` and `scale`: of decimals; zero elsewhere.
    """

    sql: str
    arrow: pa.DataType
    family: Family
    bits: int = 0
    low: int = 0
    high: int = 0
    precision: int = 0
    scale: int = 0

    @property
    def storage(self) -> pa.DataType:
        """The Arrow type of the buffers: `arrow` without its extension."""

        if isinstance(self.arrow, pa.BaseExtensionType):
            return self.arrow.storage_type
        return self.arrow

    @property
    def integer_text_allowed(self) -> bool:
        """True where JSON may spell the integer as a string: wider than a double is exact."""

        return self.family is Family.INTEGER and self.bits == 64


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

_DECIMAL = re.compile(r"(?:decimal|numeric|dec)(?: ?\( ?([0-9]{1,3}) ?(?:, ?([0-9]{1,3}) ?)?\))?")
_NESTED = re.compile(r"(?:struct|row|map|list|array|union)\b.*|.*\[ ?[0-9]* ?\]")
_SIZED_TEXT = re.compile(r"(?:varchar|text|string|char|bpchar|blob|bytea)\b ?\(.*\)")


@functools.lru_cache(maxsize=1024)
def parse_type(text: str) -> ColumnType:
    """The type named by `text`. Raises SchemaInvalid with what to write instead."""

    if len(text) > _TYPE_TEXT_MAX:
        raise SchemaInvalid("the name of the column type is too long")
    name = " ".join(text.lower().split())
    found = _SIMPLE.get(_ALIASES.get(name, name))
    if found is not None:
        return found
    decimal = _DECIMAL.fullmatch(name)
    if decimal:
        return _decimal(decimal, text)
    if _NESTED.fullmatch(name):
        raise SchemaInvalid(
            f"the type {text!r} is not supported yet: lists, structs, maps and unions cannot be "
            "columns for now; use json"
        )
    if _SIZED_TEXT.fullmatch(name):
        raise SchemaInvalid(
            f"the type {text!r} names a length, and lengths are not enforced; leave it out"
        )
    raise SchemaInvalid(
        f"{text!r} is not a column type; use one of {', '.join(sorted(_SIMPLE))}, decimal(p,s)"
    )


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


def type_of_arrow(arrow: pa.DataType) -> ColumnType:
    """The column type that holds every value of an Arrow type. Raises SchemaInvalid."""

    if isinstance(arrow, pa.JsonType):
        return _SIMPLE["json"]
    if isinstance(arrow, pa.UuidType):
        return _SIMPLE["uuid"]
    if isinstance(arrow, pa.BaseExtensionType):
        return type_of_arrow(arrow.storage_type)
    if pt.is_dictionary(arrow) or pt.is_run_end_encoded(arrow):
        return type_of_arrow(arrow.value_type)
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
