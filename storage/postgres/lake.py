"""Opening a lake in PostgreSQL: pools, identity, and the faces built over them."""

from __future__ import annotations

import dataclasses
import secrets
import uuid

from lakebus.clock import new_uuid
from lakebus.errors import StartRefused
from lakebus.tokens import TokenCodec
from storage.bus.settings import BusSettings
from storage.catalog.interface import LakeIdentity
from storage.files.objects import ObjectStore
from storage.postgres.bus import PostgresBus
from storage.postgres.catalog import PostgresCatalog
from storage.postgres.failures import reading
from storage.postgres.hints import PostgresHints
from storage.postgres.identity import read_identity
from storage.postgres.keys import PostgresKeys
from storage.postgres.pool import (
    LOCKING_TRANSACTION_MS,
    Pool,
    PoolSettings,
    refuse_unsafe_server,
)


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
        serials: dict[int, uuid.UUID],
        bus_settings: BusSettings,
        object_store: ObjectStore | None,
    ) -> None:
        self.pools = (general, appends, renewals, scans)
        self.identity = identity
        self.codec = TokenCodec(identity.token_secret)
        self.bus = PostgresBus(
            general=general,
            appends=appends,
            renewals=renewals,
            settings=bus_settings,
            codec=self.codec,
            histories=serials,
            object_store=object_store,
        )
        self.catalog = PostgresCatalog(pool=general, scans=scans, settings=bus_settings)
        self.keys = PostgresKeys(pool=general)
        self.hints = PostgresHints(pool=general)

    @classmethod
    async def open(
        cls,
        dsn: str,
        *,
        bus_settings: BusSettings,
        object_store: ObjectStore | None = None,
        pool_settings: PoolSettings | None = None,
    ) -> PostgresLake:
        """Connects, makes the first snapshot on an empty database, and checks the ground.

        Raises Unavailable, or StartRefused with the command that helps.
        """

        settings = pool_settings or PoolSettings()
        locking = dataclasses.replace(settings, transaction_ms=LOCKING_TRANSACTION_MS)
        general = Pool(dsn, name="general", settings=locking)
        appends = Pool(
            dsn,
            name="append",
            settings=dataclasses.replace(locking, size_max=min(4, bus_settings.shards)),
        )
        # Reserved, so that a busy pool cannot starve renewals.
        renewals = Pool(
            dsn,
            name="renew",
            settings=dataclasses.replace(locking, size_max=1, connect_ms=2_000, statement_ms=5_000),
        )
        # Loading a large manifest takes longer than anything that locks may.
        scans = Pool(dsn, name="scan", settings=dataclasses.replace(settings, size_max=2))
        pools = (general, appends, renewals, scans)
        try:
            for pool in pools:
                await pool.open()
            await refuse_unsafe_server(general)
            await _initialise(general, shards=bus_settings.shards)
            identity, serials = await read_identity(general)
        except BaseException:
            for pool in pools:
                await pool.close()
            raise
        return cls(
            general=general,
            appends=appends,
            renewals=renewals,
            scans=scans,
            identity=identity,
            serials=serials,
            bus_settings=bus_settings,
            object_store=object_store,
        )

    async def close(self) -> None:
        await self.bus.close()
        for pool in self.pools:
            await pool.close()


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
