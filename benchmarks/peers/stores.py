"""What people would run instead, each as a store that takes a batch and returns when it is visible.

A store is made anew in each writer process; `create` runs once before. Peers keep their defaults
where nothing is said.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import lake
from benchmarks.peers.batches import ArrowBatches, TupleBatches, arrow_schema

Batch = Callable[[int], Any]


class Store(ABC):
    """`append` raises one of `conflicts` when the store gave up on a concurrent writer."""

    conflicts: tuple[type[Exception], ...] = ()
    batches: type[ArrowBatches] | type[TupleBatches] = ArrowBatches

    def __init__(self, *, dsn: str, folder: str, threads: int) -> None:
        self._dsn, self._folder, self._threads = dsn, Path(folder), threads

    @abstractmethod
    def create(self) -> None: ...

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def append(self, batch: Any) -> None: ...

    def run(
        self, numbers: range, batch: Batch, until: float
    ) -> tuple[list[float], Counter[str], int]:
        """Appends until the time is over: ms of each that was done, failures, and how many were
        tried."""

        latencies: list[float] = []
        failures: Counter[str] = Counter()
        for tried, number in enumerate(numbers, 1):
            ready = batch(number)
            began = time.perf_counter()
            try:
                self.append(ready)
                latencies.append((time.perf_counter() - began) * 1000)
            except self.conflicts as error:
                failures[type(error).__name__] += 1
            if time.perf_counter() >= until:
                return latencies, failures, tried
        raise RuntimeError("the numbers of a window ran out")


class DuckLake(Store):
    def create(self) -> None:
        connection = lake.connect(self._dsn, str(self._folder / "data"), threads=1)
        connection.execute(lake.CREATE.format(t="lake.t"))
        connection.close()

    def open(self) -> None:
        import duckdb

        self.conflicts = (duckdb.Error,)
        self._connection = lake.connect(
            self._dsn, str(self._folder / "data"), threads=self._threads
        )

    def append(self, batch: Any) -> None:
        self._connection.execute("INSERT INTO lake.t FROM batch")


class Delta(Store):
    """A long-lived handle, as a writer process would have."""

    def create(self) -> None:
        import deltalake

        deltalake.DeltaTable.create(self._path(), schema=arrow_schema())

    def open(self) -> None:
        import deltalake
        from deltalake.exceptions import CommitFailedError, DeltaError

        self.conflicts = (CommitFailedError, DeltaError)
        self._table = deltalake.DeltaTable(self._path())

    def append(self, batch: Any) -> None:
        import deltalake

        deltalake.write_deltalake(self._table, batch, mode="append")

    def _path(self) -> str:
        return str(self._folder / "delta")


class Iceberg(Store):
    """PyIceberg with its catalog in PostgreSQL; after a conflict the table is read again."""

    def create(self) -> None:
        catalog = self._catalog()
        catalog.create_namespace("bench")
        catalog.create_table("bench.t", schema=arrow_schema())

    def open(self) -> None:
        from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException

        self.conflicts = (CommitFailedException, CommitStateUnknownException)
        self._table = self._catalog().load_table("bench.t")

    def append(self, batch: Any) -> None:
        try:
            self._table.append(batch)
        except self.conflicts:
            self._table.refresh()
            raise

    def _catalog(self) -> Any:
        from pyiceberg.catalog.sql import SqlCatalog

        uri = self._dsn.replace("postgresql://", "postgresql+psycopg2://", 1)
        return SqlCatalog("bench", uri=uri, warehouse=f"file://{self._folder}/iceberg")


class PostgresCopy(Store):
    """A table with a primary key; one COPY of tuples a transaction."""

    batches = TupleBatches
    _columns = ("event_id", "device", "region", "ts", "value", "amount", "note")

    def create(self) -> None:
        import asyncpg

        async def make() -> None:
            connection = await asyncpg.connect(self._dsn)
            await connection.execute(
                "CREATE TABLE t (event_id bigint PRIMARY KEY, device integer, region text,"
                " ts timestamp, value double precision, amount numeric(18,4), note text)"
            )
            await connection.close()

        asyncio.run(make())

    def open(self) -> None:
        import asyncpg
        import uvloop

        self._loop = uvloop.new_event_loop()
        self._connection = self._loop.run_until_complete(asyncpg.connect(self._dsn))

    def append(self, batch: Any) -> None:
        self._loop.run_until_complete(self._copy(batch))

    async def _copy(self, batch: Any) -> None:
        await self._connection.copy_records_to_table("t", records=batch, columns=self._columns)

    def run(
        self, numbers: range, batch: Batch, until: float
    ) -> tuple[list[float], Counter[str], int]:
        """On the loop as a whole: entering it for each commit would be our cost, not theirs."""

        return self._loop.run_until_complete(self._run(numbers, batch, until))

    async def _run(
        self, numbers: range, batch: Batch, until: float
    ) -> tuple[list[float], Counter[str], int]:
        latencies: list[float] = []
        for number in numbers:
            ready = batch(number)
            began = time.perf_counter()
            await self._copy(ready)
            ended = time.perf_counter()
            latencies.append((ended - began) * 1000)
            if ended >= until:
                break
        return latencies, Counter(), len(latencies)


STORES: dict[str, type[Store]] = {
    "ducklake": DuckLake,
    "delta": Delta,
    "iceberg": Iceberg,
    "postgres-copy": PostgresCopy,
}
