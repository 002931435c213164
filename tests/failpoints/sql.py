"""Failpoints inside the functions of one test database.

`install_sql_failpoints` installs the product's functions again with their markers turned into
calls. What a call does is told by a table; how often it was reached is counted by a sequence,
because a sequence survives the rollback that most actions end in, and is seen by others at once.
The mark that tells which functions are installed is left as it was, so the product takes the
database for its own.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import asyncpg

from storage.names import SCHEMA
from storage.sql import install_statements
from tests.failpoints.markers import require_known, sql_with_calls

#: A transaction that has not ended sends no notification, so its count is looked at this often.
POLL_S = 0.005
_SUPPORT = Path(__file__).with_name("reach_failpoint.sql")


@dataclass(frozen=True, slots=True)
class SqlError:
    """The statement fails with this SQLSTATE, for example 40P01 or 40001."""

    sqlstate: str


@dataclass(frozen=True, slots=True)
class SqlDelay:
    """The transaction goes on after so long, holding what it holds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SqlTerminate:
    """The backend ends its own connection: rolled back, and the client hears of a broken one."""


@dataclass(frozen=True, slots=True)
class SqlPause:
    """The transaction waits until the test resumes it, or fails after `within_s`. Sessions that
    lock live 2.5 s at most (a rule of the product), so a longer pause is ended by the server."""

    within_s: float = 30.0


@dataclass(frozen=True, slots=True)
class SqlBarrier:
    """Goes on once so many transactions are here at once; each round of as many anew."""

    parties: int
    within_s: float = 30.0


SqlAction = SqlError | SqlDelay | SqlTerminate | SqlPause | SqlBarrier


async def install_sql_failpoints(dsn: str) -> None:
    """Once for a database that was upgraded; a template may hold them for all of its copies."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL search_path = {SCHEMA}")
            await connection.execute(_SUPPORT.read_text())
            for script in install_statements():
                await connection.execute(sql_with_calls(script))
    finally:
        await connection.close()


class SqlFailpoints:
    """What a test arms in a database. Use as a context: at its end each must have been reached."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._looking = asyncio.Lock()
        self._armed: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        self._connection = await asyncpg.connect(self._dsn)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        missed = []
        try:
            for name in list(self._armed):
                if kind is None and not await self.hits(name):
                    missed.append(name)
                await self._value(
                    "UPDATE lakebus.failpoint SET active = false, released = NULL"
                    " WHERE name = $1 AND active",
                    name,
                )
        finally:
            assert self._connection is not None
            self._connection.terminate()
        assert not missed, f"armed and never reached: {', '.join(missed)}"

    async def arm(
        self, name: str, action: SqlAction, *, skip: int = 0, times: int | None = 1
    ) -> None:
        """Let `skip` arrivals pass, then act `times` times (None: always). Arming again begins
        anew. Takes effect on transactions that reach the place from now on."""
        require_known(name)
        kind, argument, within_s = _described(action)
        self._armed[name] = await self._value(
            "SELECT lakebus.arm_failpoint($1, $2, $3, $4, $5, $6)",
            *(name, kind, argument, within_s, skip, times),
        )

    async def disarm(self, name: str) -> None:
        """Nobody meets the action from now on; whoever is paused there goes on."""
        assert await self.hits(name), f"{name} was armed and never reached"
        del self._armed[name]
        await self._value(
            "UPDATE lakebus.failpoint SET active = false, released = NULL"
            " WHERE name = $1 AND active",
            name,
        )

    async def hits(self, name: str) -> int:
        """How often `name` acted since it was armed."""
        return int(await self._value("SELECT lakebus.failpoint_shots($1)", self._armed[name]))

    async def reached(self, name: str, count: int = 1, *, within_s: float = 30.0) -> None:
        deadline = time.monotonic() + within_s
        while await self.hits(name) < count:
            assert time.monotonic() < deadline, f"nobody reached {name} within {within_s} s"
            await asyncio.sleep(POLL_S)

    async def resume(self, name: str) -> None:
        """Lets every transaction go on that is paused at `name` now."""
        await self._value(
            "UPDATE lakebus.failpoint SET released = lakebus.failpoint_shots(failpoint_id)"
            " WHERE name = $1 AND active",
            name,
        )

    async def _value(self, statement: str, *arguments: object) -> int:
        assert self._connection is not None
        async with self._looking:
            found = await self._connection.fetchval(statement, *arguments)
        return int(found or 0)


def _described(action: SqlAction) -> tuple[str, str, float]:
    match action:
        case SqlError(sqlstate):
            return "error", sqlstate, 0.0
        case SqlDelay(seconds):
            return "delay", str(seconds), 0.0
        case SqlTerminate():
            return "terminate", "", 0.0
        case SqlPause(within_s):
            return "pause", "", within_s
        case SqlBarrier(parties, within_s):
            return "barrier", str(parties), within_s
