"""Arrow batches to the JSON text of rows, column by column, in the forms of the HTTP API.

Columns are turned to text by pyarrow's kernels, which run without Python's lock, and glued row by
row at the end. The form depends on the type, never on the value (http-api.md, "Query"). Values that
a kernel would write wrongly (years outside 1 to 9999, infinities, text that needs escapes) are
found per batch and go through a slower exact path.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.engine.child_types import Form

_NEEDS_ESCAPE = r'["\\\x00-\x1f\x7f]'
_TEXT = pa.string()
_QUOTE = pa.scalar('"')
_NULL = pa.scalar("null")
_EMPTY = pa.scalar("")
_DAY_US = 86_400_000_000
_FIRST_DAY, _LAST_DAY = dt.date(1, 1, 1), dt.date(9999, 12, 31)
_EPOCH = dt.date(1970, 1, 1)
_DAYS = ((_FIRST_DAY - _EPOCH).days, (_LAST_DAY - _EPOCH).days)
_INFINITE_DAYS = 2**31 - 1
_INFINITE_US = 2**63 - 1


def encode_rows(batch: pa.RecordBatch, forms: tuple[Form, ...]) -> bytes:
    """`[…],[…]` without the outer brackets; empty for no rows."""

    if batch.num_rows == 0:
        return b""
    pieces: list[Any] = []
    for index, form in enumerate(forms):
        pieces.append(pa.scalar("," if index else "["))
        pieces.extend(_pieces(batch.column(index), form))
    pieces.append(pa.scalar("]"))
    rows = pc.binary_join_element_wise(*pieces, _EMPTY)
    return glue(rows, ",")


def glue(rows: pa.StringArray, separator: str) -> bytes:
    """All texts as one, the separator between them."""

    whole = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
    return bytes(pc.binary_join(whole, separator)[0].as_buffer())


def _pieces(values: pa.Array, form: Form) -> list[Any]:
    """What to glue for a column: for columns without nulls the quotes are glued along."""

    if values.null_count == 0 and form.kind in ("quoted", "text"):
        bare = pc.cast(values, _TEXT)
        if form.kind == "quoted" or not _any_escape(bare):
            return [_QUOTE, bare, _QUOTE]
    return [encode(values, form)]


def encode(values: pa.Array, form: Form) -> pa.StringArray:
    """The JSON text of each value; never null."""

    if form.kind == "null" or values.null_count == len(values):
        return pa.repeat(_NULL, len(values))
    encoded = _ENCODERS[form.kind](values, form)
    return pc.fill_null(encoded, "null") if encoded.null_count else encoded


def _quote(texts: pa.StringArray) -> pa.StringArray:
    return pc.binary_join_element_wise(_QUOTE, texts, _QUOTE, _EMPTY)


def _plain(values: pa.Array, _: Form) -> pa.StringArray:
    return pc.cast(values, _TEXT)


def _quoted(values: pa.Array, _: Form) -> pa.StringArray:
    return _quote(pc.cast(values, _TEXT))


def _any_escape(texts: pa.StringArray) -> bool:
    return bool(pc.any(pc.match_substring_regex(texts, _NEEDS_ESCAPE)).as_py())


def _text(values: pa.Array, _: Form) -> pa.StringArray:
    texts = pc.cast(values, _TEXT)
    if not _any_escape(texts):
        return _quote(texts)
    return _each(texts, lambda text: json.dumps(text, ensure_ascii=False))


def _each(values: pa.Array, write: Callable[[Any], str]) -> pa.StringArray:
    return pa.array([None if v is None else write(v) for v in values.to_pylist()], _TEXT)


def _float(values: pa.Array, _: Form) -> pa.StringArray:
    texts = pc.cast(values, _TEXT)
    if bool(pc.all(pc.is_finite(values)).as_py()):
        return texts
    names = pc.if_else(
        pc.is_nan(values), '"NaN"', pc.if_else(pc.less(values, 0), '"-Infinity"', '"Infinity"')
    )
    return pc.if_else(pc.is_finite(values), texts, names)


def _blob(values: pa.Array, _: Form) -> pa.StringArray:
    return _each(values, lambda raw: '"' + base64.b64encode(raw).decode("ascii") + '"')


def _within(numbers: pa.Array, low: int, high: int) -> bool:
    bounds = pc.min_max(numbers)
    return bool(bounds["min"].as_py() >= low and bounds["max"].as_py() <= high)


def _date(values: pa.Array, _: Form) -> pa.StringArray:
    days = values.cast(pa.int32())
    if _within(days, *_DAYS):
        return _quote(pc.cast(values, _TEXT))
    return _each(days, lambda day: f'"{_day_text(day)}"')


def _time(values: pa.Array, _: Form) -> pa.StringArray:
    micros = values.cast(pa.int64())
    if _within(micros, 0, _DAY_US - 1):
        return _quote(pc.cast(values, _TEXT))
    return _each(micros, lambda value: f'"{_clock_text(value)}"')


def _timestamp(values: pa.Array, form: Form) -> pa.StringArray:
    """RFC 3339 with microseconds (nine digits for timestamp_ns); `Z` only with a zone."""

    zone = "Z" if form.kind == "timestamptz" else ""
    unit = values.type.unit
    ticks = values.cast(pa.int64())
    per_day = _DAY_US * (1000 if unit == "ns" else 1)
    if _within(ticks, _DAYS[0] * per_day, (_DAYS[1] + 1) * per_day - 1):
        local = ticks.cast(pa.timestamp(unit))
        text = pc.binary_replace_slice(pc.cast(local, _TEXT), 10, 11, "T")
        return pc.binary_join_element_wise(_QUOTE, text, pa.scalar(zone + '"'), _EMPTY)
    return _each(ticks, lambda tick: f'"{_instant_text(tick, unit, zone)}"')


def _list(values: pa.Array, form: Form) -> pa.StringArray:
    if pa.types.is_fixed_size_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    items, offsets = _items(values)
    encoded = encode(items, form.children[0])
    return _bracketed(values, offsets, encoded, "[", "]")


def _map(values: pa.Array, form: Form) -> pa.StringArray:
    items, offsets = _items(values)
    keys = encode(items.field(0), form.children[0])
    if not _always_quoted(form.children[0]):
        keys = _each(keys, lambda key: key if key[:1] == '"' else json.dumps(key))
    held = encode(items.field(1), form.children[1])
    pairs = pc.binary_join_element_wise(keys, held, ":")
    return _bracketed(values, offsets, pairs, "{", "}")


def _always_quoted(form: Form) -> bool:
    return form.kind in ("text", "quoted", "date", "time", "timestamp", "timestamptz", "blob")


def _items(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The flat items of a list or map array and offsets that start at zero."""

    offsets = values.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    return values.values.slice(first, last - first), pc.subtract(offsets, offsets[0])


