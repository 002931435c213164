"""Arrow arrays of scalars to the texts of the HTTP API, without the quotes that JSON puts around.

Everything is done by pyarrow's kernels, which run without Python's lock. What a kernel would write
wrongly (years outside 1 to 9999, infinities, minus zero, characters to escape) is looked for in
each array, and only those values take a way of their own. Nulls stay null.
"""

from __future__ import annotations

import binascii
import datetime as dt
import math
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

TEXT = pa.string()
EMPTY = pa.scalar("")
_DAY_US = 86_400_000_000
_EPOCH = dt.date(1970, 1, 1)
_DAYS = ((dt.date(1, 1, 1) - _EPOCH).days, (dt.date(9999, 12, 31) - _EPOCH).days)
_INFINITE_DAYS = 2**31 - 1
_INFINITE_TICKS = 2**63 - 1

ESCAPED = {
    **{chr(code): f"\\u{code:04x}" for code in range(32)},
    "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f", '"': '\\"',
}  # fmt: skip
#: All bytes that need no escape; a backslash is escaped first, for the others bring more of them.
_HARMLESS = bytes(code for code in range(256) if code > 31 and code not in b'"\\')


def plain(values: pa.Array) -> pa.StringArray:
    return pc.cast(values, TEXT)


def fraction(values: pa.Array) -> pa.StringArray:
    """Decimals as DuckDB writes those without digits before the point; JSON wants one there."""

    return pc.replace_substring(values, ".", "0.")


def escaped(values: pa.Array) -> pa.StringArray:
    """Text as it stands between the quotes of JSON."""

    texts = pc.cast(values, TEXT)
    harmful = special(texts, _HARMLESS)
    if not harmful:
        return texts
    if b"\\" in harmful:
        texts = pc.replace_substring(texts, "\\", "\\\\")
    for character, escape in ESCAPED.items():
        if character.encode() in harmful:
            texts = pc.replace_substring(texts, character, escape)
    return texts


def special(texts: pa.StringArray, harmless: bytes) -> bytes:
    """The bytes of all texts that are not `harmless`: looking at the buffer as a whole costs a
    tenth of looking at each text."""

    return _data(texts).translate(None, harmless)


def _data(values: pa.Array) -> bytes:
    """All texts or blobs of an array, one behind the other."""

    _, places, data = values.buffers()
    if data is None:
        return b""
    ends = pa.Array.from_buffers(pa.int32(), len(values) + 1, [None, places], offset=values.offset)
    first, last = ends[0].as_py(), ends[-1].as_py()
    return bytes(data.slice(first, last - first))


def floating(values: pa.Array) -> tuple[pa.StringArray, bool]:
    """Texts, and whether names are among them: `NaN`, `Infinity`, `-Infinity`. Minus zero keeps its
    sign where numbers without a point are read as integers."""

    texts = pc.cast(values, TEXT)
    data = _data(texts)
    if b"-0" in data:
        texts = pc.if_else(pc.equal(texts, "-0"), "-0.0", texts)
    if b"n" not in data:  # of nan, inf and -inf; numbers have none
        return texts, False
    names = pc.if_else(
        pc.is_nan(values), "NaN", pc.if_else(pc.less(values, 0), "-Infinity", "Infinity")
    )
    return pc.if_else(pc.is_finite(values), texts, names), True


def base64_text(values: pa.Array) -> pa.StringArray:
    """All values are encoded in one go: each is filled up to groups of three bytes, and what came
    of the filling is overwritten."""

    whole = pc.fill_null(pc.cast(values, pa.binary()), b"")
    lengths = pc.binary_length(whole)
    groups = pc.divide(pc.add(lengths, 2), 3)
    missing = pc.subtract(pc.multiply(groups, 3), lengths)
    filled = bool(pc.any(pc.greater(missing, 0)).as_py())
    if filled:
        whole = pc.binary_join_element_wise(
            whole, pc.binary_repeat(pa.scalar(b"\0"), missing), pa.scalar(b"")
        )
    ends = pc.cumulative_sum_checked(pc.multiply_checked(groups, 4))
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends.cast(pa.int32())])
    data = binascii.b2a_base64(_data(whole), newline=False)
    texts = pa.StringArray.from_buffers(len(values), offsets.buffers()[1], pa.py_buffer(data))
    if filled:
        texts = pc.if_else(
            pc.equal(missing, 0),
            texts,
            pc.if_else(
                pc.equal(missing, 1),
                pc.binary_replace_slice(texts, -1, 2**31 - 1, "="),
                pc.binary_replace_slice(texts, -2, 2**31 - 1, "=="),
            ),
        )
    return pc.if_else(values.is_null(), None, texts) if values.null_count else texts


