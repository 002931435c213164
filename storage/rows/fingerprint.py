"""Payload identity: one hash of what the rows of an entry mean (contract A4), version 1.

Two payloads have one fingerprint exactly when they hold the same values in the same row order, per
table by column id. So encodings, chunks, slices, dictionaries, field order and library versions
must not enter, and the canonical form is written down here rather than taken from a library:

::

    "lakebus.payload.v1\\0"
    for each table with rows, by table id:
        "T" | table id u64 | rows u64
        for each column that is not null in all rows, by column id:
            "C" | column id u64 | tag (1 byte) | parameter u8 | validity | values
    "E"

    validity: 0x00 when no row is null, else 0x01 and one byte a row (1: not null)
    values  : one item a row, nulls as zeros (or as nothing, length 0)

Numbers are little endian. By tag:

====  ==================  ===================================================================
b     boolean             one byte a row, 0 or 1
i     integers, signed    8 bytes, two's complement
i     utinyint..uinteger  8 bytes, the same number
u     ubigint             8 bytes, unsigned
f     float, double       IEEE 754 double; -0.0 as 0.0; every NaN as 0x7ff8000000000000
d     decimal             16 bytes, two's complement of value * 10^scale; parameter: the scale
s     varchar, json       lengths u32 a row, then all bytes of UTF-8
x     blob                lengths u32 a row, then all bytes
D     date                8 bytes, days since 1970-01-01
t     time                8 bytes, microseconds since midnight
p     timestamp           8 bytes, microseconds since 1970-01-01T00:00:00, without zone
z     timestamptz         the same in UTC
g     uuid                16 bytes, as printed
l     list                lengths u32 a row, then the elements of all rows as an inner block
m     map                 lengths u32 a row, then keys and values of all rows as inner blocks
r     struct              fields u16, then for each: name length u8, name, inner block
====  ==================  ===================================================================

An inner block is ``tag (1 byte) | parameter u8 | validity | values`` of as many items as the lists
or maps of all rows have together, or as there are rows in a struct; or ``"0" | 0x00`` when none of
them has a value. Null rows have no items, and their fields are null. The entries of each map are in
the order of its keys: numbers, times and booleans by value with NaN last, texts, blobs and uuids
bytewise. Fields are written by name, bytewise, and only those that have a value in some row; so an
absent field equals a null one, while a struct of nulls differs from null. Nothing of this changes
the hash of a payload without nested columns.

Widths do not enter where a widening keeps values (integers, floats, decimal precision). An absent
column equals a null one: neither is written. Vectors: tests/vectors/fingerprint_v1.json and
fingerprint_nested_v1.json.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import types as pt

from storage.rows.fingerprint_nested import hash_nested, tag_of
from storage.rows.segment import EntryPart

_DOMAIN = b"lakebus.payload.v1\0"
_TABLE = struct.Struct("<cQQ")
_COLUMN = struct.Struct("<cQcB")
_INSIDE = struct.Struct("<cB")
_NOTHING = b"0\0"
_TEXT_PREFIX = "v1:"

_Update = Callable[[Any], None]


def fingerprint(parts: Sequence[EntryPart]) -> bytes:
    """The 32 bytes of payload identity. Several parts of one table are its rows in that order."""

    digest = hashlib.sha256(_DOMAIN)
    tables: dict[int, list[pa.RecordBatch]] = {}
    for part in parts:
        if part.batch.num_rows:
            tables.setdefault(part.table_id, []).append(part.batch)
    for table_id in sorted(tables):
        _hash_table(digest.update, table_id, tables[table_id])
    digest.update(b"E")
    return digest.digest()


def fingerprints(table_id: int, batch: pa.RecordBatch, ends: Sequence[int]) -> list[bytes]:
    """`fingerprint` of each run of a batch's rows: run n ends before row `ends[n]`, where the next
    one begins. Columns are made canonical once for all runs, which is what a small run costs."""

    starts = [0, *ends[:-1]]
    runs: list[list[Any]] = [
        [_DOMAIN, _TABLE.pack(b"T", table_id, end - start)] if end > start else [_DOMAIN]
        for start, end in zip(starts, ends, strict=True)
    ]
    by_id = dict(zip(map(int, batch.schema.names), batch.columns, strict=True))
    for column_id in sorted(by_id):
        _cut_column(column_id, by_id[column_id], starts, ends, runs)
    return [hashlib.sha256(b"".join([*pieces, b"E"])).digest() for pieces in runs]


def fingerprint_text(digest: bytes) -> str:
    """The form in receipts: version and hexadecimal."""

    return _TEXT_PREFIX + digest.hex()


def _hash_table(update: _Update, table_id: int, batches: list[pa.RecordBatch]) -> None:
    rows = sum(batch.num_rows for batch in batches)
    update(_TABLE.pack(b"T", table_id, rows))
    if len(batches) == 1:
        batch = batches[0]
        arrays = dict(zip(map(int, batch.schema.names), batch.columns, strict=True))
    else:
        arrays = _joined(batches)
    for column_id in sorted(arrays):
        array = arrays[column_id]
        if array.null_count != rows or _nulls_are_hidden(array.type):
            _hash_column(update, column_id, array, rows)


def _joined(batches: list[pa.RecordBatch]) -> dict[int, pa.Array]:
    """Each column over all batches; a batch without it has nulls there."""

    types: dict[str, pa.DataType] = {}
    for batch in batches:
        for field in batch.schema:
            if not pt.is_null(field.type):
                types.setdefault(field.name, _plain_type(field.type))
    joined = {}
    for name, kind in types.items():
        pieces = []
        for batch in batches:
            position = batch.schema.get_field_index(name)
            if position < 0:
                pieces.append(pa.nulls(batch.num_rows, kind))
                continue
            array = _plain(batch.column(position))
            pieces.append(pc.cast(array, kind) if array.type != kind else array)
        joined[int(name)] = pa.concat_arrays(pieces)
    return joined


def _nulls_are_hidden(kind: pa.DataType) -> bool:
    """Encodings whose `null_count` does not tell how many values are null."""

    return bool(pt.is_dictionary(kind) or pt.is_run_end_encoded(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return _plain(pa.nulls(0, kind)).type


def _plain(array: pa.Array) -> pa.Array:
    """Without extension, dictionary, run-end and view encodings, and in microseconds."""

    kind = array.type
    if kind.id in _FORMS and kind.id != _TIME:
        return array
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
        kind = array.type
    if pt.is_dictionary(kind):
        return _plain(array.dictionary_decode())
    if pt.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(array))
    if pt.is_string_view(kind) or pt.is_large_string(kind):
        return pc.cast(array, pa.string())
    if pt.is_binary_view(kind) or pt.is_large_binary(kind):
        return pc.cast(array, pa.binary())
    if pt.is_timestamp(kind) and kind.unit != "us":
        return pc.cast(array, pa.timestamp("us", kind.tz))
    if pt.is_time(kind) and kind != pa.time64("us"):
        return pc.cast(array, pa.time64("us"))
    if pt.is_date64(kind):
        return pc.cast(array, pa.date32())
    return array


def _hash_column(update: _Update, column_id: int, array: pa.Array, rows: int) -> None:
    array = _plain(array)
    nulls = array.null_count
    if nulls == rows:
        return
    kind = array.type
    tag, parameter, hash_values = _form_of(kind)
    update(_COLUMN.pack(b"C", column_id, tag, parameter))
    _hash_validity_and_values(update, array, nulls, hash_values)


def _hash_inside(update: _Update, array: pa.Array) -> None:
    """The values of one place inside of a nested column."""

    array = _plain(array)
    nulls = array.null_count
    if nulls == len(array):
        update(_NOTHING)
        return
    tag, parameter, hash_values = _form_of(array.type)
    update(_INSIDE.pack(tag, parameter))
    _hash_validity_and_values(update, array, nulls, hash_values)


def _hash_validity_and_values(
    update: _Update, array: pa.Array, nulls: int, hash_values: _HashValues
) -> None:
    if nulls:
        valid = _bits(array.buffers()[0], array.offset, len(array))
        update(b"\x01")
        update(valid)
        hash_values(update, array, valid)
    else:
        update(b"\x00")
        hash_values(update, array, None)


_Valid = NDArray[np.uint8] | None
_HashValues = Callable[[_Update, pa.Array, _Valid], None]


def _cut_column(
    column_id: int,
    array: pa.Array,
    starts: Sequence[int],
    ends: Sequence[int],
    runs: Sequence[list[Any]],
) -> None:
    """Adds to each run what the column gives to the hash of its rows."""

    array = _plain(array)
    tag, parameter, hash_values = _form_of(array.type)
    if hash_values is _hash_nested:  # its values lie in several arrays
        for start, end, pieces in zip(starts, ends, runs, strict=True):
            count = end - start
            _hash_column(pieces.append, column_id, array.slice(start, count), count)
        return
    if array.null_count == len(array):
        return
    head = _COLUMN.pack(b"C", column_id, tag, parameter)
    valid = _bits(array.buffers()[0], array.offset, len(array)) if array.null_count else None
    collected: list[Any] = []
    hash_values(collected.append, array, valid)
    items = collected[0].view(np.uint8).data
    width = len(items) // len(array)
    present = None if valid is None else valid.tobytes()
    data: Any = None
    if hash_values is _hash_bytes and len(collected) > 1:
        data = collected[1]
        sums = np.add.accumulate(collected[0], dtype=np.int64)
    for start, end, pieces in zip(starts, ends, runs, strict=True):
        validity = b"\x00"
        if present is not None:
            count = present.count(1, start, end)
            if not count:
                continue
            if count < end - start:
                validity = b"\x01" + present[start:end]
        if end > start:
            pieces += (head, validity, items[start * width : end * width])
            if data is not None:
                pieces.append(data[sums[start - 1] if start else 0 : sums[end - 1]])


def _bits(buffer: pa.Buffer, offset: int, rows: int) -> NDArray[np.uint8]:
    """A bitmap as one byte a row."""

    start = offset & 7
    packed = np.frombuffer(buffer, np.uint8, (start + rows + 7) >> 3, offset >> 3)
    return np.unpackbits(packed, count=start + rows, bitorder="little")[start:]


def _fixed(array: pa.Array, dtype: str, width: int) -> NDArray[Any]:
    """The values of a fixed-width array as they lie in memory, without a copy."""

    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * width)


def _hash_booleans(update: _Update, array: pa.Array, valid: _Valid) -> None:
    bits = _bits(array.buffers()[1], array.offset, len(array))
    update(bits if valid is None else bits & valid)


def _hash_integers(dtype: str, width: int) -> _HashValues:
    def hash_values(update: _Update, array: pa.Array, valid: _Valid) -> None:
        values = _fixed(array, dtype, width)
        if width != 8:
            values = values.astype("<i8")
        update(values if valid is None else np.where(valid, values, values.dtype.type(0)))

    return hash_values


def _hash_floats(dtype: str, width: int) -> _HashValues:
    def hash_values(update: _Update, array: pa.Array, valid: _Valid) -> None:
        # Adding 0.0 turns -0.0 into 0.0 and leaves every other value as it is.
        values = _fixed(array, dtype, width).astype("<f8") + 0.0
        not_numbers = np.isnan(values)
        if not_numbers.any():
            values[not_numbers] = np.nan
        update(values if valid is None else np.where(valid, values, 0.0))

    return hash_values


def _hash_sixteen_bytes(update: _Update, array: pa.Array, valid: _Valid) -> None:
    values = np.frombuffer(array.buffers()[1], "<u8", 2 * len(array), array.offset * 16)
    update(values if valid is None else np.where(valid.repeat(2), values, np.uint64(0)))


def _hash_bytes(update: _Update, array: pa.Array, valid: _Valid) -> None:
    offsets, data = _offsets_and_data(array)
    lengths = offsets[1:] - offsets[:-1]
    if valid is not None and lengths[valid == 0].any():
        # Arrow lets a null slot have bytes behind it; they mean nothing.
        array = pc.fill_null(array, b"" if pt.is_binary(array.type) else "")
        offsets, data = _offsets_and_data(array)
        lengths = offsets[1:] - offsets[:-1]
    update(lengths)
    if data is not None:
        update(memoryview(data)[int(offsets[0]) : int(offsets[-1])])


def _offsets_and_data(array: pa.Array) -> tuple[NDArray[np.int32], pa.Buffer | None]:
    _, offsets, data = array.buffers()
    return np.frombuffer(offsets, "<i4", len(array) + 1, array.offset * 4), data


def _hash_nested(update: _Update, array: pa.Array, valid: _Valid) -> None:
    hash_nested(update, array, _hash_inside)


_EIGHT_BYTES = _hash_integers("<i8", 8)
_FORMS: dict[int, tuple[bytes, _HashValues]] = {
    pa.bool_().id: (b"b", _hash_booleans),
    pa.int8().id: (b"i", _hash_integers("<i1", 1)),
    pa.int16().id: (b"i", _hash_integers("<i2", 2)),
    pa.int32().id: (b"i", _hash_integers("<i4", 4)),
    pa.int64().id: (b"i", _EIGHT_BYTES),
    pa.uint8().id: (b"i", _hash_integers("<u1", 1)),
    pa.uint16().id: (b"i", _hash_integers("<u2", 2)),
    pa.uint32().id: (b"i", _hash_integers("<u4", 4)),
    pa.uint64().id: (b"u", _hash_integers("<u8", 8)),
    pa.float32().id: (b"f", _hash_floats("<f4", 4)),
    pa.float64().id: (b"f", _hash_floats("<f8", 8)),
    pa.string().id: (b"s", _hash_bytes),
    pa.binary().id: (b"x", _hash_bytes),
    pa.date32().id: (b"D", _hash_integers("<i4", 4)),
    pa.time64("us").id: (b"t", _EIGHT_BYTES),
}
_TIMESTAMP, _DECIMAL, _TIME = pa.timestamp("us").id, pa.decimal128(1).id, pa.time64("us").id
_UUID_STORAGE = pa.binary(16)


def _form_of(kind: pa.DataType) -> tuple[bytes, int, _HashValues]:
    """Tag, parameter and hash of a column type. Raises ValueError for what no column can be."""

    form = _FORMS.get(kind.id)
    if form is not None:
        return form[0], 0, form[1]
    if kind.id == _TIMESTAMP:
        return (b"p" if kind.tz is None else b"z"), 0, _EIGHT_BYTES
    if kind.id == _DECIMAL:
        return b"d", kind.scale, _hash_sixteen_bytes
    if kind == _UUID_STORAGE:
        return b"g", 0, _hash_sixteen_bytes
    nested = tag_of(kind)
    if nested is not None:
        return nested, 0, _hash_nested
    raise ValueError(f"Arrow type {kind} is not the type of a column")
