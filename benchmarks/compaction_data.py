"""Files of one table as ingest leaves them: telemetry-like rows in order of arrival, some late."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, cast

import duckdb

from benchmarks import data
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.files.parquet import encode_data_file
from storage.maintenance.rewriting import RewriteInput

_WORDS = ", ".join(f"'{word}'" for word in data.WORDS)
_REGIONS = ", ".join(f"'{region}'" for region in data.REGIONS)


def table(*, sort_by: tuple[str, ...] = (), partition_by: tuple[str, ...] = ()) -> TableSchema:
    columns = tuple(
        Column(number, column["name"], column["type"])
        for number, column in enumerate(cast(list[dict[str, Any]], data.COLUMNS), 1)
    )
    return TableSchema(1, "telemetry", 1, columns, sort_by=sort_by, partition_by=partition_by)


def write_files(
    folder: Path, schema: TableSchema, *, files: int, rows_per_file: int
) -> tuple[RewriteInput, ...]:
    """`event_id` and `ts` grow with the position but for a jitter; the rest is random."""

    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"threads": 1})
    connection.execute("SELECT setseed(0.5)").fetchall()
    made = []
    for number in range(files):
        rows = connection.sql(_rows_sql(number, rows_per_file)).to_arrow_table()
        encoded = encode_data_file(schema, rows)
        path = folder / f"{number:06d}.parquet"
        path.write_bytes(encoded.data)
        file = DataFile(
            file_id=uuid.UUID(int=number + 1),
            table_id=schema.table_id,
            schema_version=schema.version,
            object_key=path.name,
            rows=encoded.rows,
            size_bytes=encoded.size_bytes,
            sha256=encoded.sha256,
            statistics=encoded.statistics,
            first_snapshot=number + 1,
        )
        made.append(RewriteInput(file, path))
    return tuple(made)


def _rows_sql(file: int, rows: int) -> str:
    first = file * rows
    return f"""
        SELECT (({first} + i) * 4 + random() * 4000)::BIGINT AS "1",
            (random() * 10000)::INTEGER AS "2",
            [{_REGIONS}][1 + (random() * 4.99)::INTEGER % 5] AS "3",
            make_timestamp(1772323200000000 + ({first} + i) * 1000
                + (random() * 1e9)::BIGINT) AS "4",
            20 + 7 * (random() + random() + random() - 1.5) AS "5",
            (random() * 1e5)::DECIMAL(18, 4) AS "6",
            concat_ws(' ', {
        ", ".join(f"[{_WORDS}][1 + floor(random() * 9)::INTEGER]" for _ in range(6))
    }) AS "7",
            ({file} % 2)::SMALLINT AS "$shard", ({file // 2} * {
        -(-rows // 200)
    } + i // 200)::BIGINT AS "$position",
            (i % 200)::INTEGER AS "$row"
        FROM range({rows}) AS rows(i)"""
