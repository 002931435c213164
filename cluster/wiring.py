"""Composition: the one place that names a backend and puts a stack's parts together.

Runs in the Ray host, after Ray and Serve have started and the database has its schema.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray import serve

from actors import runtime
from cluster.components import bus_settings
from lakebus.errors import Unauthenticated
from lakebus.settings import Settings
from serve_app import deployments
from storage.ingesting.grants import SCOPES, Grant
from storage.ingesting.keyring import KeyRing
from storage.postgres import PostgresLake

LOCAL_PRINCIPAL = "local"


@dataclass(frozen=True, slots=True)
class Deployed:
    """Where the application answers, and the key made for the local profile (None: make one)."""

    url: str
    api_key: str | None


async def deploy(settings: Settings, *, api_key: str | None) -> Deployed:
    """Start the roles, then the deployments, and wait until all of them run.

    :param api_key: the local key of an earlier start; a new one is made if it is not valid.
    """
    key = await _local_key(settings, api_key)
    await runtime.start(settings)
    serve.run_many(deployments.build(settings))
    host = "127.0.0.1" if settings.http.host in ("0.0.0.0", "::") else settings.http.host
    return Deployed(f"http://{host}:{settings.http.port}", key)


async def _local_key(settings: Settings, known: str | None) -> str | None:
    if settings.profile == "production":
        return None
    dsn = settings.postgres.dsn
    assert dsn is not None, "the supervisor hands over the DSN of its own server"
    lake = await PostgresLake.open(dsn.get_secret_value(), bus_settings=bus_settings(settings))
    try:
        keyring = KeyRing(lake.keys)
        if known is not None:
            try:
                await keyring.authenticate(known)
                return known
            except Unauthenticated:
                pass  # another database than last time
        issued = await keyring.issue(
            principal=LOCAL_PRINCIPAL,
            grants=[Grant(scope) for scope in SCOPES],
            label="made at the first start",
        )
        return issued.text
    finally:
        await lake.close()
