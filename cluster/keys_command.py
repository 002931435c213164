"""`lakebus keys create`: an API key made where the database is, for the profile `production`.

It needs the database's DSN, which is more than any key gives; so it asks for no key itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster import components, migrate
from lakebus.errors import ConfigurationError
from lakebus.settings import Settings
from storage.ingesting.grants import Grant
from storage.ingesting.keyring import KeyRing
from storage.postgres import PostgresLake


async def create_key(settings: Settings, *, principal: str, grants: Sequence[Grant]) -> str:
    """The text of the new key, shown once. Raises ConfigurationError without a DSN, StartRefused,
    MalformedRequest for a principal's name that cannot be."""

    if settings.postgres.dsn is None:
        raise ConfigurationError(
            "keys are made on an external database: set postgres.dsn (LAKEBUS_POSTGRES_DSN); the"
            " stack of the profile local has made its own, see connection.json"
        )
    dsn = components.dsn_of(settings)
    await migrate.require_known_schema(dsn)
    lake = await PostgresLake.open(dsn, bus_settings=components.bus_settings(settings))
    try:
        issued = await KeyRing(lake.keys).issue(
            principal=principal, grants=grants, label="made by lakebus keys create"
        )
        await lake.keys.audit(
            principal="operator", action="keys.create", subject=principal, detail={"by": "command"}
        )
        return issued.text
    finally:
        await lake.close()
