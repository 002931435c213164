"""The files of benchmarks/show/cli_ingest: whoever reads them back gets what they add up to."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa

from benchmarks.show.cli_ingest_files import CHECKS, COLUMNS, FORMS, make


def test_files_hold_what_they_add_up_to_and_the_seed_decides(tmp_path: Path) -> None:
    made = make(tmp_path / "a", total_bytes=300_000, seed=7, rows=200)
    assert made == make(tmp_path / "b", total_bytes=300_000, seed=7, rows=200)
    assert set(made.by_form) == set(FORMS)
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    types = ", ".join(f'"{name}" {kind}' for name, kind in COLUMNS.items())
    connection.execute(f"CREATE TABLE t ({types})")
    for path in (tmp_path / "a").rglob("*.*"):
        source = f"read_json('{path}')" if ".ndjson" in path.name else f"'{path}'"
        if path.suffix == ".arrow":
            connection.register("held", pa.ipc.open_file(path).read_all())
            source = "held"
        connection.execute(f"INSERT INTO t BY NAME SELECT * FROM {source}")
    found = connection.execute(f"SELECT {', '.join(CHECKS.values())} FROM t").fetchone()
    assert found is not None
    assert dict(zip(CHECKS, found, strict=True)) == made.sums
