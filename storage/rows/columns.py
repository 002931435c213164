"""Columns from values: the fast path's vectorised builders, and the exact one of the slow pass.

A fast builder takes one column's values as msgspec decoded them (`field_type` says how) and either
gives the array or raises one of `REFUSALS`; then the slow pass decides. A builder never has to
explain, it only must not accept what `cells.py` refuses. What looks odd here is measured:

* decimals arrive as the raw JSON text of each value, are joined, checked to be plain digits in one
  sweep and parsed by Arrow: three times as fast as `decimal.Decimal`, and no digit passes a double.
  Text with an exponent goes to the slow pass: Arrow 26 crashes on `1e-1000000000`.
* RFC 3339 text is cast by Arrow, whose grammar is wider than the RFC's (`2026-01-31T12`, year
  0000, `+0530`); two checks of fixed byte places close the gap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.rows import cells
from storage.rows.json_text import compact_json
from storage.rows.types import ColumnType, Family

Builder = Callable[[Sequence[Any]], pa.Array]

#: What a fast builder (and msgspec) raises for input that the slow pass has to look at.
REFUSALS = (
    msgspec.MsgspecError,
    pa.ArrowException,
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
)


def field_type(kind: ColumnType) -> Any:
    """How msgspec decodes a value of this type; wide enough for all usual spellings."""

    match kind.family:
        case Family.BOOLEAN:
            return bool
        case Family.INTEGER:
            return int | str if kind.integer_text_allowed else int
        case Family.FLOAT:
            return float | Literal["NaN", "Infinity", "-Infinity"]
        case Family.DECIMAL | Family.JSON:
            return msgspec.Raw
        case _:
            return str


def builder_of(kind: ColumnType) -> Builder:
    """The vectorised builder for values decoded as `field_type(kind)`."""

    match kind.family:
        case Family.INTEGER if kind.integer_text_allowed:
            return functools.partial(_wide_integers, kind.arrow)
        case Family.FLOAT:
            return _floats if kind.bits == 64 else _floats32
        case Family.DECIMAL:
            return functools.partial(_decimals, kind)
        case Family.BLOB:
            return _blobs
        case Family.DATE:
            return _dates
        case Family.TIME:
            return _times
        case Family.TIMESTAMP:
            return _timestamps
        case Family.TIMESTAMPTZ:
            return _timestamps_with_zone
        case Family.UUID:
            return _uuids
        case Family.JSON:
            return _json_texts
        case _:
            return functools.partial(_plain, kind.arrow)


def array_of_cells(kind: ColumnType, values: Sequence[Any]) -> pa.Array:
    """The array for values that `cells.cell_of` accepted."""

    if kind.family is Family.DECIMAL:
        values = [None if v is None else Decimal(f"{v}E-{kind.scale}") for v in values]
    if kind.family is Family.FLOAT and kind.bits == 32:
        return pc.cast(pa.array(values, pa.float64()), pa.float32())
    return _in_type(kind, pa.array(values, kind.storage))


def _in_type(kind: ColumnType, storage: pa.Array) -> pa.Array:
    if kind.arrow is kind.storage or kind.arrow == storage.type:
        return storage
    return pa.ExtensionArray.from_storage(kind.arrow, storage)


def _plain(arrow: pa.DataType, values: Sequence[Any]) -> pa.Array:
    return pa.array(values, arrow)


def _wide_integers(arrow: pa.DataType, values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values, arrow)
    except (pa.ArrowInvalid, TypeError):
        return pa.array(_integers_from_text(values), arrow)


def integers_from_text(arrow: pa.DataType, texts: Sequence[str | None]) -> pa.Array:
    """An integer column of any width from the text of each value."""

    return pa.array(_integers_from_text(texts), arrow)


_DIGITS = str.maketrans("", "", "0123456789-,")


def _integers_from_text(values: Sequence[Any]) -> list[int | None]:
    """Integers of which some are strings. A string must be a JSON integer by itself."""

    texts = ["null" if v is None else v if type(v) is str else str(int(v)) for v in values]
    joined = ",".join(texts)
    rest = joined.translate(_DIGITS)
    if rest and rest != "null" * sum(v is None for v in values):
        raise ValueError("a string is not a plain integer")
    integers = msgspec.json.decode(f"[{joined}]", type=list[int | None])
    if len(integers) != len(values):
        raise ValueError("a string is not one integer")
    return integers


def _floats(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values, pa.float64())
    except pa.ArrowInvalid:
        words = cells.FLOAT_WORDS
        return pa.array([words[v] if type(v) is str else v for v in values], pa.float64())


def _floats32(values: Sequence[Any]) -> pa.Array:
    doubles = _floats(values)
    narrow = pc.cast(doubles, pa.float32())
    if pc.sum(pc.is_inf(narrow)) != pc.sum(pc.is_inf(doubles)):
        raise ValueError("a double is too large for float")
    return narrow


_PLAIN_NUMBER = b"0123456789-."
#: Sign, point, and all digits a decimal128 can hold; longer text may be zeros, the slow pass knows.
_DECIMAL_TEXT_MAX = 38
_WIDE_DIGITS = 76


def _decimals(kind: ColumnType, raws: Sequence[Any]) -> pa.Array:
    try:
        joined = b",".join(raws)
    except TypeError:
        joined = b",".join([b"null" if raw is None else raw for raw in raws])
    commas = b"," * (len(raws) - 1)
    if joined.translate(None, _PLAIN_NUMBER) != commas:
        joined = _unusual_decimals(joined, commas)
    array = _split_at_commas(joined)
    longest = _lengths(array).max()
    if len(array) != len(raws) or longest > _DECIMAL_TEXT_MAX:
        raise ValueError("a number is too long for the fast way")
    if longest + kind.scale > _DECIMAL_TEXT_MAX:
        # Arrow 26 scales up within 128 bits without looking whether they are enough.
        array = pc.cast(array, pa.decimal256(_WIDE_DIGITS, kind.scale))
    return pc.cast(array, kind.arrow)


def _unusual_decimals(joined: bytes, commas: bytes) -> bytes:
    """Decimals of which some are strings or null, as joined text without the quotes."""

    if b'"null"' in joined:
        raise ValueError("a string says null")
    plain = joined.translate(None, b'"')
    rest = plain.translate(None, _PLAIN_NUMBER)
    if rest != commas and plain.replace(b"null", b"").translate(None, _PLAIN_NUMBER) != commas:
        raise ValueError("not plain numbers")
    # Strings bring grammar that JSON numbers cannot have: 00.5, 1., a lone minus, nothing at all.
    if len(_RAW_VALUES.decode(b"[%b]" % plain)) != len(commas) + 1:
        raise ValueError("a string is not one number")
    return plain


_RAW_VALUES = msgspec.json.Decoder(list[msgspec.Raw])
_COMMA = ord(",")


def _split_at_commas(joined: bytes) -> pa.Array:
    """ASCII texts joined by commas, as an array; `null` is null."""

    if b"null" in joined:
        texts = joined.decode("ascii").split(",")
        return pa.array([None if text == "null" else text for text in texts], pa.string())
    commas = np.flatnonzero(np.frombuffer(joined, np.uint8) == _COMMA)
    offsets = np.zeros(len(commas) + 2, np.int32)
    offsets[1:-1] = commas - np.arange(len(commas))
    data = joined.translate(None, b",")
    offsets[-1] = len(data)
    return pa.StringArray.from_buffers(
        len(commas) + 1, pa.py_buffer(offsets), pa.py_buffer(data), null_count=0
    )


def _blobs(values: Sequence[Any]) -> pa.Array:
    decode = cells.decode_base64
    return pa.array([None if v is None else decode(v) for v in values], pa.binary())


def _dates(values: Sequence[Any]) -> pa.Array:
    array = pc.cast(pa.array(values, pa.string()), pa.date32())
    days = np.frombuffer(array.buffers()[1], np.int32, len(array))
    # Null slots are zero, so they are in range. Four digits of year cannot pass the upper end.
    if days.min() < cells.DATE_DAYS_MIN:
        raise ValueError("year 0000")
    return array


def _times(values: Sequence[Any]) -> pa.Array:
    full = [None if v is None else "1970-01-01T" + v for v in values]
    return _timestamps(full).view(pa.time64("us"))


_SECONDS_TEXT = len("2026-01-31T12:00:00")
#: Both colons of the time of day: `12+05:30` has one in the place of the second, but not the first.
_COLONS = (len("2026-01-31T12"), len("2026-01-31T12:00"))


def _timestamps(values: Sequence[Any]) -> pa.Array:
    texts = pa.array(values, pa.string())
    # Without a zone, a text of this length that Arrow reads has its seconds.
    if texts.null_count:
        _check_length(_present(values), _SECONDS_TEXT)
    elif len(texts) and _lengths(texts).min() < _SECONDS_TEXT:
        raise ValueError("a time leaves something out")
    return _check_years(pc.cast(texts, _LOCAL))


def _timestamps_with_zone(values: Sequence[Any]) -> pa.Array:
    present = _present(values)
    if "".join(present).count("Z") == len(present):
        # Arrow reads a Z only at the end, so each text has its own there.
        _check_length(present, _SECONDS_TEXT + 1)
    else:
        _check_offsets(pa.array(present, pa.string()))
    return _check_years(pc.cast(pa.array(values, pa.string()), _UTC))


_LOCAL, _UTC = pa.timestamp("us"), pa.timestamp("us", "UTC")


def _present(values: Sequence[Any]) -> Sequence[str]:
    return [v for v in values if v is not None] if None in values else values


def _check_length(texts: Sequence[str], length_min: int) -> None:
    if min(map(len, texts), default=length_min) < length_min:
        raise ValueError("a time leaves something out")


def _check_offsets(texts: pa.Array) -> None:
    """Refuses what Arrow reads and RFC 3339 does not know: no seconds, `+0530`, `+05`."""

    offsets = _offsets(texts)
    starts, ends = offsets[:-1], offsets[1:]
    if (ends - starts).min() < _SECONDS_TEXT:
        raise ValueError("a time is too short")
    data = np.frombuffer(texts.buffers()[2], np.uint8)
    for place in _COLONS:
        if not (data[starts + place] == ord(":")).all():
            raise ValueError("a time has no minutes or no seconds")
    if not ((data[ends - 1] == ord("Z")) | (data[ends - 3] == ord(":"))).all():
        raise ValueError("a zone is not spelled as RFC 3339 asks")


def _check_years(array: pa.Array) -> pa.Array:
    instants = np.frombuffer(array.buffers()[1], np.int64, len(array))
    if instants.min() < cells.TIMESTAMP_US_MIN or instants.max() > cells.TIMESTAMP_US_MAX:
        raise ValueError("outside of the years 0001 to 9999")
    return array


def _lengths(array: pa.Array) -> NDArray[np.int32]:
    offsets = _offsets(array)
    return offsets[1:] - offsets[:-1]


def _offsets(array: pa.Array) -> NDArray[np.int32]:
    return np.frombuffer(array.buffers()[1], np.int32, len(array) + 1)


_UUID_TEXT = len("0f2b4c1e-0000-4000-8000-000000000000")
_UUID_DASHES = np.array([8, 13, 18, 23])


def _uuids(values: Sequence[Any]) -> pa.Array:
    present = [v for v in values if v is not None]
    packed = _packed_uuids(present) if present else b""
    data = iter(memoryview(packed)[i : i + 16] for i in range(0, len(packed), 16))
    if len(present) == len(values):
        storage = pa.Array.from_buffers(
            pa.binary(16), len(values), [None, pa.py_buffer(packed)], null_count=0
        )
    else:
        storage = pa.array(
            [None if v is None else bytes(next(data)) for v in values], pa.binary(16)
        )
    return pa.ExtensionArray.from_storage(pa.uuid(), storage)


def _packed_uuids(texts: Sequence[str]) -> bytes:
    joined = "\n".join(texts).encode("ascii") + b"\n"
    if len(joined) != (_UUID_TEXT + 1) * len(texts):
        raise ValueError("a uuid has another length")
    table = np.frombuffer(joined, np.uint8).reshape(len(texts), _UUID_TEXT + 1)
    if not (table[:, _UUID_TEXT] == ord("\n")).all() or not (table[:, _UUID_DASHES] == 45).all():
        raise ValueError("a uuid has another form")
    packed = bytes.fromhex(joined.translate(None, b"-\n").decode("ascii"))
    if len(packed) != 16 * len(texts):
        raise ValueError("a uuid has other characters")
    return packed


def _json_texts(raws: Sequence[Any]) -> pa.Array:
    texts = [None if raw is None else bytes(raw) for raw in raws]
    compact = [None if t is None or t == b"null" else compact_json(t) for t in texts]
    # This cast checks UTF-8: msgspec does not look into values that it leaves raw.
    return pc.cast(pa.array(compact, pa.binary()), pa.string())
