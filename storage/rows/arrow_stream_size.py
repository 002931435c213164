"""How large an Arrow stream becomes, known before anything is inflated or written out.

Compressed buffers say their inflated length in their first eight bytes, and the reader allocates
what they say. A short body could therefore ask for any amount of memory; the limits of contract
A11 count decompressed bytes, so the claims are added up first. Only the few fields needed are read
from the flatbuffers of the message headers. Dictionaries, runs and views multiply too: a thousand
rows can point at one long text, so their plain size is computed before they are written out.

Source of the layout: Arrow columnar format, "Encapsulated message format" and Message.fbs; the
flatbuffers binary format (a table starts with the distance back to its vtable of field offsets).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pt

from lakebus.errors import BodyTooLarge
from storage.rows.types import is_list

_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_I64 = struct.Struct("<q")
_BUFFER = struct.Struct("<qq")
_CONTINUATION = -1
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
#: Fields of Message.fbs, by their place in the vtable.
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = 1, 2, 3
_DICTIONARY_DATA = 1
#: What a null without a type takes as a value of a column.
_NULL_BYTES = 16
_BATCH_BUFFERS, _BATCH_COMPRESSION = 2, 3


def check_decompressed_size(content: memoryview, *, limit_bytes: int) -> None:
    """Raises BodyTooLarge when the buffers claim more than `limit_bytes` together.

    Raises ValueError when the headers make no sense; the caller answers malformed_body.
    """

    total = 0
    try:
        for claimed in _claims(content):
            if claimed < -1:
                raise ValueError("a buffer claims a negative length")
            total += max(0, claimed)
            _refuse_beyond(total, limit_bytes)
    except (struct.error, IndexError):
        raise ValueError("a message header points outside of the stream") from None


def check_expanded_size(batch: pa.RecordBatch, *, limit_bytes: int) -> None:
    """Raises BodyTooLarge when the columns hold more than `limit_bytes` as plain values.

    Raises ValueError for encodings of values that no column can hold.
    """

    total = 0
    for array in batch.columns:
        total += _plain_bytes(array)
        _refuse_beyond(total, limit_bytes)


def _plain_bytes(array: pa.Array) -> int:
    """Bytes of text and binary values that an encoded array stands for; 0 for a plain one. Inside
    of lists there may be more values than rows, and of some a stream holds no byte: each counts."""

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pt.is_dictionary(array.type):
        return _sum(pc.take(_lengths(array.dictionary), array.indices))
    if pt.is_run_end_encoded(array.type):
        ends = np.clip(array.run_ends.to_numpy().astype(np.int64) - array.offset, 0, len(array))
        repeats = np.diff(ends, prepend=0)
        return int((pc.fill_null(_lengths(array.values), 0).to_numpy() * repeats).sum())
    if pt.is_string_view(array.type) or pt.is_binary_view(array.type):
        return _sum(_lengths(array))
    if pt.is_nested(array.type):
        return sum(_value_bytes(part) + _plain_bytes(part) for part in _parts(array))
    return 0


def _parts(array: pa.Array) -> list[pa.Array]:
    """What a nested array is made of, as it lies there."""

    if pt.is_struct(array.type):
        return [array.field(place) for place in range(array.type.num_fields)]
    if is_list(array.type) or pt.is_map(array.type):
        return [array.values]
    raise ValueError(f"columns of type {array.type} are not supported")


def _value_bytes(values: pa.Array) -> int:
    if pt.is_null(values.type):
        return _NULL_BYTES * len(values)
    return len(values) if pt.is_nested(values.type) else 0


def _lengths(values: pa.Array) -> pa.Array:
    kind = values.type
    if pt.is_string_view(kind) or pt.is_binary_view(kind):
        # A view starts with its length, then has twelve bytes of text or place.
        views = np.frombuffer(values.buffers()[1], "<i4").reshape(-1, 4)
        lengths = views[values.offset : values.offset + len(values), 0].astype(np.int64)
        return pa.array(lengths * values.is_valid().to_numpy(zero_copy_only=False))
    if any(test(kind) for test in (pt.is_string, pt.is_large_string, pt.is_binary)):
        return pc.cast(pc.binary_length(values), pa.int64())
    if pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind):
        return pc.cast(pc.binary_length(values), pa.int64())
    if pt.is_nested(kind) or pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        raise ValueError(f"a column encodes values of type {kind}, which is not supported")
    return pa.array(np.full(len(values), 16, np.int64))


def _sum(lengths: pa.Array) -> int:
    return int(pc.sum(lengths).as_py() or 0)


def _refuse_beyond(total: int, limit_bytes: int) -> None:
    if total > limit_bytes:
        raise BodyTooLarge(
            "the Arrow stream is too large when decompressed; send it in several requests",
            limit_bytes=limit_bytes,
        )


def _claims(content: memoryview) -> Iterator[int]:
    """The inflated length that each compressed buffer claims (-1: it is not compressed)."""

    position = 0
    while position + 8 <= len(content):
        marker, size = _I32.unpack_from(content, position)[0], None
        if marker == _CONTINUATION:
            size = _I32.unpack_from(content, position + 4)[0]
            position += 8
        else:
            # Streams from before Arrow 0.15 have no continuation mark.
            size = marker
            position += 4
        if size <= 0:
            return
        message = content[position : position + size]
        position += size
        root = _indirect(message, 0)
        body_length = _scalar(message, root, _MESSAGE_BODY_LENGTH, _I64)
        if body_length < 0:
            raise ValueError("a message claims a negative length")
        yield from _batch_claims(message, root, content[position : position + body_length])
        position += body_length


def _batch_claims(message: memoryview, root: int, body: memoryview) -> Iterator[int]:
    at = _field(message, root, _MESSAGE_HEADER_TYPE)
    kind = message[root + at] if at else 0
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return
    batch = _child(message, root, _MESSAGE_HEADER)
    if batch and kind == _DICTIONARY_BATCH:
        batch = _child(message, batch, _DICTIONARY_DATA)
    if not batch or not _field(message, batch, _BATCH_COMPRESSION):
        return
    vector = _child(message, batch, _BATCH_BUFFERS)
    if not vector:
        return
    for number in range(_I32.unpack_from(message, vector)[0]):
        offset, length = _BUFFER.unpack_from(message, vector + 4 + number * _BUFFER.size)
        if length >= 8:
            yield _I64.unpack_from(body, offset)[0] if offset >= 0 else -2


def _indirect(data: memoryview, at: int) -> int:
    target = at + int(_I32.unpack_from(data, at)[0])
    if not 0 <= target < len(data):
        raise ValueError("a message header points outside of itself")
    return target


def _field(data: memoryview, table: int, number: int) -> int:
    """Distance of a field from its table, 0 when it is absent."""

    vtable = table - int(_I32.unpack_from(data, table)[0])
    if vtable < 0:
        raise ValueError("a message header points outside of itself")
    entry = 4 + 2 * number
    if entry + 2 > _U16.unpack_from(data, vtable)[0]:
        return 0
    return int(_U16.unpack_from(data, vtable + entry)[0])


def _scalar(data: memoryview, table: int, number: int, form: struct.Struct) -> int:
    at = _field(data, table, number)
    return int(form.unpack_from(data, table + at)[0]) if at else 0


def _child(data: memoryview, table: int, number: int) -> int:
    at = _field(data, table, number)
    return _indirect(data, table + at) if at else 0
