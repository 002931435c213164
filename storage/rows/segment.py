"""The bus payload: the rows of a group of entries as a few compressed Arrow streams.

A group commit concatenates its entries' batches per table and schema version and writes each as
one Arrow IPC stream of one record batch: compressing once a group costs a quarter of compressing
once an entry. Each entry gets a small index that says which rows of which streams are its own; the
index is kept beside the entry, so entries can be dropped or quarantined without touching the
payload, and the payload is decoded once for all entries that remain.

::

    "LBSG" | version u8 | flags u8 | streams u16 | crc32 u32 | index bytes u32      (16 bytes)
    each stream: ( table id u64 | schema version u32 | reserved u32 | stream bytes u64 )
    index of the only entry (single-entry segments) | stream 0 | stream 1 | …

Numbers are little endian. The checksum covers everything but itself, so a damaged or cut payload
is Corrupt and never rows.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pyarrow as pa

from lakebus.errors import Corrupt

FORMAT_VERSION = 1
#: From so many entries on, zstd costs no more CPU than lz4 and takes a third of the bytes.
ZSTD_ENTRIES_MIN = 16
STREAMS_MAX = 0xFFFF

_MAGIC = b"LBSG"
_HEAD = struct.Struct("<4sBBHII")
_STREAM = struct.Struct("<QIIQ")
_CRC_AT = slice(8, 12)

#: (stream, first row, rows, table id, schema version)
IndexItem = tuple[int, int, int, int, int]
_INDEX_DECODER = msgspec.msgpack.Decoder(list[IndexItem])
_INDEX_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class EntryPart:
    """The rows of one entry for one table: fields named by column id, column types exact.

    `known_bytes`: about what they take in memory, where that is known without asking Arrow, which
    looks at each buffer of a slice.
    """

    table_id: int
    schema_version: int
    batch: pa.RecordBatch
    known_bytes: int | None = field(default=None, compare=False, repr=False)

    @property
    def size_bytes(self) -> int:
        return self.batch.nbytes if self.known_bytes is None else self.known_bytes


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """`entry_indexes[i]` locates entry i; `entry_bytes[i]` is its share of the payload (>= 1)."""

    payload: bytes
    entry_indexes: list[bytes]
    entry_bytes: list[int]


@dataclass(slots=True)
class _Stream:
    table_id: int
    schema_version: int
    batches: list[pa.RecordBatch]
    rows: int = 0


def encode_segment(entries: Sequence[Sequence[EntryPart]]) -> EncodedSegment:
    """The payload of a group commit, and where each entry lies in it."""

    streams, indexes = _lay_out(entries)
    encoded = _encode_streams(streams, _options(len(entries)))
    return EncodedSegment(
        payload=_frame(streams, encoded, b""),
        entry_indexes=[_INDEX_ENCODER.encode(index) for index in indexes],
        entry_bytes=_shares(indexes, streams, encoded),
    )


def single_entry_segment(parts: Sequence[EntryPart]) -> bytes:
    """One entry as a payload that carries its own index, for copies kept apart (quarantine)."""

    streams, indexes = _lay_out([parts])
    encoded = _encode_streams(streams, _options(1))
    return _frame(streams, encoded, _INDEX_ENCODER.encode(indexes[0]))


def decode_segment(payload: bytes | memoryview) -> DecodedSegment:
    """Checks the payload as a whole. Raises Corrupt for any damage."""

    return DecodedSegment(payload)


def decode_single_entry(payload: bytes | memoryview) -> list[EntryPart]:
    """The parts of a `single_entry_segment`. Raises Corrupt."""

    segment = DecodedSegment(payload)
    if not segment.own_index:
        raise Corrupt("the segment holds a group of entries, not a single one")
    return segment.parts(segment.own_index)


class DecodedSegment:
    """A checked payload. Streams are decoded at first use, once for all entries."""

    __slots__ = ("_batches", "_heads", "_spans", "_view", "own_index")

    def __init__(self, payload: bytes | memoryview) -> None:
        view = memoryview(payload)
        if len(view) < _HEAD.size:
            raise Corrupt("the segment is cut short")
        magic, version, _, count, checksum, index_bytes = _HEAD.unpack_from(view)
        if magic != _MAGIC:
            raise Corrupt("the bytes are no segment")
        if _checksum(view) != checksum:
            raise Corrupt("the segment's checksum does not match its bytes")
        if version != FORMAT_VERSION:
            raise Corrupt(f"the segment has format version {version}, which is not known here")
        heads = [_STREAM.unpack_from(view, _HEAD.size + i * _STREAM.size) for i in range(count)]
        start = _HEAD.size + count * _STREAM.size + index_bytes
        self._view = view
        self._heads = [(table_id, schema_version) for table_id, schema_version, _, _ in heads]
        self.own_index = bytes(view[start - index_bytes : start])
        self._spans: list[tuple[int, int]] = []
        for _, _, _, size in heads:
            self._spans.append((start, start + size))
            start += size
        if start != len(view):
            raise Corrupt("the segment's parts do not add up to its length")
        self._batches: list[pa.RecordBatch | None] = [None] * count

    def parts(self, entry_index: bytes) -> list[EntryPart]:
        """An entry's rows, as slices without copies. Raises Corrupt when the index does not fit."""

        return [
            EntryPart(table_id, schema_version, self.rows(stream, first, rows))
            for stream, first, rows, table_id, schema_version in self.items(entry_index)
        ]

    def items(self, entry_index: bytes) -> list[IndexItem]:
        """Where an entry's rows lie. Raises Corrupt when the index does not fit."""

        try:
            items = _INDEX_DECODER.decode(entry_index)
        except msgspec.MsgspecError:
            raise Corrupt("the entry's index cannot be read") from None
        heads = self._heads
        for stream, first, rows, table_id, schema_version in items:
            if not 0 <= stream < len(heads) or heads[stream] != (table_id, schema_version):
                raise Corrupt("the entry's index belongs to another segment")
            if first < 0 or rows < 0 or first + rows > self._batch(stream).num_rows:
                raise Corrupt("the entry's index points beyond the segment's rows")
        return items

    def rows(self, stream: int, first: int, rows: int) -> pa.RecordBatch:
        """Rows of a stream, of one entry or of several next to each other, without a copy."""

        return self._batch(stream).slice(first, rows)

    def _batch(self, stream: int) -> pa.RecordBatch:
        batch = self._batches[stream]
        if batch is None:
            start, end = self._spans[stream]
            try:
                source = pa.py_buffer(self._view[start:end])
                with pa.ipc.open_stream(source, options=_READ) as reader:
                    batch = reader.read_next_batch()
            except (pa.ArrowException, OSError, StopIteration) as fault:
                raise Corrupt(f"a stream of the segment cannot be read: {fault}") from None
            self._batches[stream] = batch
        return batch


