"""What an operator does about a rewound catalog: look at what was lost, and accept it (F4).

Works on a connection of its own, beside the processes that refuse to serve, and asks the marker in
the object store alone. What processes have seen and the marker has not, they write into it as soon
as they notice (`HistoryGuard`), so stop nothing that still runs before looking.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from lakebus.errors import HistoryRewound, StartRefused, Unavailable
from storage.bus.settings import BusSettings
from storage.files.objects import ObjectStore
from storage.names import SCHEMA
from storage.postgres.failures import connecting, reading, writing
from storage.postgres.rewind import Settled, examine, refusal, settle
from storage.postgres.rewind_marker import State


@dataclass(frozen=True, slots=True)
class Report:
    """What stands and what is missing. `verdict` as in `Settled`; `losses` are sentences."""

    verdict: str
    history_id: uuid.UUID | None
    snapshot_id: int | None
    published_at: str | None
    losses: Sequence[str]


@asynccontextmanager
async def connection_to(dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection without a gate. Raises Unavailable."""

    with connecting():
        connection = await asyncpg.connect(
            dsn,
            timeout=10,
            server_settings={
                "search_path": SCHEMA,
                "synchronous_commit": "on",
                "timezone": "UTC",
                "application_name": "lakebus history",
            },
        )
    try:
        yield connection
    finally:
        await connection.close()


async def report(dsn: str, *, store: ObjectStore) -> Report:
    """Compares the catalog with its marker; changes nothing. Raises Unavailable, Corrupt,
    HistoryRewound for a store that belongs to another lake."""

    async with connection_to(dsn) as connection:
        with reading():
            found = await examine(connection, store=store)
    return _report(found)


async def accept_loss(
    dsn: str, *, store: ObjectStore, bus_settings: BusSettings, history_id: uuid.UUID
) -> Report:
    """Begins a new line of history where the catalog stands; `history_id` is the line whose loss
    was looked at, so that two operators begin one. What waits on the bus is published there.

    Raises Unavailable, OutcomeUnknown (look again), StartRefused when another line has begun.
    """

    async with connection_to(dsn) as connection:
        with writing():
            settled = await settle(
                connection,
                store=store,
                bus_settings=bus_settings,
                accept=history_id,
                reason="accepted",
            )
    if settled.verdict == "changed":
        raise StartRefused("another line of history has begun meanwhile; look again")
    return _report(settled)


def _report(found: Settled) -> Report:
    if found.verdict == "foreign":
        raise refusal(found) or HistoryRewound()
    state = found.state
    if state is None:
        raise Unavailable("the database holds no lake: run `lakebus up`, or restore a backup")
    losses = _losses(state, found.marker) if found.verdict == "behind" else []
    return Report(
        found.verdict,
        uuid.UUID(state["history_id"]),
        state["snapshot_id"],
        state["published_at"],
        losses,
    )


def _losses(state: State, marker: State | None) -> list[str]:
    """At least this is missing; what came after the marker was written, nobody wrote down."""

    assert marker is not None, "without a marker nothing is found behind"
    if marker["history_serial"] > state["history_serial"]:
        return [
            f"the whole line of history {marker['history_id']}, with its newest snapshot "
            f"{marker['snapshot_id']} published at {marker['published_at']}"
        ]
    lost = []
    snapshots = marker["snapshot_id"] - state["snapshot_id"]
    if snapshots > 0:
        lost.append(
            f"{snapshots} snapshots, {state['snapshot_id'] + 1} to {marker['snapshot_id']}, "
            f"published after {state['published_at']} and until {marker['published_at']}"
        )
    for shard, (end, seen) in enumerate(zip(state["ends"], marker["ends"], strict=False)):
        if seen > end:
            lost.append(
                f"{seen - end} accepted requests of shard {shard}, positions {end} to {seen - 1}, "
                "with their idempotency keys"
            )
    return lost or ["claims and other bookkeeping; no snapshot and no accepted request is known"]
