"""A lake in PostgreSQL whose wires can fail, and whose receipts are kept for the audit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from cluster.embedded_postgres import EmbeddedPostgres
from cluster.migrate import upgrade
from lakebus.receipts import Receipt
from storage.bus.interface import Accepted, KeyTaken, NewEntry
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from storage.postgres.pool import PoolSettings
from tests.conformance.harness import SUITE_SETTINGS, LakeView
from tests.conformance.postgres import PostgresHarness
from tests.faults.proxy import Proxy
from tests.matrix.connection_audit import Acknowledged, audit
from tests.postgres_server import (
    copy_database,
    drop_database,
    fresh_database,
    new_data_dir,
    programs_wanted,
    run_elsewhere,
)


@dataclass(frozen=True, slots=True)
class Wired:
    """A process's view of the lake through a proxy."""

    proxy: Proxy
    lake: PostgresLake

    @property
    def view(self) -> LakeView:
        return LakeView(self.lake.bus, self.lake.catalog, self.lake.jobs, self.lake.upkeep)


class FaultyLake(PostgresHarness):
    """Keeps what was acknowledged; `audited` says whether the lake still owes anybody."""

    def __init__(self, settings: BusSettings, dsn: str) -> None:
        super().__init__(settings, dsn)
        self.database_dsn = dsn
        self.acknowledged: list[Acknowledged] = []
        self._stack = AsyncExitStack()

    async def stop(self) -> None:
        await self._stack.aclose()
        await super().stop()

    async def accept(self, entry: NewEntry) -> Accepted:
        accepted = await super().accept(entry)
        self.keep(entry, accepted.receipt)
        return accepted

    def keep(self, entry: NewEntry, receipt: Receipt) -> None:
        """Somebody holds this receipt from now on."""

        self.acknowledged.append(Acknowledged(entry, receipt))

    async def replay(self, entry: NewEntry, view: LakeView | None = None) -> Receipt:
        """Sends an entry again whose first answer is not known; it must be there already."""

        outcome = await (self.bus if view is None else view.bus).append(entry)
        assert isinstance(outcome, KeyTaken), outcome
        assert outcome.record.fingerprint == entry.fingerprint
        return outcome.record.receipt

    async def wired(self, *, seed: int = 0, pools: PoolSettings | None = None) -> Wired:
        """Another process, behind a proxy; both end with the lake."""

        proxy = Proxy.before(self.database_dsn, seed=seed)
        await self._stack.enter_async_context(proxy)
        lake = await self.opened(proxy.dsn(self.database_dsn), pools=pools)
        return Wired(proxy, lake)

    async def opened(
        self, dsn: str | None = None, *, pools: PoolSettings | None = None
    ) -> PostgresLake:
        lake = await PostgresLake.open(
            dsn or self.database_dsn, bus_settings=self.settings, pool_settings=pools
        )
        self._stack.push_async_callback(lake.close)
        return lake

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """A stranger's connection, closed with the lake."""

        connection = await asyncpg.connect(
            self.database_dsn, server_settings={"search_path": "lakebus"}
        )
        self._stack.callback(connection.terminate)
        return connection

    async def audited(self, *, drained: bool = True) -> None:
        if drained:
            await self.drain()
        await audit(self, self.database_dsn, self.acknowledged, drained=drained)


@asynccontextmanager
async def faulty_lake(
    template: str, settings: BusSettings = SUITE_SETTINGS
) -> AsyncIterator[FaultyLake]:
    """A new lake in a copy of an upgraded, empty database."""

    dsn = await copy_database(template)
    lake = FaultyLake(settings, dsn)
    try:
        await lake.start()
        try:
            yield lake
        finally:
            await lake.stop()
    finally:
        await asyncio.to_thread(drop_database, dsn)


@pytest.fixture(scope="module")
def template(postgres_dsn: str) -> Iterator[str]:
    """An upgraded database to copy: a migration for each test would take the longest part."""

    dsn = fresh_database(postgres_dsn)
    try:
        run_elsewhere(lambda: upgrade(dsn))
        yield dsn
    finally:
        drop_database(dsn)


@pytest.fixture
async def lake(template: str) -> AsyncIterator[FaultyLake]:
    async with faulty_lake(template) as made:
        yield made


def own_server(folder: Path | None = None, **settings: str) -> EmbeddedPostgres:
    """A durable server for one test alone, which may be killed. Not started yet."""

    return EmbeddedPostgres(
        folder or new_data_dir(), sync_init=False, bin_dir=programs_wanted(), settings=settings
    )