# --- dates and times -----------------------------------------------------------------------------


def date(values: pa.Array) -> pa.StringArray:
    days = values.cast(pa.int32())
    if _bounded(days, _DAYS):
        return pc.cast(values, TEXT)
    return _outliers(days, _DAYS, lambda inner: pc.cast(inner.cast(pa.date32()), TEXT), _day)


def time(values: pa.Array) -> pa.StringArray:
    micros, bounds = values.cast(pa.int64()), (0, _DAY_US - 1)
    if _bounded(micros, bounds):
        return pc.cast(values, TEXT)
    return _outliers(
        micros, bounds, lambda inner: pc.cast(inner.cast(pa.time64("us")), TEXT), _clock
    )


def local_time(values: pa.Array) -> pa.StringArray:
    """RFC 3339 with microseconds (nine digits for timestamp_ns), and no zone."""

    return _timestamp(values, zone="")[0]


def instant(values: pa.Array) -> tuple[pa.StringArray, str]:
    """The same with a zone: texts, and what to put behind each of them."""

    return _timestamp(values, zone="Z")


def _timestamp(values: pa.Array, *, zone: str) -> tuple[pa.StringArray, str]:
    unit = values.type.unit
    per_day = _DAY_US * (1000 if unit == "ns" else 1)
    bounds = _DAYS[0] * per_day, (_DAYS[1] + 1) * per_day - 1
    ticks = values.cast(pa.int64())

    def fast(inner: pa.Array) -> pa.StringArray:
        # Without its zone: the cast of a type with one is thirty times slower.
        return pc.binary_replace_slice(pc.cast(inner.cast(pa.timestamp(unit)), TEXT), 10, 11, "T")

    if _bounded(ticks, bounds):
        return fast(ticks), zone
    return _outliers(
        ticks,
        bounds,
        lambda inner: pc.binary_join_element_wise(fast(inner), zone, EMPTY),
        lambda tick: _instant(tick, unit, zone),
    ), ""


def _bounded(numbers: pa.Array, bounds: tuple[int, int]) -> bool:
    found = pc.min_max(numbers)
    low, high = found["min"].as_py(), found["max"].as_py()
    return low is None or bool(low >= bounds[0] and high <= bounds[1])


def _outliers(
    numbers: pa.Array,
    bounds: tuple[int, int],
    fast: Callable[[pa.Array], pa.StringArray],
    exact: Callable[[int], str],
) -> pa.StringArray:
    """`fast` for what is within the bounds, `exact` for each other number."""

    outside = pc.or_(pc.less(numbers, bounds[0]), pc.greater(numbers, bounds[1]))
    inner = pc.if_else(outside, None, numbers)
    texts = [exact(number) for number in numbers.filter(outside).to_pylist()]
    return pc.replace_with_mask(fast(inner), outside.fill_null(False), pa.array(texts, TEXT))


def _day(day: int) -> str:
    """A date by its day number; years outside 1 to 9999 in the expanded form of ISO 8601."""

    if abs(day) >= _INFINITE_DAYS:
        return "infinity" if day > 0 else "-infinity"
    if _DAYS[0] <= day <= _DAYS[1]:
        return (_EPOCH + dt.timedelta(days=day)).isoformat()
    # Proleptic Gregorian years repeat every 400 years, which are 146,097 days.
    cycles = math.floor((day - _DAYS[0]) / 146_097)
    inside = _EPOCH + dt.timedelta(days=day - cycles * 146_097)
    year = inside.year + 400 * cycles
    return f"{year:+05d}-{inside.month:02d}-{inside.day:02d}"


def _clock(micros: int) -> str:
    seconds, fraction = divmod(micros, 1_000_000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{fraction:06d}"


def _instant(tick: int, unit: str, zone: str) -> str:
    if abs(tick) >= _INFINITE_TICKS:
        return "infinity" if tick > 0 else "-infinity"
    micros, nanos = divmod(tick, 1000) if unit == "ns" else (tick, 0)
    day, rest = divmod(micros, _DAY_US)
    text = f"{_day(day)}T{_clock(rest)}"
    return text + (f"{nanos:03d}" if unit == "ns" else "") + zone
