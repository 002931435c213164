"""Which Arrow values become which column values without loss, and the checked cast that does it.

The rule is by pair of types (contract A10): between integers, decimals and times by checked
kernels; to floats with rounding to nearest but never to infinity; never from a float to a decimal
(its digits would come through a double), never between zoned and unzoned times, never from numbers
to text or back.
"""

from __future__ import annotations

import base64
import decimal
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from storage.rows import cells
from storage.rows.decoded import shorten
from storage.rows.json_text import compact_json
from storage.rows.nested_arrays import items_of
from storage.rows.nested_casts import cast_nested
from storage.rows.refusals import Refusals
from storage.rows.types import ColumnType, Family, is_list


class CastRefused(ValueError):
    """The text is the reason, for the caller."""


def cast_column(source: pa.Array, kind: ColumnType, found: Refusals) -> pa.Array:
    """`source` as the column's type; rows that do not fit go into `found`, and what stands for them
    means nothing.

    The common case, where all rows fit, is one kernel.
    """

    plain = plain_array(source)
    if kind.is_nested:
        return _cast_nested(plain, kind, found)
    if plain.type == kind.storage and _is_as_it_is(kind):
        return _as_column(kind, plain)
    if pt.is_null(plain.type):
        return pa.nulls(len(plain), kind.arrow)
    refusal = _pair_refusal(plain.type, kind)
    if refusal is not None:
        return _refused(plain, kind, refusal, found)
    if not len(plain):
        return pa.nulls(0, kind.arrow)
    pieces: list[pa.Array] = []
    _cast_halving(plain, kind, 0, pieces, found)
    whole = pieces[0] if len(pieces) == 1 else pa.concat_arrays(pieces)
    return _as_column(kind, whole)


def _cast_nested(plain: pa.Array, kind: ColumnType, found: Refusals) -> pa.Array:
    if pt.is_null(plain.type):
        return pa.nulls(len(plain), kind.arrow)
    array = cast_nested(plain, kind, found, _cast_part)
    if array is None:
        return _refused(plain, kind, _cannot_become(plain.type, kind), found)
    return array


def _cast_part(source: pa.Array, kind: ColumnType, found: Refusals) -> pa.Array:
    """A part of a nested column; what is refused is shown here, where its array is at hand."""

    array = cast_column(source, kind, found)
    found.found = [
        one
        if one.shown is not None
        else replace(one, shown=show_value(source, one.place) or "null")
        for one in found.found
    ]
    return array


def _cannot_become(source: pa.DataType, kind: ColumnType) -> str:
    return f"Arrow type {shorten(str(source))} cannot become {shorten(kind.sql)}"


def _refused(plain: pa.Array, kind: ColumnType, reason: str, found: Refusals) -> pa.Array:
    found.add_all(np.flatnonzero(plain.is_valid()), reason)
    return pa.nulls(len(plain), kind.arrow)


def plain_array(source: pa.Array) -> pa.Array:
    """Without dictionary, run-end encoding, extension and view layout."""

    if isinstance(source, pa.ExtensionArray):
        source = source.storage
    if pt.is_dictionary(source.type):
        return pc.take(plain_array(source.dictionary), source.indices)
    if pt.is_run_end_encoded(source.type):
        # By indices, because Arrow has no kernel that writes out runs of views.
        ends = np.clip(source.run_ends.to_numpy().astype(np.int64) - source.offset, 0, len(source))
        places = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        return pc.take(plain_array(source.values), pa.array(places))
    if pt.is_string_view(source.type) or pt.is_large_string(source.type):
        return pc.cast(source, pa.string())
    if pt.is_binary_view(source.type) or pt.is_large_binary(source.type):
        return pc.cast(source, pa.binary())
    return source


def _is_as_it_is(kind: ColumnType) -> bool:
    """Types of which every Arrow value fits; the others have a range or a form to check."""

    return kind.family in (
        Family.BOOLEAN,
        Family.INTEGER,
        Family.FLOAT,
        Family.DECIMAL,
        Family.VARCHAR,
        Family.BLOB,
        Family.UUID,
    )


def _as_column(kind: ColumnType, storage: pa.Array) -> pa.Array:
    if isinstance(kind.arrow, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind.arrow, storage)
    return storage


