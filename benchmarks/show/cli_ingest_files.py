"""Files of mixed forms whose rows are a pure function of a seed and the file's number.

What the table must hold is added up while they are made, from the numbers that the rows are made
of and without the code under test, so it can be compared with what SQL says at the end.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

COLUMNS = {
    "id": "bigint",
    "at": "timestamptz",
    "device": "integer",
    "price": "decimal(12,2)",
    "ratio": "double",
    "ok": "boolean",
    "note": "varchar",
}
#: In this order, again and again. Two thirds of the files are text, one third is compressed.
FORMS = (
    "ndjson", "csv", "parquet", "ndjson.gz", "arrow", "csv.zst", "csv", "ndjson", "arrow",
    "csv.gz", "parquet", "ndjson.zst",
)  # fmt: skip
ROWS = 200_000
#: Each is one number per column, so that a row lost, doubled or changed shows in its column.
CHECKS = {
    "rows": "count(*)",
    "distinct_ids": "count(DISTINCT id)",
    "id": "sum(id)",
    "at": 'sum(epoch("at")::bigint)',
    "device": "sum(device)",
    "device_known": "count(device)",
    "price": "(sum(price) * 100)::hugeint",
    "ratio": "sum((ratio * 1024)::bigint)",
    "ok": "count(*) FILTER (WHERE ok)",
    "note": "sum(length(note))",
    "note_number": "sum(split_part(note, '#', 2)::bigint)",
}
_WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls",
    "on", "an", "old", "harbour", "wall",
)  # fmt: skip
_EPOCH_S = 1_767_225_600  # 2026-01-01


@dataclass(slots=True)
class Made:
    """What was made. `sums` are those of CHECKS."""

    files: int = 0
    file_bytes: int = 0
    by_form: dict[str, int] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))


def make(folder: Path, *, total_bytes: int, seed: int, rows: int = ROWS) -> Made:
    """Files in some folders below `folder`, until they have `total_bytes` together."""

    made = Made()
    connection = duckdb.connect()
    while made.file_bytes < total_bytes:
        form = FORMS[made.files % len(FORMS)]
        path = folder / f"day-{made.files // 24:03d}" / f"part-{made.files:05d}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = table_of(seed, made.files, rows, made.sums)
        _write(path, form, table, connection)
        made.files += 1
        size = path.stat().st_size
        made.file_bytes += size
        made.by_form[form] = made.by_form.get(form, 0) + size
    return made


def table_of(seed: int, number: int, rows: int, sums: dict[str, int]) -> pa.Table:
    """The rows of one file; what they add up to is added to `sums`."""

    chance = np.random.default_rng([seed, number])
    ids = number * rows + chance.permutation(rows)
    seconds = _EPOCH_S + chance.integers(0, 30_000_000, rows)
    device = chance.integers(0, 50_000, rows)
    known = chance.random(rows) > 0.03
    cents = chance.integers(-10_000_000, 10_000_000, rows)
    parts = chance.integers(-(2**30), 2**30, rows)
    ok = chance.random(rows) > 0.4
    serial = chance.integers(0, 1_000_000_000, rows)
    lines = _lines(chance)
    line = chance.integers(0, len(lines), rows)
    texts = pa.array(lines).take(pa.array(line))
    note = pc.binary_join_element_wise(texts, pc.cast(pa.array(serial), pa.string()), "#")
    for name, value in {
        "rows": rows,
        "distinct_ids": rows,
        "id": ids.sum(),
        "at": seconds.sum(),
        "device": device[known].sum(),
        "device_known": known.sum(),
        "price": cents.sum(),
        "ratio": parts.sum(),
        "ok": ok.sum(),
        "note": np.char.str_len(lines)[line].sum() + rows + _digits(serial),
        "note_number": serial.sum(),
    }.items():
        sums[name] += int(value)
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "at": pa.array(seconds, pa.timestamp("s", "UTC")),
            "device": pa.array(device, pa.int32(), mask=~known),
            "price": _decimals(cents),
            "ratio": pa.array(parts / 1024),
            "ok": pa.array(ok),
            "note": note,
        }
    )


def _lines(chance: Any) -> list[str]:
    return [" ".join(chance.choice(_WORDS, 20)) for _ in range(500)]


def _digits(numbers: Any) -> int:
    """How many digits they have together."""

    powers = 10 ** np.arange(1, 10)
    return int(np.searchsorted(powers, numbers, side="right").sum()) + len(numbers)


def _decimals(cents: Any) -> pa.Array:
    """Without a float in between."""

    whole = pc.cast(pa.array(cents), pa.decimal128(19, 0))
    hundredth = pa.scalar(1, pa.decimal128(3, 0)).cast(pa.decimal128(3, 2))
    exact = pc.multiply(whole, pc.divide(hundredth, pa.scalar(100, pa.decimal128(3, 0))))
    return pc.cast(exact, pa.decimal128(12, 2))


def _write(path: Path, form: str, table: pa.Table, connection: duckdb.DuckDBPyConnection) -> None:
    kind, _, coding = form.partition(".")
    if kind == "parquet":
        pq.write_table(table, path, compression="zstd", row_group_size=100_000)
        return
    if kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=50_000)
        return
    plain = path if not coding else path.with_suffix(".plain")
    texts = _spelled(table)
    if kind == "csv":
        pacsv.write_csv(texts, plain)
    else:
        connection.register("texts", texts)
        connection.execute(f"COPY texts TO '{plain}' (FORMAT json)")
        connection.unregister("texts")
    if coding:
        _compress(plain, path, coding)
        plain.unlink()


def _spelled(table: pa.Table) -> pa.Table:
    """With times and decimals as the text that JSON and CSV bodies have."""

    at = pc.strftime(table["at"], "%Y-%m-%dT%H:%M:%SZ")
    price = pc.cast(table["price"], pa.string())
    return table.set_column(1, "at", at).set_column(3, "price", price)


def _compress(plain: Path, path: Path, coding: str) -> None:
    content = plain.read_bytes()
    if coding == "gz":
        path.write_bytes(gzip.compress(content, 1, mtime=0))
    else:
        path.write_bytes(pa.compress(content, codec="zstd", asbytes=True))
