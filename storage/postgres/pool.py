"""Connections: what every session of ours is told, and pools that never pile up."""

from __future__ import annotations

import json
import logging
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

from lakebus.errors import LakebusError
from storage.names import SCHEMA
from storage.postgres.failures import connecting
from storage.postgres.rewind import HistoryGuard
from storage.postgres.server import TRANSACTION_TIMEOUT_SINCE, examine_server

_log = logging.getLogger(__name__)

#: Session settings of every role that locks (B11: a paused client is ended after 3 s) and writes
#: (A1: the server's own setting for synchronous_commit does not matter).
_SESSION = {
    "search_path": SCHEMA,
    "synchronous_commit": "on",
    "idle_in_transaction_session_timeout": "3000",
    "timezone": "UTC",
    "jit": "off",
    # A function's static statements keep one generic plan; replanning per call costs more.
    "plan_cache_mode": "force_generic_plan",
    # Kept for as long as the session lives, it must suit tables that grow: one made while a table
    # had a page or two would read all of it for each row wanted. Where there is no index to find
    # rows by, tables are read whole all the same.
    "enable_seqscan": "off",
}

#: Sessions that lock: with the time it takes to notice, below the 3 s of contract B11.
LOCKING_TRANSACTION_MS = 2_500
#: For the way of an answer: beyond the server's own bound, the outcome is unknown.
_ANSWER_S = 2.0
#: How long the connection of a cancelled call may take to say that its statement has ended.
RELEASE_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """`*_ms` bound waiting: for a connection, for one statement, and (None: without bound) for a
    whole transaction, its wait for the client's last bytes included."""

    size_max: int = 6
    connect_ms: int = 5_000
    statement_ms: int = 30_000
    transaction_ms: int | None = None

    @property
    def command_s(self) -> float:
        """How long a call is waited for: a little longer than the server lets it live. A connection
        that fell silent must not hold up a shard's group, or the publisher, for longer (B11)."""

        bound_ms = min(self.statement_ms, self.transaction_ms or self.statement_ms)
        return bound_ms / 1000 + _ANSWER_S


_Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"


