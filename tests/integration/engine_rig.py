"""What the engine's integration tests share: data, settings, plans, readings."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.engine.engine import QueryEngine
from storage.engine.plans import QueryPlan, SourceTable
from storage.engine.settings import MIB, EngineSettings

STARTED_AT = dt.datetime(2020, 2, 3, 4, 5, 6, 7, dt.UTC)
#: Runs for minutes, ends at once when interrupted.
LONG = (
    "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE hash(a.range, b.range) % 7 = 1"
)
#: One call of one function over one value: DuckDB looks at interrupts only after it.
STUBBORN = (
    "SELECT length(repeat('ab', 400000000)) + levenshtein(repeat('ab', 60000), repeat('ba', 60000))"
)


def settings(folder: Path, **changes: Any) -> EngineSettings:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "allowed_directory": str(data),
        "temp_directory": str(folder / "spill"),
        "memory_limit_bytes": 512 * MIB,
        "address_space_bytes": 2048 * MIB,
        **changes,
    }
    return EngineSettings(**given)


def write_table(folder: Path, name: str, first: int, rows: int) -> SourceTable:
    """A Parquet file of `id` (bigint), `half` (double), `name` (varchar), and its source."""

    ids = list(range(first, first + rows))
    table = pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "half": pa.array([n / 2 for n in ids], pa.float64()),
            "name": [f"n{n}" for n in ids],
            "$shard": pa.array([0] * rows, pa.int32()),
        }
    )
    path = folder / "data" / f"{name}.parquet"
    pq.write_table(table, path)
    columns = (("id", 1, "bigint"), ("half", 2, "double"), ("name", 3, "varchar"))
    return SourceTable(columns, f"read_parquet(['{path}'])")


def plan(sql: str, sources: dict[str, SourceTable] | None = None, **changes: Any) -> QueryPlan:
    given: dict[str, Any] = {"deadline_s": 20.0, "query_id": "test", **changes}
    return QueryPlan(sql=sql, sources=sources or {}, started_at=STARTED_AT, **given)


async def rows(engine: QueryEngine, sql: str, *arguments: Any, **changes: Any) -> Any:
    """The decoded JSON rows of a query."""

    async with await engine.execute(plan(sql, *arguments, **changes)) as stream:
        decoded = json.loads(await stream.read_all())
        assert stream.row_count == len(decoded)
        return decoded


async def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Another process changes state without a signal to us, so this looks again and again."""

    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def until_spare(engine: QueryEngine) -> None:
    await until(lambda: bool(engine.status()["spare_ready"]))


async def kill_child(engine: QueryEngine) -> None:
    """Kills the serving child from outside; returns when the engine has seen its death."""

    pid = engine.status()["child_pid"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: engine.status()["child_pid"] != pid)
