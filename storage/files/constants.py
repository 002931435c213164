"""Constants of a query as intervals in the order of a column's type, for pruning (contract D11).

A constant is used only when it is certain how DuckDB compares it with a column of this type, and
that the comparison cannot fail; everything else gives None and the caller keeps the file. Checked
against DuckDB 2.0 (`tests/unit/test_pruning_D11.py`): a string, literal or parameter, is cast to
the column's type; integers and decimals compare exactly as long as the common decimal type fits 38
digits; a literal with an exponent and a Python float make the other side a double; a constant
beside a float column is rounded to that column's type. Where rounding is involved, the constant
becomes an interval that holds every value it may be rounded to. Sessions are pinned to UTC (D8),
so a timestamp without zone means UTC beside a `timestamptz` column.
"""

from __future__ import annotations

import datetime as dt
import enum
import math
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from storage.rows.types import ColumnType, Family


class Manner(enum.Enum):
    """How a constant compares. The constants of one IN or BETWEEN must share one manner, because
    DuckDB brings them all to one type."""

    EXACT = "exact"  # integers and decimals
    ROUNDED = "rounded"  # doubles
    TEXT = "text"  # strings, read as the column's type
    TYPED = "typed"  # booleans, blobs, uuids, dates and times with a type of their own


@dataclass(frozen=True, slots=True)
class Interval:
    """The constant lies between `lower` and `upper`, which are equal when nothing is rounded."""

    lower: Any
    upper: Any
    manner: Manner

    @property
    def exact(self) -> bool:
        return bool(self.lower == self.upper)


@dataclass(frozen=True, slots=True)
class Typed:
    """A string literal with a type written beside it: `date '2026-01-31'`, `'…'::timestamp`."""

    sql_type: str
    text: str


@dataclass(frozen=True, slots=True)
class Number:
    """A numeric literal, as its text."""

    text: str


_INTEGER = re.compile(r"-?[0-9]{1,38}")
_DECIMAL = re.compile(r"-?[0-9]{0,38}\.[0-9]{0,38}")
_EXPONENT = re.compile(r"-?[0-9]{1,38}(\.[0-9]{0,38})?[eE][+-]?[0-9]{1,3}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?")
_TIMESTAMP = re.compile(_DATE.pattern + "[ T]" + _TIME.pattern)
#: DuckDB prints whole hours without minutes.
_ZONE = re.compile(r"Z|[+-][0-9]{2}(:[0-9]{2})?$")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
#: Characters that mean themselves where DuckDB reads a string as a blob.
_PLAIN_BLOB = re.compile(r"[ -\[\]-~]*")

_DECIMAL_DIGITS_MAX = 38
_INTEGER_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}
_FLOAT32_MAX = 3.4e38
_FLOAT32_EXACT = 2**24
_FLOAT32_ROUNDING, _FLOAT32_LEAST = 2.0**-22, 1e-44
#: Wider than the roundings on the way from 38 digits to a double.
_FLOAT64_ROUNDING = 2.0**-46

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
#: DuckDB's Python binding reads the first and the last value of dates as infinities.
_YEARS = range(2, 9999)


def interval_of(kind: ColumnType, constant: object) -> Interval | None:
    """The constant beside a column of type `kind`, or None when its meaning is not certain.

    `constant` is a Python value (of a parameter, or a literal's string or boolean), `Number` or
    `Typed`.
    """

    if isinstance(constant, str):
        value = _read_text(_TEXT_READERS, kind.family, constant)
        return None if value is None else Interval(value, value, Manner.TEXT)
    if kind.family in _NUMERIC:
        return _number(kind, constant)
    reader = _TYPED_READERS.get(kind.family)
    value = None if reader is None else reader(constant)
    return None if value is None else Interval(value, value, Manner.TYPED)


# --- numbers -------------------------------------------------------------------------------

