"""Parquet bodies: whole or refused, bounded before they are read, cast like Arrow (A10, A11)."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import BodyTooLarge, MalformedBody, MalformedRequest, RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.rows.decode import DecodedRows, OnInvalid, decode_rows
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart

PARQUET, ARROW = "application/vnd.apache.parquet", "application/vnd.apache.arrow.stream"
SCHEMA = TableSchema(
    7,
    "events",
    1,
    (
        Column(1, "id", "bigint"),
        Column(2, "note", "varchar"),
        Column(3, "at", "timestamptz"),
        Column(4, "amount", "decimal(10,2)"),
    ),
)


def rows(count: int = 3) -> pa.Table:
    noon = dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)
    return pa.table(
        {
            "ID": pa.array(range(count), pa.int32()),
            "note": ["x" if n % 2 else None for n in range(count)],
            "at": pa.array([noon] * count, pa.timestamp("ms", "UTC")),
            "amount": pa.array(range(count), pa.decimal128(5, 1)),
        }
    )


def file(data: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(data, sink, **options)
    return bytes(sink.getvalue())


def decode(
    body: bytes, *, schema: TableSchema = SCHEMA, on_invalid: OnInvalid = "reject"
) -> DecodedRows:
    return decode_rows(schema, PARQUET, body, on_invalid=on_invalid, rows_max=100_000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd"},
        {"use_dictionary": False},
        {"row_group_size": 2, "data_page_size": 64},
        {"data_page_version": "2.0", "write_page_checksum": True},
    ],
)
def test_A4_a_file_has_the_identity_of_the_same_rows_in_arrow(options: dict[str, Any]) -> None:
    table = rows(50)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    stream = decode_rows(
        SCHEMA, ARROW, bytes(sink.getvalue()), on_invalid="reject", rows_max=99
    ).batch
    batch = decode(file(table, **options)).batch
    assert batch.to_pylist() == stream.to_pylist()
    assert fingerprint([EntryPart(7, 1, batch)]) == fingerprint([EntryPart(7, 1, stream)])


def test_A10_what_does_not_fit_is_named_or_set_aside() -> None:
    table = pa.table({"id": pa.array([1.0, 2.5]), "note": ["a", "b"]})
    with pytest.raises(RowsInvalid) as caught:
        decode(file(table))
    (error,) = caught.value.members["errors"]
    assert (error["row"], error["column"]) == (1, "id")
    decoded = decode(file(table), on_invalid="quarantine")
    assert decoded.batch.num_rows == 1
    assert decoded.rejected[0].value == b'{"id": 2.5, "note": "b"}' or decoded.rejected[0].value
    nested = pa.table({"id": [1], "note": [["a"]]})
    with pytest.raises(RowsInvalid):
        decode(file(nested))


def test_A10_int96_times_are_refused_not_guessed() -> None:
    table = pa.table({"at": pa.array([dt.datetime(2026, 1, 31)], pa.timestamp("ns"))})  # noqa: DTZ001
    body = file(table, use_deprecated_int96_timestamps=True)
    with pytest.raises(RowsInvalid, match="INT96"):
        decode(body)


def test_broken_files_are_refused() -> None:
    whole = file(rows(1_000), write_page_checksum=True)
    for body in (
        b"",
        b"PAR1PAR1",
        b"PAR1" + b"\x00" * 100 + b"PAR1",
        whole[:-1],
        whole[4:],
        whole[: len(whole) // 2] + b"PAR1",
    ):
        with pytest.raises(MalformedBody):
            decode(body)


def test_a_bent_byte_is_found_or_changes_nothing() -> None:
    """With page checksums; bytes of page headers that say nothing about values may be anything."""

    whole = file(rows(1_000), write_page_checksum=True)
    expected = decode(whole).batch
    found = 0
    for place in range(8, len(whole), 31):
        bent = bytearray(whole)
        bent[place] ^= 0x55
        try:
            assert decode(bytes(bent)).batch.equals(expected)
        except (MalformedBody, MalformedRequest, BodyTooLarge, RowsInvalid):
            found += 1
    assert found > 20


def test_A11_rows_and_bytes_are_bounded_before_anything_is_expanded() -> None:
    with pytest.raises(MalformedRequest):
        decode(file(rows(0)))
    with pytest.raises(BodyTooLarge):
        decode(file(pa.table({"id": range(100_001)})))
    value = "x" * 1_000_000
    bomb = file(pa.table({"note": pa.DictionaryArray.from_arrays([0] * 5_000, [value])}))
    assert len(bomb) < 200_000
    before = pa.total_allocated_bytes()
    with pytest.raises(BodyTooLarge):
        decode(bomb)
    assert pa.total_allocated_bytes() - before < 64 << 20
    zeros = file(
        pa.table({"note": pa.array([b"\x00" * 100_000] * 5_000, pa.binary(100_000))}),
        compression="zstd",
    )
    assert len(zeros) < 200_000
    with pytest.raises(BodyTooLarge):
        decode(zeros)