def _lay_out(
    entries: Sequence[Sequence[EntryPart]],
) -> tuple[list[_Stream], list[list[IndexItem]]]:
    """Appends each part to the stream of its table, version and Arrow schema."""

    streams: list[_Stream] = []
    by_key: dict[tuple[int, int], list[int]] = {}
    indexes: list[list[IndexItem]] = []
    for parts in entries:
        index: list[IndexItem] = []
        for part in parts:
            number = _stream_for(part, streams, by_key)
            stream = streams[number]
            rows = part.batch.num_rows
            index.append((number, stream.rows, rows, part.table_id, part.schema_version))
            stream.batches.append(part.batch)
            stream.rows += rows
        indexes.append(index)
    if len(streams) > STREAMS_MAX:
        raise ValueError("too many tables in one group")
    return streams, indexes


def _stream_for(
    part: EntryPart, streams: list[_Stream], by_key: dict[tuple[int, int], list[int]]
) -> int:
    key = (part.table_id, part.schema_version)
    schema = part.batch.schema
    numbers = by_key.setdefault(key, [])
    for number in numbers:
        # Equal in all regular cases; kept apart otherwise, so that no entry fails for another (A9).
        if streams[number].batches[0].schema.equals(schema):
            return number
    numbers.append(len(streams))
    streams.append(_Stream(part.table_id, part.schema_version, []))
    return numbers[-1]


def _options(entries: int) -> pa.ipc.IpcWriteOptions:
    return _ZSTD if entries >= ZSTD_ENTRIES_MIN else _LZ4


# Threads would only move the work of a few kilobytes to another core, with two hand-overs.
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)
_ZSTD = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)


def _encode_streams(streams: list[_Stream], options: pa.ipc.IpcWriteOptions) -> list[pa.Buffer]:
    encoded = []
    for stream in streams:
        batches = stream.batches
        batch = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        encoded.append(sink.getvalue())
    return encoded


def _frame(streams: list[_Stream], encoded: list[pa.Buffer], own_index: bytes) -> bytes:
    """The bytes are put together once: a payload may be large."""

    heads = b"".join(
        _STREAM.pack(stream.table_id, stream.schema_version, 0, buffer.size)
        for stream, buffer in zip(streams, encoded, strict=True)
    )

    def head(checksum: int) -> bytes:
        return _HEAD.pack(_MAGIC, FORMAT_VERSION, 0, len(streams), checksum, len(own_index))

    blank = head(0)
    checksum = zlib.crc32(blank[_CRC_AT.stop :], zlib.crc32(blank[: _CRC_AT.start]))
    for piece in (heads, own_index, *encoded):
        checksum = zlib.crc32(piece, checksum)
    return b"".join((head(checksum), heads, own_index, *encoded))


def _checksum(view: memoryview) -> int:
    head = zlib.crc32(view[: _CRC_AT.start])
    return zlib.crc32(view[_CRC_AT.stop :], head)


def _shares(
    indexes: list[list[IndexItem]], streams: list[_Stream], encoded: list[pa.Buffer]
) -> list[int]:
    """Each entry's part of the payload by rows; budgets need no more than this."""

    per_row = [
        buffer.size / max(1, stream.rows) for stream, buffer in zip(streams, encoded, strict=True)
    ]
    return [
        max(1, round(sum(rows * per_row[stream] for stream, _, rows, _, _ in index)))
        for index in indexes
    ]