def _bracketed(
    values: pa.Array, offsets: pa.Array, encoded: pa.StringArray, left: str, right: str
) -> pa.StringArray:
    mask = values.is_null() if values.null_count else None
    lists = pa.ListArray.from_arrays(offsets, encoded, mask=mask)
    return pc.binary_join_element_wise(left, pc.binary_join(lists, ","), right, _EMPTY)


def _struct(values: pa.StructArray, form: Form) -> pa.StringArray:
    fields = values.flatten()
    pieces: list[Any] = ["{"]
    for index, (name, child) in enumerate(zip(form.names, form.children, strict=True)):
        label = json.dumps(name, ensure_ascii=False)
        pieces += [("," if index else "") + label + ":", encode(fields[index], child)]
    return _masked(pc.binary_join_element_wise(*pieces, "}", _EMPTY), values)


def _tuple(values: pa.StructArray, form: Form) -> pa.StringArray:
    fields = values.flatten()
    pieces: list[Any] = ["["]
    for index, child in enumerate(form.children):
        pieces += ["," if index else "", encode(fields[index], child)]
    return _masked(pc.binary_join_element_wise(*pieces, "]", _EMPTY), values)


def _masked(texts: pa.StringArray, values: pa.Array) -> pa.StringArray:
    return pc.if_else(values.is_null(), _NULL, texts) if values.null_count else texts


def _day_text(day: int) -> str:
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


def _clock_text(micros: int) -> str:
    seconds, fraction = divmod(micros, 1_000_000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{fraction:06d}"


def _instant_text(tick: int, unit: str, zone: str) -> str:
    if abs(tick) >= _INFINITE_US:
        return "infinity" if tick > 0 else "-infinity"
    micros, nanos = divmod(tick, 1000) if unit == "ns" else (tick, 0)
    day, rest = divmod(micros, _DAY_US)
    text = f"{_day_text(day)}T{_clock_text(rest)}"
    return text + (f"{nanos:03d}" if unit == "ns" else "") + zone


_ENCODERS: dict[str, Callable[[pa.Array, Form], pa.StringArray]] = {
    "plain": _plain,
    "quoted": _quoted,
    "text": _text,
    "float": _float,
    "blob": _blob,
    "date": _date,
    "time": _time,
    "timestamp": _timestamp,
    "timestamptz": _timestamp,
    "list": _list,
    "map": _map,
    "struct": _struct,
    "tuple": _tuple,
}
