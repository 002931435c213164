"""Files of a range: the same rows whether batches are joined or written as they lie (D12)."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors import range_files
from actors.range_files import encode_range, entries_of
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import ClaimedSegment
from storage.files.parquet import encode_data_file
from storage.rows.segment import EntryPart, encode_segment

COLUMNS = (
    Column(1, "id", "bigint", False),
    Column(2, "note", "varchar"),
    Column(3, "value", "double"),
    Column(4, "doc", "json"),
    Column(5, "tags", "varchar[]"),
)
#: Rows of the parts of each entry; those of one entry are numbered through.
ENTRIES = [[3], [2, 4], [1], [5]]


def schema_of(*partition_by: str) -> TableSchema:
    return TableSchema(7, "events", 1, COLUMNS, partition_by)


def batch(first: int, rows: int) -> pa.RecordBatch:
    ids = range(first, first + rows)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(ids, pa.int64()),
            pa.array([None if n % 4 == 0 else f"note {n % 3}" for n in ids], pa.string()),
            pa.array([n / 7 for n in ids], pa.float64()),
            pa.array([f'{{"n":{n}}}' for n in ids], pa.string()),
            pa.array([["a"] * (n % 3) for n in ids], pa.list_(pa.string())),
        ],
        names=[str(column.column_id) for column in COLUMNS],
    )


def claimed() -> list[ClaimedSegment]:
    """A segment an entry, as large entries have."""

    segments = []
    first = 0
    for position, counts in enumerate(ENTRIES):
        parts = []
        for rows in counts:
            parts.append(EntryPart(7, 1, batch(first, rows)))
            first += rows
        made = encode_segment([parts])
        indexes, sizes = tuple(made.entry_indexes), tuple(made.entry_bytes)
        segments.append(ClaimedSegment(position, position + 1, made.payload, indexes, sizes))
    return segments


@pytest.mark.parametrize("partition_by", [(), ("note",)], ids=["whole", "partitioned"])
def test_D12_batches_that_are_not_joined_are_the_same_rows(
    partition_by: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = schema_of(*partition_by)
    entries = entries_of(claimed())

    def files() -> list[range_files.TableFile]:
        return encode_range(3, entries, {(7, 1): schema}, encode_data_file, partitions_max=8)

    joined = files()
    monkeypatch.setattr(range_files, "_APART_ROWS_MIN", 1)
    apart = files()
    assert [one.partition for one in apart] == [one.partition for one in joined]
    for one, other in zip(apart, joined, strict=True):
        assert one.encoded.statistics == other.encoded.statistics
        tables = [pq.read_table(io.BytesIO(file.encoded.data)) for file in (one, other)]
        assert tables[0].equals(tables[1])


def test_D12_positions_and_rows_of_each_part() -> None:
    (file,) = encode_range(3, entries_of(claimed()), {(7, 1): schema_of()}, encode_data_file)
    rows = pq.read_table(io.BytesIO(file.encoded.data))
    assert rows["$shard"].to_pylist() == [3] * 15
    assert rows["$position"].to_pylist() == [0] * 3 + [1] * 6 + [2] + [3] * 5
    assert rows["$row"].to_pylist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4]
