"""Bulk batches: ready Arrow tables of telemetry rows in one IPC file, for ours and peers alike.

Made by DuckDB from a seed: the same columns and shapes as `benchmarks.data`, millions of rows in
seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from benchmarks.data import REGIONS, WORDS

SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.int64(), nullable=False),
        pa.field("device", pa.int32()),
        pa.field("region", pa.string()),
        pa.field("ts", pa.timestamp("us")),
        pa.field("value", pa.float64()),
        pa.field("amount", pa.decimal128(18, 4)),
        pa.field("note", pa.string()),
    ]
)
BATCH_ROWS = 100_000


def write(path: Path, *, rows: int, seed: float = 0.5) -> None:
    """Record batches of 100,000 rows."""

    import duckdb  # a reader of the file does not need it

    words, regions = list(WORDS), list(REGIONS)
    note = " || ' ' || ".join(
        f"{words!r}[1 + (random() * {len(words)})::INTEGER % {len(words)}]" for _ in range(6)
    )
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")  # random numbers in one order
        connection.execute(f"SELECT setseed({seed})").fetchall()
        found = connection.sql(
            f"SELECT i AS event_id, (random() * 9999)::INTEGER AS device,"
            f" {regions!r}[1 + (random() * 4)::INTEGER] AS region,"
            " TIMESTAMP '2026-03-01' + to_microseconds((random() * 2419200000000)::BIGINT) AS ts,"
            " 20 + 7 * sqrt(-2 * ln(random() + 1e-12)) * cos(6.283185307 * random()) AS value,"
            " (random() * 100000)::DECIMAL(18,4) AS amount,"
            f" {note} AS note FROM range({rows}) t(i)"
        )
        reader = found.to_arrow_reader(BATCH_ROWS)
        table = reader.read_all().cast(SCHEMA).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=BATCH_ROWS)


def read(path: str) -> list[Any]:
    """Tables of a batch each."""

    with pa.memory_map(path) as source:
        reader = pa.ipc.open_file(source)
        return [
            pa.Table.from_batches([reader.get_batch(number)])
            for number in range(reader.num_record_batches)
        ]


def with_ids(table: Any, first: int) -> Any:
    """The table with ids first…, so that rows of a batch that is used again are new."""

    ids = pa.array(range(first, first + table.num_rows), pa.int64())
    return table.set_column(0, SCHEMA.field(0), ids)
