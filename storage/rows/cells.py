"""One JSON value into one column value, exactly or not at all (contract A10).

The rules of the slow pass, one function a family of types. A value is None, a bool, a str, a
NumberText, or something nested; `text` is the value as written. What comes back is what
`storage.rows.columns.array_of_cells` takes: integers for times (days or microseconds), scaled
integers for decimals, bytes for blob and uuid, text otherwise. Everything else raises CellRefused.

The fast path (`columns.py`) must never accept what is refused here, nor give another value; a
property test holds the two together.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from storage.rows.json_text import NumberText, compact_json
from storage.rows.types import ColumnType, Family

Cell = Callable[[ColumnType, Any, str], Any]

FLOAT_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
DAY_US = 86_400_000_000
#: Years 0001 to 9999 in UTC, the range that RFC 3339 text and Python can both spell.
DATE_DAYS_MIN, DATE_DAYS_MAX = -719_162, 2_932_896
TIMESTAMP_US_MIN, TIMESTAMP_US_MAX = DATE_DAYS_MIN * DAY_US, (DATE_DAYS_MAX + 1) * DAY_US - 1
_EPOCH_ORDINAL = dt.date(1970, 1, 1).toordinal()

_NUMBER = re.compile(r"(-?)(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([-+]?[0-9]+))?", re.ASCII)
#: An exponent of more digits than this puts any number beyond every type; it is never computed.
_EXPONENT_DIGITS_MAX = 18
_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})", re.ASCII)
_TIME = re.compile(r"([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?", re.ASCII)
_TIME_MARKS = ("T", "t", " ")
_ZONE = re.compile(r"[zZ]|([-+])([0-9]{2}):([0-9]{2})", re.ASCII)
_UUID = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE
)


class CellRefused(ValueError):
    """The value does not fit; the text is the reason, for the caller. `path`: where it lies inside
    of a nested value, like `.b[0]`; `shown`: how it is written there."""

    path = ""
    shown: str | None = None

    def inside(self, step: str, text: str) -> CellRefused:
        """The same, told by who holds the value."""

        self.path = step + self.path
        self.shown = text if self.shown is None else self.shown
        return self


def cell_of(kind: ColumnType, value: Any, text: str) -> Any:
    """The column value for a JSON value. Raises CellRefused. JSON null is None in every type."""

    if value is None:
        return None
    return _CELLS[kind.family](kind, value, text)


def scaled_integer(text: str, scale: int, digits_max: int) -> int:
    """A JSON number's text times 10^scale, when that is a whole number of few enough digits.

    Raises CellRefused. Never computes more than `digits_max` digits, whatever the exponent.
    """

    match = _NUMBER.fullmatch(text)
    if match is None:
        raise CellRefused("not a number; write digits like -12.5, without spaces or signs like +")
    sign, whole, fraction, exponent = match[1], match[2], match[3] or "", match[4] or "0"
    digits = (whole + fraction).lstrip("0")
    if not digits:
        return 0
    kept = digits.rstrip("0")
    if len(exponent.lstrip("-+0")) > _EXPONENT_DIGITS_MAX:
        raise CellRefused("the exponent is too large for the column")
    lowest = int(exponent) - len(fraction) + (len(digits) - len(kept)) + scale
    if lowest < 0:
        raise CellRefused(
            f"has more than {scale} digits after the decimal point" if scale else "has a fraction"
        )
    if len(kept) + lowest > digits_max:
        raise CellRefused("out of range for the column")
    scaled = int(kept + "0" * lowest)
    return -scaled if sign else scaled


def _boolean(kind: ColumnType, value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return value
    raise CellRefused("expected true or false")


def _integer(kind: ColumnType, value: Any, text: str) -> int:
    if isinstance(value, bool) or not isinstance(value, str):
        raise CellRefused("expected a whole number")
    if not isinstance(value, NumberText) and not kind.integer_text_allowed:
        raise CellRefused("expected a number, not a string")
    number = scaled_integer(value, 0, 20)
    if not kind.low <= number <= kind.high:
        raise CellRefused(f"out of range for {kind.sql} ({kind.low} to {kind.high})")
    return number


def _decimal(kind: ColumnType, value: Any, text: str) -> int:
    if isinstance(value, bool) or not isinstance(value, str):
        raise CellRefused("expected a number, or a number in a string")
    return scaled_integer(value, kind.scale, kind.precision)


def _float(kind: ColumnType, value: Any, text: str) -> float:
    if isinstance(value, NumberText):
        # The fast decoder reads "-0" as an integer; the sign of that zero is no digit.
        number = 0.0 if value == "-0" else float(value)
        if math.isinf(number) or (kind.bits == 32 and _is_float32_overflow(number)):
            raise CellRefused(f"too large for {kind.sql}")
        return number
    if isinstance(value, str) and value in FLOAT_WORDS:
        return FLOAT_WORDS[value]
    raise CellRefused('expected a number, or "NaN", "Infinity" or "-Infinity"')


def _is_float32_overflow(number: float) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isinf(np.float32(number)))


def _varchar(kind: ColumnType, value: Any, text: str) -> str:
    string = _string(value, "a string")
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        raise CellRefused("holds half of a surrogate pair, which is not text") from None
    return string


def _blob(kind: ColumnType, value: Any, text: str) -> bytes:
    string = _string(value, "base64 text")
    try:
        return decode_base64(string)
    except ValueError:
        raise CellRefused("not base64 (RFC 4648, with padding and without spaces)") from None


def decode_base64(text: str) -> bytes:
    """Base64 in its one canonical spelling. Raises ValueError, also for non-zero spare bits."""

    raw = str.encode(text, "ascii")  # TypeError for what is no text
    data = binascii.a2b_base64(raw, strict_mode=True)
    if base64.b64encode(data) != raw:
        raise ValueError("not canonical base64")
    return data


def _date(kind: ColumnType, value: Any, text: str) -> int:
    string = _string(value, "a date in a string, like 2026-01-31")
    match = _DATE.fullmatch(string)
    if match is None:
        raise CellRefused("not a date like 2026-01-31")
    return _days(match)


def _time(kind: ColumnType, value: Any, text: str) -> int:
    string = _string(value, "a time in a string, like 12:00:00.5")
    match = _TIME.match(string)
    if match is None:
        raise CellRefused("not a time like 12:00:00.5")
    if match.end() != len(string):
        if _ZONE.fullmatch(string, match.end()):
            raise CellRefused("has a zone, and the column has none")
        raise CellRefused("not a time like 12:00:00.5")
    return _day_time_us(match)


def _timestamp(kind: ColumnType, value: Any, text: str) -> int:
    local_us, zone_us = _parse_timestamp(_string(value, "a time in a string (RFC 3339)"))
    if zone_us is not None:
        raise CellRefused("has a zone, and the column has none; use timestamptz or leave it out")
    return local_us


def _timestamptz(kind: ColumnType, value: Any, text: str) -> int:
    local_us, zone_us = _parse_timestamp(_string(value, "a time in a string (RFC 3339)"))
    if zone_us is None:
        raise CellRefused("has no zone; write it like 2026-01-31T12:00:00Z")
    instant_us = local_us - zone_us
    if not TIMESTAMP_US_MIN <= instant_us <= TIMESTAMP_US_MAX:
        raise CellRefused("outside of the years 0001 to 9999 in UTC")
    return instant_us


def _parse_timestamp(string: str) -> tuple[int, int | None]:
    """Microseconds of the local time since 1970, and the zone's offset, None without a zone."""

    date = _DATE.match(string)
    if date is None or string[10:11] not in _TIME_MARKS:
        raise CellRefused("not a time like 2026-01-31T12:00:00Z (RFC 3339)")
    time = _TIME.match(string, 11)
    if time is None:
        raise CellRefused("not a time like 2026-01-31T12:00:00Z (RFC 3339)")
    local_us = _days(date) * DAY_US + _day_time_us(time)
    if time.end() == len(string):
        return local_us, None
    zone = _ZONE.fullmatch(string, time.end())
    if zone is None:
        raise CellRefused("the zone must be Z or an offset like +05:30 (RFC 3339)")
    if zone[1] is None:
        return local_us, 0
    hours, minutes = int(zone[2]), int(zone[3])
    if hours > 23 or minutes > 59:
        raise CellRefused("the zone's offset does not exist")
    offset_us = (hours * 60 + minutes) * 60_000_000
    return local_us, -offset_us if zone[1] == "-" else offset_us


