"""Where actors can be woken: a small directory of host and port by role.

A hint that goes astray costs one poll interval, so rows here are not truth, only addresses.
"""

from __future__ import annotations

from storage.postgres.failures import reading
from storage.postgres.pool import Pool

#: An endpoint that was not announced for this long is not asked any more.
STALE_AFTER_S = 60.0


class PostgresHints:
    def __init__(self, *, pool: Pool) -> None:
        self._pool = pool

    async def announce(self, role: str, instance: str, host: str, port: int) -> None:
        async with self._pool.connection() as connection:
            with reading():
                await connection.execute(
                    "INSERT INTO actor_endpoint (role, instance, host, port, seen_at)"
                    " VALUES ($1, $2, $3, $4, clock_timestamp())"
                    " ON CONFLICT (role, instance) DO UPDATE"
                    " SET host = excluded.host, port = excluded.port, seen_at = excluded.seen_at",
                    role,
                    instance,
                    host,
                    port,
                )
                await connection.execute(
                    "DELETE FROM actor_endpoint"
                    " WHERE seen_at < clock_timestamp() - 10 * make_interval(secs => $1)",
                    STALE_AFTER_S,
                )

    async def receivers(self, role: str) -> list[tuple[str, int]]:
        async with self._pool.connection() as connection:
            with reading():
                rows = await connection.fetch(
                    "SELECT host, port FROM actor_endpoint WHERE role = $1"
                    " AND seen_at > clock_timestamp() - make_interval(secs => $2)"
                    " ORDER BY instance",
                    role,
                    STALE_AFTER_S,
                )
        return [(row["host"], row["port"]) for row in rows]