class _Session(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that can be asked whether its server has left."""

    __slots__ = ()

    def has_news(self) -> bool:
        """Whether something lies in the socket that nobody has asked for: between two calls that is
        the server's farewell, its end of the connection, or both. `is_closed` only knows of it when
        the event loop has had a turn; what is sent until then is lost, and its outcome unknown."""

        socket = self._transport.get_extra_info("socket")
        if socket is None or socket.fileno() < 0:
            return True
        asked = select.poll()  # not `select`: that takes no descriptor above 1,023
        asked.register(socket.fileno(), select.POLLIN)
        return bool(asked.poll(0))


class Pool:
    """A small asyncpg pool that opens lazily and maps failures to lakebus errors.

    A connection whose call ended well stays taken from asyncpg's pool, for the next call: giving it
    back and taking it again costs three turns of the event loop, and on a busy one each turn is
    work for somebody else that the answer waits for. Whatever did not end well goes back, and
    asyncpg sees to it; so does everything while somebody waits for a connection.

    A connection that stayed taken is looked at before it is used again, so that a server which
    restarted, a time limit or an administrator that ended it costs nobody an answer. What a look
    cannot tell is a server that vanished: such a connection is silent like a good one. So the first
    call that breaks or hears nothing ends all connections that lie idle beside its own: one call
    waits for a lost server, not as many as there are connections.
    """

    def __init__(
        self, dsn: str, *, name: str, settings: PoolSettings, guard: HistoryGuard | None = None
    ) -> None:
        self._dsn = dsn
        self._guard = guard
        self._name = name
        self._settings = settings
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._kept: list[_Connection] = []
        self._taking = 0
        self._generation = 0

    async def open(self) -> None:
        session = dict(_SESSION)
        session["application_name"] = f"lakebus {self._name}"
        session["statement_timeout"] = str(self._settings.statement_ms)
        with connecting():
            self._pool = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._settings.size_max,
                max_inactive_connection_lifetime=0,
                timeout=self._settings.connect_ms / 1000,
                command_timeout=self._settings.command_s,
                server_settings=session,
                connection_class=_Session,
                init=self._prepare,
                # Nothing of ours changes session state, so the reset query would be a wasted trip.
                reset=_keep_session,
            )

    async def close(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            self._kept.clear()
            pool.terminate()

    async def renew(self) -> None:
        """Lets no connection that exists now be used again; those in use end with their call."""

        if self._pool is not None:
            self._generation += 1
            kept, self._kept = self._kept, []
            await self._pool.expire_connections()
            for connection in kept:
                await self._give_back(self._pool, connection)

    async def _prepare(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        await connection.set_type_codec(
            "jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog", format="text"
        )
        if self._guard is not None:
            await self._guard.admit(connection)
        bound = self._settings.transaction_ms
        if bound is not None and connection.get_server_version().major >= TRANSACTION_TIMEOUT_SINCE:
            await connection.execute(f"SET transaction_timeout = {bound}")

    @asynccontextmanager
    async def connection(
        self, *, gated: bool = True
    ) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]:
        """A connection for one call or a few. Raises Unavailable when none is to be had in time,
        and HistoryRewound for a catalog that went back in time, unless told to look all the same
        (`gated=False`)."""

        pool = self._pool
        if pool is None:
            raise RuntimeError(f"the pool {self._name} is not open")
        guard = self._guard if gated else None
        if guard is not None:
            guard.refuse()
        generation, ended_well = self._generation, False
        connection = await self._take(pool)
        try:
            if guard is not None:
                guard.refuse()  # making the connection may have shown it
            yield connection
            ended_well = True
        except Exception as error:
            if _server_vanished(error):
                await self._distrust(pool)
            raise
        finally:
            if ended_well and generation == self._generation and self._may_keep(connection):
                self._kept.append(connection)
            else:
                await self._give_back(pool, connection)

    async def _take(self, pool: asyncpg.Pool[asyncpg.Record]) -> _Connection:
        while self._kept:
            connection = self._kept.pop()
            if _is_open(connection):
                if not connection.has_news():
                    return connection
                connection.terminate()  # which gives it back, too
            else:
                await self._give_back(pool, connection)
        self._taking += 1
        try:
            with connecting():
                return await pool.acquire(timeout=self._settings.connect_ms / 1000)
        finally:
            self._taking -= 1

    async def _distrust(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        """Ends what lies idle. Connections in use are judged by their own calls."""

        kept, self._kept = self._kept, []
        for connection in kept:
            if _is_open(connection):
                connection.terminate()  # a farewell would wait for a server that is not there
            else:
                await self._give_back(pool, connection)
        await pool.expire_connections()

    def _may_keep(self, connection: _Connection) -> bool:
        return (
            self._taking == 0
            and self._pool is not None
            and _is_open(connection)
            and not connection.is_in_transaction()
        )

    async def _give_back(self, pool: asyncpg.Pool[asyncpg.Record], connection: _Connection) -> None:
        try:
            await pool.release(connection, timeout=RELEASE_S)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            # A silent connection does not even answer that its statement was cancelled. The
            # pool has ended it; what the call itself met is the outcome, not this.
            _log.warning("a %s connection was thrown away: %r", self._name, error)


def _is_open(connection: _Connection) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # it ended while nobody used it, and asyncpg has cleared it away
        return False


def _server_vanished(error: BaseException) -> bool:
    """Nothing was heard, or the connection ended without a word. A server that says why it ends one
    connection is there, and `has_news` knows of the others it has ended."""

    told = error.__cause__ if isinstance(error, LakebusError) else error
    if isinstance(told, asyncpg.ConnectionDoesNotExistError):
        return not isinstance(told.__cause__, asyncpg.PostgresError)
    return isinstance(told, (TimeoutError, ConnectionError))


async def _keep_session(_connection: asyncpg.Connection[asyncpg.Record]) -> None:
    return None


async def refuse_unsafe_server(pool: Pool) -> None:
    """Raises StartRefused on a server whose settings would break durability (contract A1); warns of
    one on which another promise does not hold."""

    async with pool.connection() as connection:
        with connecting():
            found = await examine_server(connection)
    if found.gap:
        _log.warning("%s", found.gap)
