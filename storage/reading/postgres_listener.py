"""Wake-ups from PostgreSQL: one connection per process that LISTENs for new heads.

A notification only says "look now" (architecture 8), so everything here may be lost, late or
doubled. The connection is checked from time to time, because a peer that vanished without a word
would look like a quiet lake; it is made again with jitter, and a wake-up follows each new
connection, since what was published in between was not heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from typing import Any

import asyncpg

_log = logging.getLogger(__name__)

CHANNEL = "lakebus_head"


class PostgresHeadListener:
    """Gives `wake_ups` to a HeadWatcher. Times in seconds."""

    def __init__(
        self,
        dsn: str,
        *,
        connect_s: float = 5.0,
        check_s: float = 10.0,
        pause_min_s: float = 0.1,
        pause_max_s: float = 5.0,
    ) -> None:
        self._dsn = dsn
        self._connect_s = connect_s
        self._check_s = check_s
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s

    async def wake_ups(self) -> AsyncGenerator[None, None]:
        """One item for each notification or a burst of them, for ever. Ends with its task."""

        pause_s = self._pause_min_s
        while True:
            try:
                connection = await self._connect()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                _log.warning("cannot listen for new snapshots: %s", type(error).__name__)
            else:
                pause_s = self._pause_min_s
                try:
                    async with contextlib.aclosing(self._hear(connection)) as heard:
                        async for _ in heard:
                            yield
                finally:
                    connection.terminate()
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(2 * pause_s, self._pause_max_s)

    async def _connect(self) -> asyncpg.Connection[Any]:
        async with asyncio.timeout(self._connect_s):
            return await asyncpg.connect(
                self._dsn,
                timeout=self._connect_s,
                command_timeout=self._connect_s,
                server_settings={"application_name": "lakebus listener"},
            )

    async def _hear(self, connection: asyncpg.Connection[Any]) -> AsyncGenerator[None, None]:
        """Wake-ups until the connection is lost."""

        heard = asyncio.Event()
        connection.add_termination_listener(lambda _: heard.set())
        try:
            await connection.add_listener(CHANNEL, lambda *_: heard.set())
            yield
            while not connection.is_closed():
                try:
                    async with asyncio.timeout(self._check_s):
                        await heard.wait()
                except TimeoutError:
                    await connection.execute("SELECT 1")
                    continue
                heard.clear()
                yield
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            _log.warning("stopped hearing of new snapshots: %s", type(error).__name__)
