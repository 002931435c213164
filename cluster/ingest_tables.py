"""Parquet and Arrow files cut into Arrow streams, a request each.

The places where they are cut follow from the file alone: sizes in the Parquet footer, lengths of
record batches. A piece is identified by the hash of the whole file and the place of its rows, not
by the bytes of the stream, which may differ between versions of the library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Any

from cluster.ingest_sources import Content
from lakebus.errors import MalformedBody

_FILE_MAGIC = b"ARROW1"
_END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"
#: A piece whose rows take more than this is halved: the server takes 64 MiB at most.
_STREAM_BYTES_MAX = 32 * 1024 * 1024


def parquet_pieces(
    content: Content, *, chunk_bytes: int, rows_max: int
) -> Iterator[tuple[bytes, bytes]]:
    """(Arrow stream, digest) of runs of row groups, or of slices of large ones."""

    import pyarrow as pa  # here, because it takes a while and only these files need it
    import pyarrow.parquet as pq

    with content.as_file() as (file, digest):
        try:
            with pq.ParquetFile(file, pre_buffer=False) as parquet:
                at = 0
                for groups, rows in _runs(parquet.metadata, chunk_bytes, rows_max):
                    batches = parquet.iter_batches(
                        batch_size=rows, row_groups=groups, use_threads=False
                    )
                    for table in _tables(batches, rows):
                        yield from _streams(table, digest, at)
                        at += table.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise MalformedBody(f"{content.name} is no whole Parquet file: {error}") from None


def arrow_pieces(
    content: Content, *, chunk_bytes: int, rows_max: int
) -> Iterator[tuple[bytes, bytes]]:
    """(Arrow stream, digest) of runs of record batches, or of slices of large ones."""

    import pyarrow as pa  # here, because it takes a while and only these files need it

    with content.as_file() as (file, digest):
        try:
            at = 0
            for table in _gathered(_batches(file), chunk_bytes, rows_max):
                yield from _streams(table, digest, at)
                at += table.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            raise MalformedBody(f"{content.name} is no whole Arrow file: {error}") from None


def _runs(metadata: Any, chunk_bytes: int, rows_max: int) -> Iterator[tuple[list[int], int]]:
    """(row groups, rows of a piece): neighbours together while they fit."""

    waiting: list[int] = []
    rows = size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        many, large = group.num_rows, max(1, group.total_byte_size)
        if waiting and (rows + many > rows_max or size + large > chunk_bytes):
            yield waiting, rows
            waiting, rows, size = [], 0, 0
        if many > rows_max or large > chunk_bytes:
            yield [number], max(1, min(rows_max, many * chunk_bytes // large))
            continue
        if many:
            waiting, rows, size = [*waiting, number], rows + many, size + large
    if waiting:
        yield waiting, rows


def _tables(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Tables of exactly so many rows, but the last: a batch may end with its row group."""

    import pyarrow as pa  # as above

    held: list[Any] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= rows:
            first = batch.slice(0, rows - count)
            yield pa.Table.from_batches([*held, first])
            batch, held, count = batch.slice(rows - count), [], 0
            if not batch.num_rows:
                break
        if batch.num_rows:
            held, count = [*held, batch], count + batch.num_rows
    if held:
        yield pa.Table.from_batches(held)


def _batches(file: IO[bytes]) -> Iterator[Any]:
    import pyarrow as pa  # as above

    magic = file.read(len(_FILE_MAGIC))
    file.seek(0)
    if magic == _FILE_MAGIC:
        with pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
    else:
        with pa.ipc.open_stream(file) as reader:
            yield from reader
        file.seek(-len(_END_MARK), os.SEEK_END)
        if file.read() != _END_MARK:  # else a stream that is cut between batches looks whole
            raise ValueError("the end mark of the stream is missing")


def _gathered(batches: Iterator[Any], chunk_bytes: int, rows_max: int) -> Iterator[Any]:
    """Neighbours together while they fit; a larger batch in slices."""

    import pyarrow as pa  # as above

    held: list[Any] = []
    rows = size = 0
    for batch in batches:
        many, large = batch.num_rows, max(1, batch.nbytes)
        if held and (rows + many > rows_max or size + large > chunk_bytes):
            yield pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
        if many > rows_max or large > chunk_bytes:
            step = max(1, min(rows_max, many * chunk_bytes // large))
            for at in range(0, many, step):
                yield pa.Table.from_batches([batch.slice(at, step)])
            continue
        if many:
            held, rows, size = [*held, batch], rows + many, size + large
    if held:
        yield pa.Table.from_batches(held)


def _streams(table: Any, digest: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """The table as a stream, or in halves when it is too large for one request."""

    import pyarrow as pa  # as above

    if table.nbytes > _STREAM_BYTES_MAX and table.num_rows > 1:
        half = table.num_rows // 2
        yield from _streams(table.slice(0, half), digest, at)
        yield from _streams(table.slice(half), digest, at + half)
        return
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    place = f"\n{at}\n{table.num_rows}".encode()
    yield sink.getvalue().to_pybytes(), digest + place
