"""Resolving any snapshot and pruning in this process alone, and what a manifest weighs.

P14 itself is measured with a real catalog by `benchmarks.growth.files`; this is for looking into
the manifest without PostgreSQL.

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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.growth.counters import resident_bytes
from benchmarks.machine import describe
from benchmarks.measures import percentile
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.catalog.interface import Head, ManifestDelta, SchemaLife
from storage.files.constants import Number, interval_of
from storage.files.predicates import Predicate, prune, within
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


@dataclass(frozen=True, slots=True)
class Resolved:
    """Milliseconds of each draw: asking for the snapshot, its view, pruning."""

    find_ms: list[float]
    view_ms: list[float]
    prune_ms: list[float]

    @property
    def both_ms(self) -> list[float]:
        return [sum(parts) for parts in zip(self.view_ms, self.prune_ms, strict=True)]

    @property
    def all_ms(self) -> list[float]:
        return [sum(parts) for parts in zip(self.find_ms, self.both_ms, strict=True)]


async def resolve_and_prune(
    manifest: Manifest,
    head: Head,
    *,
    tables: Sequence[str],
    snapshots: range,
    predicate: Callable[[random.Random], Predicate],
    draws: int,
    chance: random.Random,
    find: Callable[[int], Awaitable[None]] | None = None,
) -> Resolved:
    """Snapshots and tables at random, uniform. `find`: asks for a snapshot as a request does."""

    await manifest.at(head.snapshot_id, head)
    finds, views, prunes = [], [], []
    for _ in range(draws):
        snapshot_id, name, wanted = (
            chance.choice(snapshots),
            chance.choice(tables),
            predicate(chance),
        )
        start = time.perf_counter()
        if find is not None:
            await find(snapshot_id)
        found = time.perf_counter()
        view = await manifest.at(snapshot_id, head)
        schema = view.schema(name)
        assert schema is not None
        listed = view.files(schema.table_id)
        middle = time.perf_counter()
        prune(listed.files, wanted)
        end = time.perf_counter()
        finds.append((found - start) * 1000)
        views.append((middle - found) * 1000)
        prunes.append((end - middle) * 1000)
    return Resolved(finds, views, prunes)


def any_value(chance: random.Random) -> Predicate:
    """A point look-up of the made-up files' first column."""

    value = interval_of(parse_type("bigint"), Number(str(chance.randrange(10**9))))
    assert value is not None
    return within(1, parse_type("bigint"), least=value, most=value)


async def measure(*, files: int, tables: int, snapshots: int, seed: int) -> dict[str, object]:
    catalog = MadeUpCatalog(files=files, tables=tables, snapshots=snapshots, seed=seed)
    manifest = Manifest(catalog)  # type: ignore[arg-type]
    head = await catalog.head()
    gc.disable()  # a cyclic collection while a million files are made would be measured with them
    before, began = resident_bytes(), time.perf_counter()
    await manifest.at(snapshots, head)
    loaded_s = time.perf_counter() - began
    gc.collect()
    weight = resident_bytes() - before
    gc.freeze()
    gc.enable()
    found = await resolve_and_prune(
        manifest,
        head,
        tables=[f"t{number}" for number in range(tables)],
        snapshots=range(1, snapshots + 1),
        predicate=any_value,
        draws=_QUERIES,
        chance=random.Random(seed + 1),
    )
    return {
        "machine": describe(),
        "files": files,
        "tables": tables,
        "snapshots": snapshots,
        "load_s": round(loaded_s, 2),
        "bytes_a_file": round(weight / files),
        **{
            f"{name}_ms": {f"p{q}": percentile(values, q / 100) for q in (50, 99)}
            for name, values in (
                ("view", found.view_ms),
                ("prune", found.prune_ms),
                ("both", found.both_ms),
            )
        },
    }


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