_IsType = Callable[[pa.DataType], bool]
_SOURCES: dict[Family, tuple[_IsType, ...]] = {
    Family.BOOLEAN: (pt.is_boolean,),
    Family.INTEGER: (pt.is_integer, pt.is_floating, pt.is_decimal),
    Family.FLOAT: (pt.is_floating, pt.is_integer, pt.is_decimal),
    Family.DECIMAL: (pt.is_decimal, pt.is_integer),
    Family.VARCHAR: (pt.is_string,),
    Family.BLOB: (pt.is_binary, pt.is_fixed_size_binary),
    Family.DATE: (pt.is_date,),
    Family.TIME: (pt.is_time,),
    Family.TIMESTAMP: (pt.is_timestamp,),
    Family.TIMESTAMPTZ: (pt.is_timestamp,),
    Family.UUID: (pt.is_string,),
    Family.JSON: (pt.is_string,),
}


def _pair_refusal(source: pa.DataType, kind: ColumnType) -> str | None:
    """Why no value of the source type can become the column's type, None when some can."""

    if not any(test(source) for test in _SOURCES[kind.family]):
        return _cannot_become(source, kind)
    if pt.is_timestamp(source):
        if kind.family is Family.TIMESTAMP and source.tz is not None:
            return "has a zone, and the column has none"
        if kind.family is Family.TIMESTAMPTZ and source.tz is None:
            return "has no zone, and the column has one"
    return None


def _cast_halving(
    array: pa.Array,
    kind: ColumnType,
    start: int,
    pieces: list[pa.Array],
    found: Refusals,
) -> None:
    if found.found:
        # The rest of a row that is refused already.
        known = min(found.row_end(found.found[-1].place) - start, len(array))
        if known > 0:
            pieces.append(pa.nulls(known, kind.storage))
            array, start = array.slice(known), start + known
            if not len(array):
                return
    try:
        pieces.append(_cast(array, kind))
        return
    except (pa.ArrowException, ValueError) as fault:
        if len(array) == 1:
            reason = str(fault) if isinstance(fault, CastRefused) else _reason(array.type, kind)
            found.add(start, reason)
            pieces.append(pa.nulls(1, kind.storage))
            return
    middle = len(array) // 2
    _cast_halving(array.slice(0, middle), kind, start, pieces, found)
    _cast_halving(array.slice(middle), kind, start + middle, pieces, found)


def _reason(source: pa.DataType, kind: ColumnType) -> str:
    return f"this {source} does not fit {kind.sql} without loss"


def _cast(array: pa.Array, kind: ColumnType) -> pa.Array:
    """The checked cast of an allowed pair. Raises ArrowInvalid or CastRefused."""

    match kind.family:
        case Family.FLOAT:
            return _to_float(array, kind)
        case Family.INTEGER if pt.is_floating(array.type):
            return _float_to_integer(array, kind)
        case Family.UUID:
            return _each_text(array, kind)
        case Family.JSON:
            return _each_json(array)
        case Family.DATE:
            return _in_range(pc.cast(array, kind.storage), cells.DATE_DAYS_MIN, cells.DATE_DAYS_MAX)
        case Family.TIME:
            return _in_range(pc.cast(array, kind.storage), 0, cells.DAY_US - 1)
        case Family.TIMESTAMP | Family.TIMESTAMPTZ:
            cast = pc.cast(array, kind.storage)
            return _in_range(cast, cells.TIMESTAMP_US_MIN, cells.TIMESTAMP_US_MAX)
        case Family.DECIMAL if pt.is_integer(array.type):
            # Through the widest decimal: the direct kernel asks the source type to fit whole.
            return pc.cast(pc.cast(array, pa.decimal256(76, kind.scale)), kind.storage)
        case Family.DECIMAL:
            return pc.cast(_in_decimal_range(array, kind), kind.storage)
        case _:
            return pc.cast(array, kind.storage)


def _in_decimal_range(array: pa.Array, kind: ColumnType) -> pa.Array:
    """Arrow 26 scales up without looking whether the bits are enough, so the values are judged
    before: what is in range needs no more digits than there are."""

    bounds = pc.min_max(array).as_py()
    most = decimal.Decimal(10) ** (kind.precision - kind.scale)
    if bounds["min"] is not None and (bounds["min"] <= -most or bounds["max"] >= most):
        raise CastRefused(f"out of range for {kind.sql}")
    return array