_NUMERIC: Final = frozenset({Family.INTEGER, Family.DECIMAL, Family.FLOAT})


def _number(kind: ColumnType, constant: object) -> Interval | None:
    value = _python_number(constant)
    if value is None:
        return None
    if kind.family is Family.FLOAT:
        return _beside_float(kind, value)
    if isinstance(value, float):
        margin = abs(value) * _FLOAT64_ROUNDING
        return Interval(value - margin, value + margin, Manner.ROUNDED)
    if not _common_decimal_fits(kind, value):
        return None
    return Interval(value, value, Manner.EXACT)


def _python_number(constant: object) -> int | Decimal | float | None:
    if isinstance(constant, Number):
        text = constant.text
        if _INTEGER.fullmatch(text):
            return int(text)
        if _DECIMAL.fullmatch(text) and len(text) > 1 and text != "-.":
            return Decimal(text)
        return _finite(float(text)) if _EXPONENT.fullmatch(text) else None
    if isinstance(constant, bool):
        return None
    if isinstance(constant, float):
        return _finite(constant)
    if isinstance(constant, Decimal):
        # An exponent above zero is a spelling whose type in DuckDB nobody needs to know.
        exponent = constant.as_tuple().exponent
        return constant if isinstance(exponent, int) and exponent <= 0 else None
    return constant if isinstance(constant, int) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _common_decimal_fits(kind: ColumnType, value: int | Decimal) -> bool:
    digits = _INTEGER_DIGITS[kind.bits] if kind.family is Family.INTEGER else kind.precision
    parts = Decimal(value).as_tuple()
    scale = -parts.exponent if isinstance(parts.exponent, int) else 0
    whole = max(len(parts.digits) - scale, 1)
    return max(digits - kind.scale, whole) + max(kind.scale, scale) <= _DECIMAL_DIGITS_MAX


def _beside_float(kind: ColumnType, value: int | Decimal | float) -> Interval | None:
    if not isinstance(value, float) and len(Decimal(value).as_tuple().digits) > _DECIMAL_DIGITS_MAX:
        return None
    number = float(value)
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= _FLOAT32_EXACT):
        return Interval(number, number, Manner.ROUNDED)  # compared as doubles, or kept exactly
    if kind.bits == 32:
        if abs(number) > _FLOAT32_MAX:
            return None
        margin = abs(number) * _FLOAT32_ROUNDING + _FLOAT32_LEAST
    else:
        margin = abs(number) * _FLOAT64_ROUNDING
    return Interval(number - margin, number + margin, Manner.ROUNDED)


# --- text read as the column's type --------------------------------------------------------


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair: no text of a column
        return None


def _blob_of_text(text: str) -> bytes | None:
    return text.encode() if _PLAIN_BLOB.fullmatch(text) else None


def _days_of_text(text: str) -> int | None:
    if not _DATE.fullmatch(text):
        return None
    return (dt.date.fromisoformat(text) - _EPOCH.date()).days


def _microseconds_of_time_text(text: str) -> int | None:
    if not _TIME.fullmatch(text):
        return None
    return _time_microseconds(dt.time.fromisoformat(_six_digits(text)))


def _microseconds_of_text(text: str) -> int | None:
    if not (_DATE.fullmatch(text) or _TIMESTAMP.fullmatch(text)):
        return None
    return _instant(dt.datetime.fromisoformat(_six_digits(text)))


def _microseconds_of_zoned_text(text: str) -> int | None:
    zone = _ZONE.search(text[10:])
    if zone is None or not text.endswith(zone[0]):
        return _microseconds_of_text(text)
    if not _TIMESTAMP.fullmatch(text.removesuffix(zone[0])):
        return None
    offset = zone[0] if zone[0] == "Z" or zone[1] else f"{zone[0]}:00"
    return _instant(dt.datetime.fromisoformat(_six_digits(text.removesuffix(zone[0])) + offset))


