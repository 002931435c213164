"""What PostgreSQL did for some calls, counted by PostgreSQL itself: does not depend on the clock.

Sessions keep their counts for up to ten seconds when they fall idle, so each is told to hand them
in before they are read. Rows and blocks are of lakebus's own tables: what autovacuum reads in
the system's is not in them (its vacuum of ours is, in blocks).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import asyncpg

from storage.names import SCHEMA
from storage.postgres.pool import Pool

_Found = TypeVar("_Found")

#: A session that has read nothing hands in nothing, not even how many statements it ran.
_HAND_IN = "SELECT pg_stat_force_next_flush() FROM (SELECT FROM pg_am LIMIT 1) one"
_BY_TABLE = """
SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) AS rows,
       heap_blks_hit + heap_blks_read + coalesce(idx_blks_hit + idx_blks_read, 0)
       + coalesce(toast_blks_hit + toast_blks_read, 0)
       + coalesce(tidx_blks_hit + tidx_blks_read, 0) AS blocks
  FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid, schemaname, relname)
 WHERE schemaname = $1"""
_DATABASE = """
SELECT xact_commit + xact_rollback AS statements,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') AS wal_bytes,
       ARRAY(SELECT a.pid FROM pg_stat_activity a WHERE a.datname = current_database()
                AND a.pid <> pg_backend_pid()) AS sessions
  FROM pg_stat_database WHERE datname = current_database()"""


@dataclass(frozen=True, slots=True)
class Work:
    """`statements`: those that were sent, each a transaction of its own. `cpu_ms`: of the server's
    sessions, as far as they run on this machine. `by_table`: rows read."""

    statements: float
    rows_read: float
    blocks: float
    wal_bytes: float
    cpu_ms: float
    by_table: Mapping[str, float] = field(default_factory=dict)

    def each(self, calls: int) -> Work:
        return Work(
            self.statements / calls,
            self.rows_read / calls,
            self.blocks / calls,
            self.wal_bytes / calls,
            self.cpu_ms / calls,
            {name: rows / calls for name, rows in self.by_table.items()},
        )


@dataclass(frozen=True, slots=True)
class _Reading:
    statements: int
    wal_bytes: int
    cpu_ns: Mapping[int, int]
    rows: Mapping[str, int]
    blocks: int


class Meter:
    """Counts what happens on a database whose only other sessions are those of `pools`, which are
    used by one caller at a time."""

    def __init__(self, dsn: str, pools: Sequence[Pool]) -> None:
        self._dsn, self._pools = dsn, pools
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._own_statements = 0.0

    async def open(self) -> None:
        self._connection = await asyncpg.connect(self._dsn)
        for _ in range(2):  # the first time sessions are opened, which is work as well
            _, idle = await self.count(_nothing)
        self._own_statements += idle.statements

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def count(self, work: Callable[[], Awaitable[_Found]]) -> tuple[_Found, Work]:
        before = await self._read()
        found = await work()
        after = await self._read()
        rows = {
            name: float(now - before.rows.get(name, 0))
            for name, now in after.rows.items()
            if now > before.rows.get(name, 0)
        }
        cpu_ns = sum(now - before.cpu_ns.get(pid, 0) for pid, now in after.cpu_ns.items())
        return found, Work(
            after.statements - before.statements - self._own_statements,
            sum(rows.values()),
            float(after.blocks - before.blocks),
            float(after.wal_bytes - before.wal_bytes),
            cpu_ns / 1e6,
            rows,
        )

    async def _read(self) -> _Reading:
        connection = self._connection
        assert connection is not None
        for pool in self._pools:
            async with pool.connection() as one:
                await one.execute(_HAND_IN)
        tables = await connection.fetch(_BY_TABLE, SCHEMA)
        await connection.execute(_HAND_IN)
        database = await connection.fetchrow(_DATABASE)
        assert database is not None
        return _Reading(
            database["statements"],
            int(database["wal_bytes"]),
            {pid: _cpu_ns(pid) for pid in database["sessions"]},
            {row["relname"]: row["rows"] for row in tables},
            sum(row["blocks"] for row in tables),
        )


async def _nothing() -> None:
    return None


def _cpu_ns(pid: int) -> int:
    """What a process has run, to the nanosecond; 0 for one that is not on this machine."""

    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