def _to_float(array: pa.Array, kind: ColumnType) -> pa.Array:
    narrow = pc.cast(array, kind.storage, safe=False)
    infinite = pc.is_inf(narrow)
    if pt.is_floating(array.type):
        infinite = pc.and_not(infinite, pc.is_inf(pc.cast(array, pa.float64())))
    if pc.any(infinite).as_py():
        raise CastRefused(f"too large for {kind.sql}")
    return narrow


def _float_to_integer(array: pa.Array, kind: ColumnType) -> pa.Array:
    if pc.any(pc.invert(pc.is_finite(array))).as_py():
        raise CastRefused(f"not a number that {kind.sql} holds")
    return pc.cast(pc.cast(array, pa.float64()), kind.storage)


def _in_range(array: pa.Array, low: int, high: int) -> pa.Array:
    numbers = array.view(pa.int32() if pt.is_date(array.type) else pa.int64())
    bounds = pc.min_max(numbers).as_py()
    if bounds["min"] is not None and (bounds["min"] < low or bounds["max"] > high):
        raise CastRefused("out of range (years are 0001 to 9999, times of day below 24:00)")
    return array


def _each_text(array: pa.Array, kind: ColumnType) -> pa.Array:
    values = [cells.cell_of(kind, text, "") for text in array.to_pylist()]
    return pa.array(values, kind.storage)


def _each_json(array: pa.Array) -> pa.Array:
    try:
        texts = [None if t is None else compact_json(t.encode("utf-8")) for t in array.to_pylist()]
    except (msgspec.MsgspecError, RecursionError) as fault:
        raise CastRefused(f"not JSON text: {fault}") from None
    # JSON null is null in every column, as in JSON bodies.
    compact = [None if text == b"null" else text for text in texts]
    return pc.cast(pa.array(compact, pa.binary()), pa.string())


def show_value(source: pa.Array, row: int) -> str | None:
    """One value as errors show it."""

    value = _json_value(source, row)
    if value is None:
        return None
    if isinstance(value, list | dict):
        return shorten(msgspec.json.encode(value).decode("utf-8"))
    return shorten(value if isinstance(value, str) else str(value))


def _nested_json(cell: pa.Array) -> Any:
    """One nested value; a map with text keys is an object, as any other a list of pairs."""

    kind = cell.type
    if pt.is_struct(kind):
        fields = zip(kind, cell.flatten(), strict=True)
        return {field.name: _json_value(part, 0) for field, part in fields}
    if not is_list(kind) and not pt.is_map(kind):
        return str(cell[0])
    _, items = items_of(cell)
    if not pt.is_map(kind):
        return [_json_value(items, place) for place in range(len(items))]
    keys, values = items.flatten()
    pairs = [(_json_value(keys, n), _json_value(values, n)) for n in range(len(items))]
    if pt.is_string(kind.key_type) and len(dict(pairs)) == len(pairs):
        return dict(pairs)
    return [{"key": key, "value": value} for key, value in pairs]


def row_json(received: pa.RecordBatch, row: int) -> bytes:
    """A received row as JSON text, in the spellings that JSON ingest takes."""

    cells_by_name = {
        name: _json_value(received.column(position), row)
        for position, name in enumerate(received.schema.names)
    }
    return msgspec.json.encode(cells_by_name)


def _json_value(source: pa.Array, row: int) -> Any:
    cell = plain_array(source.slice(row, 1))
    if cell.null_count or pt.is_null(cell.type):
        return None
    if pt.is_nested(cell.type):
        return _nested_json(cell)
    if pt.is_binary(cell.type) or pt.is_fixed_size_binary(cell.type):
        return base64.b64encode(cell[0].as_py()).decode("ascii")
    if pt.is_boolean(cell.type):
        return cell[0].as_py()
    if pt.is_floating(cell.type):
        number = float(cell[0].as_py())
        words = {math.inf: "Infinity", -math.inf: "-Infinity"}
        return "NaN" if math.isnan(number) else words.get(number, number)
    if pt.is_integer(cell.type):
        number = cell[0].as_py()
        return number if abs(number) < 1 << 53 else str(number)
    try:
        text = pc.cast(cell, pa.string())[0].as_py()
    except pa.ArrowException:
        return str(cell[0])
    return text.replace(" ", "T", 1) if pt.is_timestamp(cell.type) else text