def time_shape(text: str) -> Literal["zoned", "local"] | None:
    """Whether a text is spelled like a time of RFC 3339 with a zone, or without one. Whether that
    time exists, and is no finer than a column, `cell_of` says."""

    date = _DATE.match(text)
    time = None if date is None or text[10:11] not in _TIME_MARKS else _TIME.match(text, 11)
    if time is None:
        return None
    if time.end() == len(text):
        return "local"
    return "zoned" if _ZONE.fullmatch(text, time.end()) else None


def _days(match: re.Match[str]) -> int:
    year, month, day = int(match[1]), int(match[2]), int(match[3])
    try:
        return dt.date(year, month, day).toordinal() - _EPOCH_ORDINAL
    except ValueError:
        raise CellRefused("the date does not exist (years are 0001 to 9999)") from None


def _day_time_us(match: re.Match[str]) -> int:
    hour, minute, second = int(match[1]), int(match[2]), int(match[3])
    if hour == 24:
        raise CellRefused("24:00 is not kept; write 00:00:00 of the next day")
    if second == 60:
        raise CellRefused("leap seconds are not kept; write second 59 or the next minute")
    if hour > 23 or minute > 59 or second > 59:
        raise CellRefused("the time of day does not exist")
    fraction = match[4] or ""
    if fraction[6:].strip("0"):
        raise CellRefused("finer than a microsecond")
    return ((hour * 60 + minute) * 60 + second) * 1_000_000 + int(fraction[:6].ljust(6, "0"))


def _uuid(kind: ColumnType, value: Any, text: str) -> bytes:
    string = _string(value, "a uuid in a string")
    if not _UUID.fullmatch(string):
        raise CellRefused("not a uuid like 0f2b4c1e-0000-4000-8000-000000000000")
    return bytes.fromhex(string.replace("-", ""))


def _json(kind: ColumnType, value: Any, text: str) -> str:
    try:
        return compact_json(text.encode("utf-8")).decode("utf-8")
    except ValueError as fault:
        reason = str(fault)
        if "surrogate" in reason or "truncated" in reason:
            reason = "holds half of a surrogate pair, which is not text"
        raise CellRefused(reason) from None
    except RecursionError:
        raise CellRefused("nested too deeply") from None


def _string(value: Any, expected: str) -> str:
    if isinstance(value, NumberText) or not isinstance(value, str):
        raise CellRefused(f"expected {expected}")
    return value


_CELLS: dict[Family, Cell] = {
    Family.BOOLEAN: _boolean,
    Family.INTEGER: _integer,
    Family.FLOAT: _float,
    Family.DECIMAL: _decimal,
    Family.VARCHAR: _varchar,
    Family.BLOB: _blob,
    Family.DATE: _date,
    Family.TIME: _time,
    Family.TIMESTAMP: _timestamp,
    Family.TIMESTAMPTZ: _timestamptz,
    Family.UUID: _uuid,
    Family.JSON: _json,
}
