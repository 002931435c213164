"""From a claimed range to Parquet bytes, one file a table: pure work without I/O, for a thread.

Rows stand in order of (position, row in entry) and carry (shard, position, row in entry) as hidden
columns (contract D12). `$row` counts through all parts of an entry, so (shard, position, row) names
one row of the lake whatever its table.

A range may hold rows of one table that were checked against several schema versions, but there is
one write intent and so one file a table. All rows are brought to the newest version in the range:
columns are matched by id, later ones are null, and types are widened. Nothing is lost that any
snapshot could show, because the newer version was published before the range is. Where a cast does
not fit, the range fails as a whole, and its halves are tried (B8).

A table with `partition_by` gets one file a partition, as long as a range has few of them. More
would make a storm of tiny files, each with its own intent, object and manifest row, that compaction
would have to merge again: then the range is one file that mixes partitions (`partition` None), and
compaction, which sees more rows at a time, cuts it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from lakebus.errors import Fault
from lakebus.schemas import POSITION_COLUMN, ROW_COLUMN, SHARD_COLUMN, TableSchema
from storage.bus.interface import ClaimedSegment
from storage.files.parquet import EncodedFile
from storage.files.partitions import partition_spec
from storage.rows.segment import DecodedSegment, decode_segment, single_entry_segment
from storage.rows.types import parse_type

#: Batches of so many rows are written as they lie: joining them would copy every value.
_APART_ROWS_MIN = 16_384

SchemaKey = tuple[int, int]
EncodeFile = Callable[[TableSchema, pa.Table], EncodedFile]


class SchemasNeeded(Fault):
    """Schema versions that must be fetched before the range can be encoded. Member `keys`."""


@dataclass(frozen=True, slots=True)
class RangeEntry:
    """One entry of a claimed range: where it is and where its bytes are."""

    position: int
    segment: ClaimedSegment
    place: int

    @property
    def index(self) -> bytes:
        return self.segment.entry_indexes[self.place]


@dataclass(frozen=True, slots=True)
class TableFile:
    """The encoded rows of one table, or of one of its partitions."""

    table_id: int
    schema_version: int
    encoded: EncodedFile
    partition: str | None = None


@dataclass(slots=True)
class _Run:
    """Rows of one stream of a segment, next to each other: of one entry or of several."""

    segment: DecodedSegment
    stream: int
    first: int
    end: int


@dataclass(slots=True)
class _Slices:
    """The rows of one table in a range: runs in order, and how many of each entry's parts stand
    where in the range. Slicing a batch for each entry took a third of the time of encoding."""

    runs: list[_Run] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def batches(self) -> list[pa.RecordBatch]:
        return [run.segment.rows(run.stream, run.first, run.end - run.first) for run in self.runs]


def entries_of(segments: Sequence[ClaimedSegment]) -> list[RangeEntry]:
    return [
        RangeEntry(position=segment.lo + place, segment=segment, place=place)
        for segment in segments
        for place in range(segment.hi - segment.lo)
    ]


def encode_range(
    shard: int,
    entries: Sequence[RangeEntry],
    schemas: Mapping[SchemaKey, TableSchema],
    encode: EncodeFile,
    *,
    partitions_max: int = 1,
) -> list[TableFile]:
    """One file a table with rows, or one a partition where there are at most `partitions_max`.
    Raises SchemasNeeded, and whatever the rows make the codecs raise."""

    slices = _slice_by_table(entries)
    missing = {
        (table_id, version)
        for table_id, found in slices.items()
        for version in found.versions
        if (table_id, version) not in schemas
    }
    if missing:
        raise SchemasNeeded("schema versions are not known here yet", keys=missing)
    files = []
    for table_id, found in slices.items():
        target = schemas[table_id, max(found.versions)]
        rows = _with_hidden_columns(shard, found, _assemble(found, target))
        if not target.partition_by:
            files.append(TableFile(table_id, target.version, encode(target, rows)))
            continue
        spec = partition_spec(target.partition_by, target.columns)
        parts = spec.split(rows, most=partitions_max)
        if parts is None:
            files.append(TableFile(table_id, target.version, encode(target, rows)))
        else:
            files += [TableFile(table_id, target.version, encode(target, p), t) for t, p in parts]
    return files


def _slice_by_table(entries: Sequence[RangeEntry]) -> dict[int, _Slices]:
    slices: dict[int, _Slices] = {}
    segment, decoded = None, None
    for entry in entries:
        if decoded is None or entry.segment is not segment:
            segment, decoded = entry.segment, decode_segment(entry.segment.payload)
        row = 0
        for stream, first, rows, table_id, version in decoded.items(entry.index):
            found = slices.get(table_id)
            if found is None:
                found = slices[table_id] = _Slices()
            last = found.runs[-1] if found.runs else None
            if last and last.segment is decoded and (last.stream, last.end) == (stream, first):
                last.end += rows
            else:
                found.runs.append(_Run(decoded, stream, first, first + rows))
                found.versions.append(version)
            found.positions.append(entry.position)
            found.first_rows.append(row)
            found.counts.append(rows)
            row += rows
    return slices


def _assemble(found: _Slices, target: TableSchema) -> pa.Table:
    """All batches of a table, in the shape of `target`, order kept."""

    batches = found.batches()
    first = batches[0].schema
    if len(set(found.versions)) == 1 and all(b.schema.equals(first) for b in batches):
        rows = pa.Table.from_batches(batches)
        return rows if rows.num_rows >= _APART_ROWS_MIN * len(batches) else rows.combine_chunks()
    runs = [bring_to(pa.Table.from_batches([batch]), target) for batch in batches]
    return pa.concat_tables(runs).combine_chunks()


def bring_to(rows: pa.Table, target: TableSchema) -> pa.Table:
    """Rows checked against an older schema version in the shape of `target`, by column id."""

    known = set(rows.schema.names)
    columns, fields = [], []
    for column in target.columns:
        name, kind = str(column.column_id), parse_type(column.type).arrow
        if name in known:
            values = rows.column(name)
            columns.append(values if values.type == kind else values.cast(kind))
        else:
            columns.append(pa.nulls(rows.num_rows, kind))
        fields.append(pa.field(name, kind))
    return pa.table(columns, schema=pa.schema(fields))


def _with_hidden_columns(shard: int, found: _Slices, rows: pa.Table) -> pa.Table:
    counts = np.asarray(found.counts, np.int64)
    positions = np.repeat(np.asarray(found.positions, np.int64), counts)
    # Rows count up within a part of an entry; where one begins there is a step.
    starts = np.cumsum(counts) - counts
    steps = np.asarray(found.first_rows, np.int64) - starts
    numbers = np.arange(rows.num_rows) + np.repeat(steps, counts)
    hidden = (
        (SHARD_COLUMN, pa.int16(), pa.repeat(pa.scalar(shard, pa.int16()), rows.num_rows)),
        (POSITION_COLUMN, pa.int64(), pa.array(positions)),
        (ROW_COLUMN, pa.int32(), pa.array(numbers.astype(np.int32))),
    )
    for name, kind, values in hidden:
        rows = rows.append_column(pa.field(name, kind, nullable=False), values)
    return rows


def reason_of(error: BaseException) -> str:
    """An error as it is stored with an entry: short, and text that every database takes."""

    text = f"{type(error).__name__}: {error}"[:500].replace("\x00", "\\0")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def single_payload(payload: bytes, index: bytes) -> bytes:
    """One entry of a segment as a payload of its own."""

    return single_entry_segment(decode_segment(payload).parts(index))


def bad_entries(
    entries: Sequence[RangeEntry],
    trial: Callable[[Sequence[RangeEntry]], object],
    *,
    verdicts: tuple[type[Exception], ...],
    limit: int,
) -> dict[int, str]:
    """The entries that fail alone, twice in the same way, by halving; position → reason.

    Returns an empty dict when none fails alone (the range fails only as a whole), and gives up with
    the last error when more than `limit` do.
    """

    found: dict[int, str] = {}
    pending: list[Sequence[RangeEntry]] = [entries]
    while pending:
        group = pending.pop()
        reason = _failure(group, trial, verdicts)
        if reason is None:
            continue
        if len(group) > 1:
            half = len(group) // 2
            pending += [group[half:], group[:half]]
        elif reason == _failure(group, trial, verdicts):
            found[group[0].position] = reason
            if len(found) > limit:
                raise Fault(f"more than {limit} entries of a range cannot be encoded: {reason}")
    return found


def _failure(
    group: Collection[RangeEntry],
    trial: Callable[[Sequence[RangeEntry]], object],
    verdicts: tuple[type[Exception], ...],
) -> str | None:
    try:
        trial(list(group))
    except MemoryError:
        raise
    except verdicts as error:
        return reason_of(error)
    return None
