"""`lakebus keys`: API keys, made and listed where the database is, for the profile `production`.

It needs the database's DSN, which is more than any key gives; so it asks for no key itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cluster import components
from cluster.schema_state import require_known_schema
from cluster.text_table import text_table
from lakebus.errors import ConfigurationError
from lakebus.settings import Settings
from storage.ingesting.grants import ApiKey, Grant
from storage.ingesting.keyring import KeyRing
from storage.ingesting.quotas import NO_QUOTAS, Quotas, quotas_as_json, quotas_from_json
from storage.postgres import PostgresLake


def quotas_of(**given: float | None) -> Quotas:
    """The quotas of a command's options; None was not given. Raises MalformedRequest."""

    return quotas_from_json({name: value for name, value in given.items() if value is not None})


async def create_key(
    settings: Settings, *, principal: str, grants: Sequence[Grant], quotas: Quotas = NO_QUOTAS
) -> str:
    """The text of the new key, shown once. Raises ConfigurationError without a DSN, StartRefused,
    MalformedRequest for a principal's name that cannot be."""

    async with _opened(settings) as lake:
        issued = await KeyRing(lake.keys).issue(
            principal=principal,
            grants=grants,
            label="made by lakebus keys create",
            quotas=quotas,
        )
        await lake.keys.audit(
            principal="operator", action="keys.create", subject=principal, detail={"by": "command"}
        )
        return issued.text


async def list_keys(settings: Settings) -> Sequence[ApiKey]:
    """Every key, newest first. Raises ConfigurationError without a DSN, StartRefused."""

    async with _opened(settings) as lake:
        return await lake.keys.list_keys()


def key_lines(keys: Sequence[ApiKey]) -> list[str]:
    """A table for people."""

    rows = []
    for key in keys:
        scopes = ", ".join(dict.fromkeys(grant.scope for grant in key.grants))
        quotas = ", ".join(
            f"{name} {value:.12g}" for name, value in quotas_as_json(key.quotas).items()
        )
        state = "revoked" if key.revoked_at is not None else "in use"
        rows.append((key.key_id, key.principal, scopes, quotas, state))
    return text_table(("key", "principal", "scopes", "quotas", "state"), rows)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[PostgresLake]:
    if settings.postgres.dsn is None:
        raise ConfigurationError(
            "keys are kept in an external database: set postgres.dsn (LAKEBUS_POSTGRES_DSN); the"
            " stack of the profile local has made its own, see connection.json"
        )
    dsn = components.dsn_of(settings)
    await require_known_schema(dsn)
    lake = await PostgresLake.open(dsn, bus_settings=components.bus_settings(settings))
    try:
        yield lake
    finally:
        await lake.close()
