"""Catalog statistics: null count and bounds of each column of a data file, as canonical text.

The bounds are what pruning trusts (contract D11), so they are bounds in DuckDB's order for the
column's type, and where that cannot be said for certain, no bound is claimed:

============  =========================================  =====================================
family        text                                       order, and when there is no bound
============  =========================================  =====================================
boolean       ``false`` ``true``                         false first
integer       decimal digits                             numeric
decimal       decimal digits, all places of the scale    numeric
float         shortest text that reads back as the       numeric, ``-0.0`` is written ``0.0``;
              same double; ``inf`` ``-inf``              a NaN anywhere: none
varchar       the text                                   bytewise UTF-8; cut as said below
blob          lower-case hexadecimal                     bytewise; cut as said below
date          ``YYYY-MM-DD``                             none outside the years 1 to 9999
time          microseconds since midnight                numeric
timestamp,    microseconds since 1970-01-01 UTC,         numeric
timestamptz   floor for the minimum, ceiling for the
              maximum
uuid          canonical lower-case text                  as 128-bit number, without sign
json, list,   (none)                                     never a bound
struct, map
============  =========================================  =====================================

Text and blobs longer than 64 bytes are cut: a cut minimum is a prefix (not greater than the value),
a cut maximum is the prefix with its last character raised by one (greater than everything that
begins with the prefix), or none when no character can be raised. Text is also cut before a NUL,
which PostgreSQL can store neither in text nor in jsonb.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from lakebus.schemas import TableSchema
from lakebus.snapshots import ColumnStatistics
from storage.rows.types import NESTED, ColumnType, Family, parse_type

BOUND_BYTES_MAX: Final = 64
#: Families whose values have no bounds, here and in the footers of files.
UNBOUNDED: Final = NESTED | {Family.JSON}

_EPOCH_ORDINAL = dt.date(1970, 1, 1).toordinal()
_DATE_DAYS_MIN = dt.date.min.toordinal() - _EPOCH_ORDINAL
_DATE_DAYS_MAX = dt.date.max.toordinal() - _EPOCH_ORDINAL
_UNITS_PER_MICROSECOND = {"us": (1, 1), "ns": (1, 1000), "ms": (1000, 1), "s": (1_000_000, 1)}

_min_max = pc.get_function("min_max")
_Text = Callable[[Any], str | None]


def column_statistics(kind: ColumnType, column: pa.Array | pa.ChunkedArray) -> ColumnStatistics:
    """Null count and bounds of one column; `column` has the Arrow type of `kind`."""

    null_count: int = column.null_count
    if kind.family in UNBOUNDED or null_count == len(column):
        return ColumnStatistics(null_count)
    if kind.family is Family.FLOAT and has_nan(column):
        return ColumnStatistics(null_count)
    if isinstance(column.type, pa.BaseExtensionType):
        column = storage_of(column)
    bounds = _min_max.call([column])
    lower, upper = _TEXTS[kind.family]
    return ColumnStatistics(null_count, lower(bounds["min"]), upper(bounds["max"]))


def table_statistics(
    schema: TableSchema, columns: Mapping[int, pa.Array | pa.ChunkedArray]
) -> dict[int, ColumnStatistics]:
    """Statistics by column id of those columns of the schema that are present."""

    return {
        column.column_id: column_statistics(parse_type(column.type), columns[column.column_id])
        for column in schema.columns
        if column.column_id in columns
    }


def has_nan(column: pa.Array | pa.ChunkedArray) -> bool:
    """True when a float column holds a NaN."""

    return pc.any(pc.is_nan(column)).as_py() is True


def storage_of(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The buffers of an extension column under their plain type, without a copy."""

    if isinstance(column, pa.ChunkedArray):
        chunks = [chunk.storage for chunk in column.chunks]
        return pa.chunked_array(chunks, type=column.type.storage_type)
    return column.storage


def _plain_text(scalar: pa.Scalar) -> str:
    return str(scalar.as_py())


def _boolean_text(scalar: pa.Scalar) -> str:
    return "true" if scalar.as_py() else "false"


def _float_text(scalar: pa.Scalar) -> str:
    return repr(scalar.as_py() + 0.0)  # -0.0 + 0.0 is 0.0


def _decimal_text(scalar: pa.Scalar) -> str:
    return format(scalar.as_py(), "f")


def _date_text(scalar: pa.Scalar) -> str | None:
    days: int = scalar.value
    if not _DATE_DAYS_MIN <= days <= _DATE_DAYS_MAX:
        return None
    return dt.date.fromordinal(days + _EPOCH_ORDINAL).isoformat()


