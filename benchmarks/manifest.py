"""P14: resolve any snapshot and prune, with a warm manifest, and what the manifest weighs.

Files, tables and snapshots are made up (five columns with statistics, every text different); the
catalog is a stub, so what is measured is this process alone: loading, the view of a snapshot, and
pruning a point look-up. A tenth of the files has ended again.

`python -m benchmarks.manifest [--files 1000000 --tables 1000 --snapshots 100000]`
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import gc
import hashlib
import json
import random
import time
import uuid
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.measures import percentile
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.catalog.interface import Head, ManifestDelta, SchemaLife
from storage.files.constants import Number, interval_of
from storage.files.predicates import prune, within
from storage.reading.manifest import Manifest
from storage.rows.types import parse_type

_HISTORY = uuid.UUID(int=1)
_AT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_QUERIES = 2_000


class MadeUpCatalog:
    def __init__(self, *, files: int, tables: int, snapshots: int, seed: int) -> None:
        self.snapshots, self.tables = snapshots, tables
        self._files, self._chance = files, random.Random(seed)

    async def head(self) -> Head:
        return Head(self.snapshots, _AT, _HISTORY, {}, _AT, _AT, 1)

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        del after
        columns = tuple(Column(n, f"c{n}", "bigint") for n in range(1, 6))
        lives = tuple(
            SchemaLife(TableSchema(n, f"t{n}", 1, columns), 1, None, 1, None)
            for n in range(self.tables)
        )
        files = tuple(self._file(n, until) for n in range(self._files))
        return ManifestDelta(0, until, files, {}, lives)

    def _file(self, number: int, until: int) -> DataFile:
        first = 1 + number * until // self._files
        ended = None
        if self._chance.random() < 0.1:
            ended = min(until, first + self._chance.randrange(1, until))
        low = self._chance.randrange(10**9)
        statistics = {
            n: ColumnStatistics(0, str(low + n * 10**6), str(low + n * 10**6 + 10**5))
            for n in range(1, 6)
        }
        file_id = uuid.UUID(int=self._chance.getrandbits(128), version=4)
        return DataFile(
            file_id,
            number % self.tables,
            1,
            f"data/{file_id}.parquet",
            1_000,
            50_000,
            hashlib.sha256(file_id.bytes).hexdigest(),
            statistics,
            first,
            ended,
        )


async def measure(*, files: int, tables: int, snapshots: int, seed: int) -> dict[str, object]:
    catalog = MadeUpCatalog(files=files, tables=tables, snapshots=snapshots, seed=seed)
    manifest = Manifest(catalog)  # type: ignore[arg-type]
    head = await catalog.head()
    gc.disable()  # a cyclic collection while a million files are made would be measured with them
    before, began = _resident_bytes(), time.perf_counter()
    await manifest.at(snapshots, head)
    loaded_s = time.perf_counter() - began
    gc.collect()
    weight = _resident_bytes() - before
    gc.freeze()
    gc.enable()
    chance = random.Random(seed + 1)
    views, prunes, both = [], [], []
    for _ in range(_QUERIES):
        snapshot_id = chance.randrange(1, snapshots + 1)
        low = interval_of(parse_type("bigint"), Number(str(chance.randrange(10**9))))
        assert low is not None
        predicate = within(1, parse_type("bigint"), least=low, most=low)
        start = time.perf_counter()
        view = await manifest.at(snapshot_id, head)
        schema = view.schema(f"t{chance.randrange(tables)}")
        assert schema is not None
        listed = view.files(schema.table_id)
        middle = time.perf_counter()
        prune(listed.files, predicate)
        end = time.perf_counter()
        views.append((middle - start) * 1000)
        prunes.append((end - middle) * 1000)
        both.append((end - start) * 1000)
    return {
        "machine": describe(),
        "files": files,
        "tables": tables,
        "snapshots": snapshots,
        "load_s": round(loaded_s, 2),
        "bytes_a_file": round(weight / files),
        **{
            f"{name}_ms": {f"p{q}": percentile(values, q / 100) for q in (50, 99)}
            for name, values in (("view", views), ("prune", prunes), ("both", both))
        },
    }


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say how much memory this process has")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--tables", type=int, default=1_000)
    parser.add_argument("--snapshots", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=14)
    found = asyncio.run(measure(**vars(parser.parse_args())))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
