"""Files of adversarial rows, their rewrite, and what is in them afterwards, for the tests of it."""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from lakebus.schemas import HIDDEN_COLUMNS, Column, TableSchema
from lakebus.snapshots import DataFile
from storage.files.parquet import encode_data_file, scan_expression
from storage.maintenance.rewrite import GROUP_ROWS, rewrite
from storage.maintenance.rewriting import RewriteInput, RewriteRequest, Rewritten, RewrittenFile
from storage.rows.types import parse_type
from tests.unit.pruning_worlds import array

MIB = 1024 * 1024


def schema_of(*columns: tuple[int, str, str], **more: Any) -> TableSchema:
    return TableSchema(1, "t", 1, tuple(Column(*column) for column in columns), **more)


PLAIN = schema_of((1, "id", "bigint"), (2, "name", "varchar"), (3, "x", "double"))


def write_input(
    folder: Path,
    schema: TableSchema,
    values: Mapping[int, Sequence[Any]],
    *,
    number: int = 0,
    shard: int = 0,
    partition: str | None = None,
    row_group_rows: int = 122_880,
) -> RewriteInput:
    """One data file at position `number`, with the values of each column id."""

    count = len(next(iter(values.values())))
    kinds = {column.column_id: parse_type(column.type) for column in schema.columns}
    rows = {str(i): array(kinds[i], list(column)) for i, column in values.items()}
    rows["$shard"] = pa.array([shard] * count, pa.int16())
    rows["$position"] = pa.array([number] * count, pa.int64())
    rows["$row"] = pa.array(range(count), pa.int32())
    return input_of(
        folder,
        schema,
        pa.table(rows),
        number=number,
        partition=partition,
        row_group_rows=row_group_rows,
    )


def input_of(
    folder: Path,
    schema: TableSchema,
    rows: pa.Table,
    *,
    number: int,
    partition: str | None = None,
    row_group_rows: int = 122_880,
) -> RewriteInput:
    """One data file of rows with their places."""

    encoded = encode_data_file(schema, rows, row_group_rows=row_group_rows)
    path = folder / f"in-{number:05d}.parquet"
    path.write_bytes(encoded.data)
    file = DataFile(
        uuid.UUID(int=number + 1),
        schema.table_id,
        schema.version,
        path.name,
        encoded.rows,
        encoded.size_bytes,
        encoded.sha256,
        encoded.statistics,
        partition=partition,
    )
    return RewriteInput(file, path)


def run(
    folder: Path,
    schema: TableSchema,
    inputs: Sequence[RewriteInput],
    *,
    group_rows_max: int = GROUP_ROWS,
    **more: Any,
) -> Rewritten:
    settings: dict[str, Any] = {
        "target_file_bytes": 16 * MIB,
        "memory_bytes": 64 * MIB,
        "threads": 1,
        "temp_dir": folder,
    } | more
    request = RewriteRequest(schema=schema, inputs=tuple(inputs), **settings)
    return rewrite(request, group_rows_max=group_rows_max)


def as_data_file(schema: TableSchema, file: RewrittenFile, number: int) -> DataFile:
    return DataFile(
        uuid.UUID(int=1_000_000 + number),
        schema.table_id,
        schema.version,
        file.path.name,
        file.rows,
        file.size_bytes,
        file.sha256,
        file.statistics,
        partition=file.partition,
    )


def rows_in(
    schema: TableSchema, paths: Sequence[Path], columns: str = "columns(*)::varchar"
) -> list[tuple[Any, ...]]:
    """Rows in the order of the files, hidden columns first."""

    relation = scan_expression(schema, [str(path) for path in paths], hidden=True)
    with duckdb.connect(config={"threads": 1}) as database:
        database.execute("set timezone = 'UTC'").fetchall()
        return database.execute(f"select {columns} from {relation} t").fetchall()


def bits_in(schema: TableSchema, paths: Sequence[Path]) -> list[tuple[Any, ...]]:
    """Each row as text in which floats are their bits and texts are hexadecimal."""

    terms = [f'"{name}"::varchar' for name in HIDDEN_COLUMNS]
    for column in schema.columns:
        match parse_type(column.type).sql:
            case "float" | "double":
                terms.append(f'"{column.name}"::bit::varchar')
            case "varchar" | "json":
                terms.append(f'hex("{column.name}"::varchar)')
            case "blob":
                terms.append(f'hex("{column.name}")')
            case _:
                terms.append(f'"{column.name}"::varchar')
    return rows_in(schema, paths, ", ".join(terms))


def check_records(schema: TableSchema, found: Rewritten) -> None:
    """What is said of each file is what the file is."""

    for file in found.files:
        data = file.path.read_bytes()
        assert len(data) == file.size_bytes
        assert hashlib.sha256(data).hexdigest() == file.sha256
        assert len(rows_in(schema, [file.path])) == file.rows
    assert sum(file.rows for file in found.files) == found.after.rows


def plain_files(
    folder: Path, files: int, rows: int, schema: TableSchema = PLAIN
) -> list[RewriteInput]:
    chance = random.Random(7)
    return [
        write_input(
            folder,
            schema,
            {
                1: [chance.randrange(10**9) for _ in range(rows)],
                2: [chance.choice((None, "a", "b\0c", "é" * 40)) for _ in range(rows)],
                3: [chance.choice((0.0, -0.0, 1.5, None, chance.random())) for _ in range(rows)],
            },
            number=number,
            shard=number % 2,
        )
        for number in reversed(range(files))
    ]
