"""Values as partition texts: canonical texts, hashes and calendar texts of `partitions`.

What each text is, `storage.files.partitions` says; here is how it is made from Arrow's values and
from values in the form of `BOUND_READERS`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.rows.types import Family

#: The value text of dates and times outside the years 1 to 9999.
BEYOND: Final = "beyond"
MICROSECONDS_A_DAY: Final = 86_400_000_000
MICROSECONDS_AN_HOUR: Final = 3_600_000_000

_EPOCH_DAYS = dt.date(1970, 1, 1).toordinal()
_FIRST_DAY = dt.date.min.toordinal() - _EPOCH_DAYS
_LAST_DAY = dt.date.max.toordinal() - _EPOCH_DAYS


class TransformKind(StrEnum):
    IDENTITY = "identity"
    YEAR = "year"
    MONTH = "month"
    DAY = "day"
    HOUR = "hour"
    BUCKET = "bucket"
    TRUNCATE = "truncate"


#: How much of the ISO text of an hour each calendar transform keeps.
ISO_CHARACTERS: Final = {
    TransformKind.YEAR: 4,
    TransformKind.MONTH: 7,
    TransformKind.DAY: 10,
    TransformKind.HOUR: 13,
}


def buckets_of(texts: Sequence[bytes], count: int) -> list[int]:
    digest = hashlib.md5
    joined = b"".join([digest(text, usedforsecurity=False).digest() for text in texts])
    buckets: list[int] = (np.frombuffer(joined, dtype=">u4")[::4] % count).tolist()
    return buckets


def calendar_text(kind: TransformKind, hour: int) -> str:
    days, of_day = divmod(hour, 24)
    if not _FIRST_DAY <= days <= _LAST_DAY:
        return BEYOND
    day = dt.date.fromordinal(days + _EPOCH_DAYS).isoformat()
    return f"{day}T{of_day:02}"[: ISO_CHARACTERS[kind]]


def floor_divided(column: pa.Array | pa.ChunkedArray, unit: int) -> pa.Array:
    """Arrow divides towards zero; numpy rounds down. Nulls stay nulls."""

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    whole = pc.fill_null(column, 0).to_numpy(zero_copy_only=False) // unit
    mask = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    return pa.array(whole, pa.int64(), mask=mask)


def widest_integer(kind: pa.DataType) -> pa.DataType:
    return pa.uint64() if pa.types.is_unsigned_integer(kind) else pa.int64()


def plain_values(family: Family, uniques: pa.Array) -> list[Any]:
    """Values in the form of `BOUND_READERS`, but text, which stays text."""

    match family:
        case Family.DATE:
            uniques = pc.cast(uniques, pa.int32())
        case Family.TIME | Family.TIMESTAMP | Family.TIMESTAMPTZ:
            uniques = pc.cast(uniques, pa.int64())
        case Family.UUID:
            return [int.from_bytes(raw) for raw in uniques.to_pylist()]
    values: list[Any] = uniques.to_pylist()
    return values


def _integer_text(value: object) -> str | None:
    if isinstance(value, Decimal):
        return str(int(value)) if value == value.to_integral_value() else None
    return str(value) if isinstance(value, int) else None


def _decimal_text(value: object) -> str | None:
    if not isinstance(value, int | Decimal):
        return None
    text = format(Decimal(value), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _varchar_text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str) else None


def _date_text(value: object) -> str | None:
    if not isinstance(value, int):
        return None
    if not _FIRST_DAY <= value <= _LAST_DAY:
        return BEYOND
    return dt.date.fromordinal(value + _EPOCH_DAYS).isoformat()


def _instant_text(value: object) -> str | None:
    if not isinstance(value, int):
        return None
    return str(value) if _FIRST_DAY <= value // MICROSECONDS_A_DAY <= _LAST_DAY else BEYOND


CANONICAL: Final[Mapping[Family, Callable[[object], str | None]]] = {
    Family.BOOLEAN: lambda value: "true" if value else "false",
    Family.INTEGER: _integer_text,
    Family.DECIMAL: _decimal_text,
    Family.VARCHAR: _varchar_text,
    Family.BLOB: lambda value: value.hex() if isinstance(value, bytes) else None,
    Family.DATE: _date_text,
    Family.TIME: lambda value: str(value) if isinstance(value, int) else None,
    Family.TIMESTAMP: _instant_text,
    Family.TIMESTAMPTZ: _instant_text,
    Family.UUID: lambda value: str(uuid.UUID(int=value)) if isinstance(value, int) else None,
}