def _microseconds_floor(scalar: pa.Scalar) -> str:
    factor, divisor = _UNITS_PER_MICROSECOND[scalar.type.unit]
    return str(scalar.value * factor // divisor)


def _microseconds_ceiling(scalar: pa.Scalar) -> str:
    factor, divisor = _UNITS_PER_MICROSECOND[scalar.type.unit]
    return str(-(-scalar.value * factor // divisor))


def _uuid_text(scalar: pa.Scalar) -> str:
    return str(uuid.UUID(bytes=scalar.as_py()))


def _text_lower(scalar: pa.Scalar) -> str:
    return _cut_text(scalar.as_py())


def _text_upper(scalar: pa.Scalar) -> str | None:
    text: str = scalar.as_py()
    cut = _cut_text(text)
    return text if len(cut) == len(text) else _raise_text(cut)


def _cut_text(text: str) -> str:
    """The longest prefix of whole characters within the byte limit and before any NUL."""

    if len(text) * 4 > BOUND_BYTES_MAX:
        # Cutting bytes can leave a part of a character at the end only; "ignore" drops it.
        text = text[:BOUND_BYTES_MAX].encode()[:BOUND_BYTES_MAX].decode(errors="ignore")
    return text.partition("\0")[0]


def _raise_text(prefix: str) -> str | None:
    """The least text of this length or shorter that is above everything beginning with `prefix`.

    The bytewise order of UTF-8 is the order of code points. Surrogates are no characters: the
    code point after U+D7FF is U+E000. The byte length never exceeds the limit by more than the
    one byte that a longer encoding takes.
    """

    for index in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[index])
        if code < 0x10FFFF:
            return prefix[:index] + chr(0xE000 if code == 0xD7FF else code + 1)
    return None


def _blob_lower(scalar: pa.Scalar) -> str:
    raw: bytes = scalar.as_py()
    return raw[:BOUND_BYTES_MAX].hex()


def _blob_upper(scalar: pa.Scalar) -> str | None:
    raw: bytes = scalar.as_py()
    if len(raw) <= BOUND_BYTES_MAX:
        return raw.hex()
    prefix = raw[:BOUND_BYTES_MAX].rstrip(b"\xff")
    return (prefix[:-1] + bytes([prefix[-1] + 1])).hex() if prefix else None


_TEXTS: dict[Family, tuple[_Text, _Text]] = {
    Family.BOOLEAN: (_boolean_text, _boolean_text),
    Family.INTEGER: (_plain_text, _plain_text),
    Family.FLOAT: (_float_text, _float_text),
    Family.DECIMAL: (_decimal_text, _decimal_text),
    Family.VARCHAR: (_text_lower, _text_upper),
    Family.BLOB: (_blob_lower, _blob_upper),
    Family.DATE: (_date_text, _date_text),
    Family.TIME: (_microseconds_floor, _microseconds_ceiling),
    Family.TIMESTAMP: (_microseconds_floor, _microseconds_ceiling),
    Family.TIMESTAMPTZ: (_microseconds_floor, _microseconds_ceiling),
    Family.UUID: (_uuid_text, _uuid_text),
}


# --- values of bounds ----------------------------------------------------------------------


def _date_days(text: str) -> int:
    return dt.date.fromisoformat(text).toordinal() - _EPOCH_ORDINAL


#: Reads a bound back as a value whose Python order is DuckDB's order of the family. Dates become
#: days since 1970-01-01, times and timestamps microseconds, uuids 128-bit integers.
BOUND_READERS: Final[Mapping[Family, Callable[[str], Any]]] = {
    Family.BOOLEAN: lambda text: text == "true",
    Family.INTEGER: int,
    Family.FLOAT: float,
    Family.DECIMAL: Decimal,
    Family.VARCHAR: lambda text: text.encode(),
    Family.BLOB: bytes.fromhex,
    Family.DATE: _date_days,
    Family.TIME: int,
    Family.TIMESTAMP: int,
    Family.TIMESTAMPTZ: int,
    Family.UUID: lambda text: uuid.UUID(text).int,
}


def merged_statistics(
    kind: ColumnType, parts: Sequence[tuple[int, ColumnStatistics]]
) -> ColumnStatistics:
    """Statistics of a file from those of its row groups, each with its count of rows.

    A group of nulls claims nothing and spoils nothing; a group with values but without a bound (a
    NaN, a text that cannot be raised) leaves the file without it. The bound of a whole file is
    always the bound of one of its groups, so cut texts stay within their length.
    """

    null_count = sum(part.null_count for _, part in parts)
    claims = [part for rows, part in parts if part.null_count < rows]
    if not claims or kind.family in UNBOUNDED:
        return ColumnStatistics(null_count)
    value = BOUND_READERS[kind.family]
    lowers = [part.minimum for part in claims if part.minimum is not None]
    uppers = [part.maximum for part in claims if part.maximum is not None]
    return ColumnStatistics(
        null_count,
        min(lowers, key=value) if len(lowers) == len(claims) else None,
        max(uppers, key=value) if len(uppers) == len(claims) else None,
    )


# --- as JSON -------------------------------------------------------------------------------


def statistics_to_json(statistics: Mapping[int, ColumnStatistics]) -> str:
    """Compact JSON: column id → [null count, minimum, maximum], cut after the last one claimed."""

    return json.dumps(
        {
            str(column_id): (
                [column.null_count]
                if column.minimum is None and column.maximum is None
                else [column.null_count, column.minimum, column.maximum]
            )
            for column_id, column in statistics.items()
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def statistics_from_json(text: str | bytes) -> dict[int, ColumnStatistics]:
    """Reads what `statistics_to_json` wrote."""

    return {
        int(column_id): ColumnStatistics(*values) for column_id, values in json.loads(text).items()
    }
