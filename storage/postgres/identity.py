"""Reading who this lake is: its secret, and its line of history from the first to the current."""

from __future__ import annotations

import uuid

from lakebus.errors import StartRefused
from storage.catalog.interface import HistoryFork, LakeIdentity
from storage.postgres.failures import reading
from storage.postgres.pool import Pool


async def read_identity(
    pool: Pool, *, gated: bool = True
) -> tuple[LakeIdentity, dict[int, uuid.UUID]]:
    """The lake, and its histories by serial. `gated=False` reads it in a rewound catalog too: who
    the lake is does not change with its lines of history."""

    async with pool.connection(gated=gated) as connection:
        with reading():
            lake = await connection.fetchrow(
                "SELECT lake_id, token_secret, history_serial FROM lake"
            )
            rows = await connection.fetch("SELECT * FROM history ORDER BY history_serial")
    if lake is None:
        raise StartRefused("the database holds no lake: run `lakebus migrate`")
    by_serial = {row["history_serial"]: row for row in rows}
    path: list[HistoryFork] = []
    serial: int | None = lake["history_serial"]
    while serial is not None:
        row = by_serial[serial]
        parent = row["parent_serial"]
        path.append(
            HistoryFork(
                history=row["history_id"],
                parent=by_serial[parent]["history_id"] if parent is not None else None,
                snapshot_id=row["fork_snapshot_id"],
                positions=dict(enumerate(row["fork_positions"])),
            )
        )
        serial = parent
    identity = LakeIdentity(
        lake_id=lake["lake_id"], token_secret=lake["token_secret"], histories=tuple(path[::-1])
    )
    return identity, {serial: row["history_id"] for serial, row in by_serial.items()}
