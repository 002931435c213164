"""PostgreSQL of a run: reached by its superuser for faults and for the truth at the end, and, where
the stack is told a DSN, kept by a process of our own: `python -m tests.chaos.database FOLDER`.

The keeper does what an operator's service manager does: a server that ended is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from cluster.embedded_postgres import DATABASE, EmbeddedPostgres
from lakebus.errors import LakebusError
from tests.chaos.children import obey, say
from tests.postgres_server import programs_wanted

#: What a connection that is being cut, or a server that is starting, raises. The last is asyncpg's
#: word for a session that the server has ended but whose socket still looks open.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    EOFError,
    asyncpg.InternalClientError,
)


def superuser_dsn(folder: Path) -> str:
    """Of the server whose data folder (`postgres/` below it) is this. Raises OSError, ValueError,
    KeyError while there is none."""
    password = json.loads((folder / "secrets" / "postgres.json").read_text())["superuser"]
    port = json.loads((folder / "postgres" / "state.json").read_text())["port"]
    return f"postgresql://postgres:{quote(password)}@127.0.0.1:{port}/{DATABASE}"


class Superuser:
    """Short connections by the superuser: nothing of ours may be in the way of a fault."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        connection = await asyncpg.connect(
            superuser_dsn(self._folder),
            timeout=5,
            command_timeout=20,
            server_settings={"application_name": "chaos"},
        )
        try:
            yield connection
        finally:
            with contextlib.suppress(*AWAY):
                await connection.close(timeout=2)

    async def execute(self, sql: str, *arguments: object) -> str:
        async with self.connection() as connection:
            return str(await connection.execute(sql, *arguments))

    async def values(self, sql: str, *arguments: object) -> list[Any]:
        async with self.connection() as connection:
            return [row[0] for row in await connection.fetch(sql, *arguments)]

    async def rows(self, sql: str, *arguments: object) -> list[Mapping[str, Any]]:
        async with self.connection() as connection:
            return [dict(row) for row in await connection.fetch(sql, *arguments)]

    async def until_there(self, *, timeout_s: float) -> None:
        """Waits until the server answers. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await self.values("SELECT 1")
                    return
                except (*AWAY, ValueError, KeyError):
                    await asyncio.sleep(0.05)


# --- the keeper ----------------------------------------------------------------------------------


async def _keep(folder: Path) -> None:
    server = EmbeddedPostgres(folder, sync_init=False, bin_dir=programs_wanted())
    await server.start()
    say({"dsn": server.dsn, "port": server.port})
    watching = asyncio.create_task(_watch(server))
    try:
        await obey(_answer)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await server.stop()


async def _answer(order: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"error": f"the keeper takes no orders: {order}"}


async def _watch(server: EmbeddedPostgres) -> None:
    while True:
        await server.wait_exit()
        while True:
            try:
                await server.start()
                break
            except (LakebusError, *AWAY) as error:
                print(f"PostgreSQL does not start yet: {error!r}", file=sys.stderr, flush=True)
                await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(_keep(Path(sys.argv[1])))
