"""A process that does nothing but ingest, to be killed: `python -m tests.matrix.ingest_process`.

It takes a database and ids, says that it is ready, offers one entry for each id at once (under the
key that `keyed_entries` gives it), and prints a line for each receipt it got.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted
from storage.postgres import PostgresLake
from tests.failpoints.folder import FailpointFolder
from tests.failpoints.markers import ROOT
from tests.matrix.rig import MATRIX_SETTINGS, MatrixLake, keyed_entries

_READY = "ready"


async def start_ingest(
    lake: MatrixLake, folder: FailpointFolder, ids: list[int]
) -> subprocess.Popen[str]:
    """Returns when the process has imported everything and opened the lake. That takes a second of
    processor time, so on a busy machine half a minute: it is no part of what a test waits for."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.matrix.ingest_process", lake.dsn, json.dumps(ids)],
        env=folder.environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = await asyncio.to_thread(process.stdout.readline)
    assert said.strip() == _READY, f"it ended with {process.wait()} before it was ready"
    return process


async def end_of(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its exit code and the batch ids that it heard of."""
    out, _ = await asyncio.to_thread(process.communicate, None, 60)
    return process.returncode, out.split()


async def ingest(dsn: str, ids: list[int]) -> None:
    lake = await PostgresLake.open(dsn, bus_settings=MATRIX_SETTINGS)
    try:
        table = await lake.catalog.table("t")
        assert table is not None
        print(_READY, flush=True)
        await asyncio.gather(*(_one(lake, table.schema, n) for n in ids))
    finally:
        await lake.close()


async def _one(lake: PostgresLake, table: TableSchema, number: int) -> None:
    (entry,) = keyed_entries(table, [number])
    outcome = await lake.bus.append(entry)
    assert isinstance(outcome, Accepted)
    print(outcome.receipt.batch_id, flush=True)


if __name__ == "__main__":
    asyncio.run(ingest(sys.argv[1], json.loads(sys.argv[2])))