def _six_digits(text: str) -> str:
    """Fractions filled up to microseconds, so that no reader has to guess what a digit means."""

    whole, dot, fraction = text.partition(".")
    return f"{whole}.{fraction:0<6}" if dot else whole


def _number_of_uuid_text(text: str) -> int | None:
    return uuid.UUID(text).int if _UUID.fullmatch(text) else None


_TEXT_READERS: Mapping[Family, Callable[[str], Any]] = {
    Family.VARCHAR: _utf8,
    Family.BLOB: _blob_of_text,
    Family.DATE: _days_of_text,
    Family.TIME: _microseconds_of_time_text,
    Family.TIMESTAMP: _microseconds_of_text,
    Family.TIMESTAMPTZ: _microseconds_of_zoned_text,
    Family.UUID: _number_of_uuid_text,
}


def _read_text(
    readers: Mapping[Family, Callable[[str], Any]], family: Family, text: str
) -> Any | None:
    reader = readers.get(family)
    try:
        return None if reader is None else reader(text)
    except (ValueError, OverflowError):  # the 31st of February
        return None


# --- values with a type of their own -------------------------------------------------------


def _instant(value: dt.datetime) -> int:
    aware = value if value.tzinfo is not None else value.replace(tzinfo=dt.UTC)
    return (aware - _EPOCH) // _MICROSECOND


def _time_microseconds(value: dt.time) -> int:
    return ((value.hour * 60 + value.minute) * 60 + value.second) * 1_000_000 + value.microsecond


def _boolean(constant: object) -> bool | None:
    return constant if isinstance(constant, bool) else None


def _blob(constant: object) -> bytes | None:
    return constant if isinstance(constant, bytes) else None


def _uuid(constant: object) -> int | None:
    if isinstance(constant, Typed) and constant.sql_type == "uuid":
        return _number_of_uuid_text(constant.text)
    return constant.int if isinstance(constant, uuid.UUID) else None


def _date(constant: object) -> int | None:
    if isinstance(constant, Typed) and constant.sql_type == "date":
        days: int | None = _read_text(_TEXT_READERS, Family.DATE, constant.text)
        return days
    if isinstance(constant, dt.date) and not isinstance(constant, dt.datetime):
        return (constant - _EPOCH.date()).days if constant.year in _YEARS else None
    return None


def _time(constant: object) -> int | None:
    if isinstance(constant, Typed) and constant.sql_type == "time":
        found: int | None = _read_text(_TEXT_READERS, Family.TIME, constant.text)
        return found
    if isinstance(constant, dt.time) and constant.tzinfo is None:
        return _time_microseconds(constant)
    return None


def _timestamp(constant: object) -> int | None:
    """Without zone: beside a constant with one, DuckDB casts the column; that is left alone."""

    days = _date(constant)
    if days is not None:
        return days * 86_400_000_000
    if isinstance(constant, Typed) and constant.sql_type == "timestamp":
        found: int | None = _read_text(_TEXT_READERS, Family.TIMESTAMP, constant.text)
        return found
    if isinstance(constant, dt.datetime) and constant.tzinfo is None and constant.year in _YEARS:
        return _instant(constant)
    return None


def _timestamptz(constant: object) -> int | None:
    if isinstance(constant, Typed) and constant.sql_type == "timestamptz":
        found: int | None = _read_text(_TEXT_READERS, Family.TIMESTAMPTZ, constant.text)
        return found
    if isinstance(constant, dt.datetime) and constant.year in _YEARS:
        return _instant(constant)
    return _timestamp(constant)


_TYPED_READERS: Mapping[Family, Callable[[object], Any]] = {
    Family.BOOLEAN: _boolean,
    Family.BLOB: _blob,
    Family.UUID: _uuid,
    Family.DATE: _date,
    Family.TIME: _time,
    Family.TIMESTAMP: _timestamp,
    Family.TIMESTAMPTZ: _timestamptz,
}
