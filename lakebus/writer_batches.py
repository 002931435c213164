"""What a writer sends: batches with their keys, and the pieces that they are made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lakebus.client_rows import (
    ARROW,
    Rows,
    arrow_batches,
    arrow_stream,
    is_columns,
    is_polars,
    json_line,
    polars_slices,
)
from lakebus.errors import LakebusError, MalformedBody, MalformedRequest

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)  # no slots: the defaults are read from the class
class WriterLimits:
    """When a batch is sent, and how much may wait for its receipt."""

    rows_max: int = 10_000
    bytes_max: int = 4 << 20
    linger_s: float = 0.05
    held_batches_max: int = 16
    held_bytes_max: int = 64 << 20
    write_timeout_s: float = 60.0
    retry_s: float = 300.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("linger_s", "write_timeout_s", "retry_s") else 1
            if value < least:
                raise MalformedRequest(f"{name} of a writer must be at least {least}, not {value}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that go in one request, under one key for ever. `error`: why it was given up."""

    table: str
    content: bytes = field(repr=False)
    media_type: str
    rows: int
    key: str
    not_before: str
    on_invalid: str = "reject"
    ordering_key: str | None = None
    error: LakebusError | None = None


class Piece(NamedTuple):
    """What is never cut: a row as a line of NDJSON, or (`whole`) an Arrow stream of its own."""

    content: bytes
    rows: int
    whole: bool


def pieces_of(rows: Rows, limits: WriterLimits) -> Iterator[Piece]:
    """Raises MalformedBody (a list that has a bad row gives nothing), PackageMissing."""

    if isinstance(rows, (str, bytes, os.PathLike)):
        raise MalformedBody("a writer takes rows; a file or bytes go by `ingest`")
    if isinstance(rows, Mapping):
        return iter((Piece(json_line(rows), 1, False),))
    if is_polars(rows):
        slices = polars_slices(rows, limits.rows_max)
        return (Piece(content, count, True) for content, count in slices)
    if is_columns(rows):
        schema, batches = arrow_batches(rows)
        return _arrow_pieces(schema, batches, limits)
    if isinstance(rows, list):
        return iter([Piece(json_line(row), 1, False) for row in rows])
    try:
        return (Piece(json_line(row), 1, False) for row in rows)
    except TypeError:
        raise MalformedBody(f"a {type(rows).__name__} holds no rows that can be sent") from None


def _arrow_pieces(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch], limits: WriterLimits
) -> Iterator[Piece]:
    """Small batches together, large ones cut."""

    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        for part in _cut(batch, limits):
            if held and (
                rows + part.num_rows > limits.rows_max or size + part.nbytes > limits.bytes_max
            ):
                yield Piece(arrow_stream(schema, held), rows, True)
                held, rows, size = [], 0, 0
            held.append(part)
            rows += part.num_rows
            size += part.nbytes
    if held:
        yield Piece(arrow_stream(schema, held), rows, True)


def _cut(batch: pa.RecordBatch, limits: WriterLimits) -> Iterator[pa.RecordBatch]:
    if not batch.num_rows:
        return
    shares = max(1, -(-batch.nbytes // limits.bytes_max))
    step = max(1, min(limits.rows_max, batch.num_rows // shares))
    for start in range(0, batch.num_rows, step):
        yield batch.slice(start, step)


#: The media type of a batch made of whole pieces.
WHOLE = ARROW
