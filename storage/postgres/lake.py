"""Opening a lake in PostgreSQL: pools, identity, and the faces built over them."""

from __future__ import annotations

import dataclasses
import secrets
from functools import partial

from lakebus.clock import new_uuid
from lakebus.errors import StartRefused
from lakebus.tokens import TokenCodec
from storage.bus.settings import BusSettings
from storage.catalog.interface import LakeIdentity
from storage.files.objects import ObjectStore
from storage.postgres.bus import PostgresBus
from storage.postgres.catalog import PostgresCatalog
from storage.postgres.erasures import PostgresErasing, compare_erasures
from storage.postgres.failures import reading
from storage.postgres.hints import PostgresHints
from storage.postgres.identity import read_identity
from storage.postgres.inspection import PostgresInspection
from storage.postgres.jobs import PostgresJobs
from storage.postgres.keys import PostgresKeys
from storage.postgres.pool import (
    LOCKING_TRANSACTION_MS,
    Pool,
    PoolSettings,
    refuse_unsafe_server,
)
from storage.postgres.repairs import PostgresRepairs
from storage.postgres.rewind import GuardSettings, HistoryGuard, Settled
from storage.postgres.trace import PostgresTraces
from storage.postgres.upkeep import PostgresUpkeep


class PostgresLake:
    """One process's view of the lake. `bus`, `catalog`, `keys` and `hints` share its pools."""

    def __init__(
        self,
        *,
        general: Pool,
        appends: Pool,
        renewals: Pool,
        scans: Pool,
        identity: LakeIdentity,
        guard: HistoryGuard,
        bus_settings: BusSettings,
        object_store: ObjectStore | None,
    ) -> None:
        self.pools = (general, appends, renewals, scans)
        self.guard = guard
        self.identity = identity
        self.codec = TokenCodec(identity.token_secret)
        self.bus = PostgresBus(
            general=general,
            appends=appends,
            renewals=renewals,
            settings=bus_settings,
            codec=self.codec,
            guard=guard,
            object_store=object_store,
        )
        self.catalog = PostgresCatalog(
            pool=general,
            scans=scans,
            settings=bus_settings,
            guard=guard,
            compare_erasures=partial(compare_erasures, general, store=object_store),
        )
        self.erasing = PostgresErasing(pool=general, scans=scans, guard=guard)
        self.keys = PostgresKeys(pool=general)
        self.hints = PostgresHints(pool=general)
        self.traces = PostgresTraces(pool=general)
        self.jobs = PostgresJobs(pool=general)
        self.inspection = PostgresInspection(pool=scans, keeps_marker=object_store is not None)
        self.repairs = PostgresRepairs(pool=general, guard=guard)
        self.upkeep = PostgresUpkeep(
            pool=general,
            scans=scans,
            catalog=self.catalog,
            guard=guard,
            object_store=object_store,
        )

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        bus_settings: BusSettings,
        object_store: ObjectStore | None = None,
        pool_settings: PoolSettings | None = None,
        guard_settings: GuardSettings | None = None,
    ) -> PostgresLake:
        """Connects, makes the first snapshot on an empty database, and checks the ground.

        A catalog that went back in time is opened too, and every call on it raises HistoryRewound
        until its loss is accepted: so the doors can say so, and open by themselves. Without an
        object store there is no marker, and only what this process sees itself is compared.
        Raises Unavailable, HistoryRewound (the database holds no lake and the object store knows
        one), or StartRefused with the command that helps.
        """

        settings = pool_settings or PoolSettings()
        locking = dataclasses.replace(settings, transaction_ms=LOCKING_TRANSACTION_MS)
        guard = HistoryGuard(store=object_store, bus_settings=bus_settings, settings=guard_settings)
        general = Pool(dsn, name="general", settings=locking, guard=guard)
        appends = Pool(
            dsn,
            name="append",
            settings=dataclasses.replace(locking, size_max=min(4, bus_settings.shards)),
            guard=guard,
        )
        # Reserved, so that a busy pool cannot starve renewals.
        renewals = Pool(
            dsn,
            name="renew",
            settings=dataclasses.replace(locking, size_max=1, connect_ms=2_000, statement_ms=5_000),
            guard=guard,
        )
        # Loading a large manifest takes longer than anything that locks may.
        scans = Pool(
            dsn, name="scan", settings=dataclasses.replace(settings, size_max=2), guard=guard
        )
        pools = (general, appends, renewals, scans)
        try:
            for pool in pools:
                await pool.open()
            async with renewals.connection(gated=False):
                pass  # reserved means held from now on: at the first renewal none may be free
            await _look(general, guard)
            if not guard.rewound:
                await refuse_unsafe_server(general)
                await _initialise(general, shards=bus_settings.shards)
                await _look(general, guard)
            try:
                identity, _ = await read_identity(general, gated=False)
            except StartRefused:
                guard.refuse()  # the database holds no lake, because it was put back to before it
                raise
        except BaseException:
            for pool in pools:
                await pool.close()
            raise
        lake = cls(
            general=general,
            appends=appends,
            renewals=renewals,
            scans=scans,
            identity=identity,
            guard=guard,
            bus_settings=bus_settings,
            object_store=object_store,
        )
        guard.start(lake.judge, replaced=lake._renew_connections)
        return lake

    async def judge(self) -> Settled:
        """Compares the catalog with its marker now, and with what this process has seen; writes the
        marker if it is older. Raises Unavailable, Corrupt; never HistoryRewound."""

        return await _look(self.pools[0], self.guard)

    async def close(self) -> None:
        await self.bus.close()
        await self.guard.stop(self.judge)
        for pool in self.pools:
            await pool.close()

    async def _renew_connections(self) -> None:
        for pool in self.pools:
            await pool.renew()


async def _look(pool: Pool, guard: HistoryGuard) -> Settled:
    async with pool.connection(gated=False) as connection:
        with reading():  # repeating it is safe: the decision is one transaction
            return await guard.judge(connection)


async def _initialise(pool: Pool, *, shards: int) -> None:
    async with pool.connection() as connection:
        with reading():
            await connection.fetchval(
                "SELECT init_lake($1, $2, $3, $4, $5)",
                new_uuid(),
                secrets.token_bytes(32),
                new_uuid(),
                shards,
                new_uuid(),
            )
            stored = await connection.fetchval("SELECT shards FROM bus_state")
    if stored != shards:
        raise StartRefused(
            f"the lake was made with {stored} shards and the setting bus.shards says {shards}: "
            f"set bus.shards to {stored}"
        )
