"""What must hold of a lake after any fault: asked of the database itself, then through the lake.

The tables are read as they are, so that a mistake in the product's own queries cannot hide one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from lakebus.receipts import Receipt
from storage.bus.interface import BatchState, IngestBus, NewEntry
from storage.catalog.interface import Catalog
from tests.conformance.worker import StagedFiles


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """An entry whose receipt somebody holds."""

    entry: NewEntry
    receipt: Receipt


async def audit(
    dsn: str,
    *,
    bus: IngestBus,
    catalog: Catalog,
    acknowledged: Sequence[Acknowledged],
    files: StagedFiles | None = None,
    drained: bool = True,
) -> None:
    """Positions and ranges are dense, nothing is published twice, every receipt is true.

    :param drained: everything accepted must be terminal by now.
    :param files: what stands for the data files; None when they are real ones.
    """

    ends = await audit_control_plane(dsn, drained=drained)
    seen: set[tuple[int, int]] = set()
    for one in acknowledged:
        receipt, entry = one.receipt, one.entry
        status = await bus.batch(receipt.batch_id)
        assert status is not None, f"{receipt.batch_id} was acknowledged and is not there"
        assert status.position < ends[status.shard]
        assert (status.shard, status.position) not in seen, "two receipts for one entry"
        seen.add((status.shard, status.position))
        assert not drained or status.state in (BatchState.PUBLISHED, BatchState.QUARANTINED)
        if entry.idempotency_key is not None:
            record = await bus.find_key(entry.principal_id, entry.target, entry.idempotency_key)
            assert record is not None, f"the key of {receipt.batch_id} is forgotten"
            assert record.receipt == receipt, "the key answers another receipt"
        if files is not None and status.state is BatchState.PUBLISHED:
            assert status.snapshot_id is not None
            rows = await files.rows_at(catalog, status.snapshot_id)
            assert rows.get((status.shard, status.position)) == receipt.rows
    if files is not None:  # raises when an entry lies in two files
        await files.rows_at(catalog, (await catalog.head()).snapshot_id)


async def audit_control_plane(dsn: str, *, drained: bool) -> dict[int, int]:
    """The tables among themselves; returns the end of each shard."""

    connection = await asyncpg.connect(dsn, server_settings={"search_path": "lakebus"})
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return await _audit(connection, drained=drained)
    finally:
        await connection.close()


async def _audit(
    connection: asyncpg.Connection[asyncpg.Record], *, drained: bool
) -> dict[int, int]:
    ends = dict(await connection.fetch("SELECT shard, next_append FROM bus_shard"))
    claimed = dict(await connection.fetch("SELECT shard, next_claim FROM bus_claim"))
    watermark = dict(enumerate(await connection.fetchval("SELECT watermark FROM lake")))
    for shard, end in ends.items():
        log = await connection.fetch(
            "SELECT lo, hi FROM bus_log WHERE shard = $1 ORDER BY lo", shard
        )
        first, last = _dense(log) or (end, end)  # terminal rows may have been trimmed
        assert first <= watermark[shard], f"shard {shard}: the log lacks its beginning"
        assert last == end, f"shard {shard}: the log has a hole: {log}"
        ranges = await connection.fetch(
            "SELECT lo, hi FROM published_range WHERE shard = $1 ORDER BY lo", shard
        )
        leases = await connection.fetch(
            "SELECT lo, hi FROM bus_lease WHERE shard = $1 ORDER BY lo", shard
        )
        # Every claimed position is in exactly one range: published, or under a lease.
        both = sorted([*ranges, *leases], key=lambda row: int(row["lo"]))
        assert _dense(both) in (None, (0, claimed[shard])), f"shard {shard}: {both}"
        assert bool(both) == bool(claimed[shard])
        below = [row for row in ranges if row["hi"] <= watermark[shard]]
        assert _dense(below) == ((0, watermark[shard]) if watermark[shard] else None)
        if drained:
            assert not leases
            assert watermark[shard] == claimed[shard] == end, f"shard {shard} was left behind"
    snapshots = await connection.fetch(
        "SELECT snapshot_id, parent_id, published_at, watermark, operation FROM snapshot"
        " ORDER BY snapshot_id"
    )
    for before, after in itertools.pairwise(snapshots):
        assert after["parent_id"] == before["snapshot_id"]
        assert after["published_at"] > before["published_at"]
        assert all(a >= b for a, b in zip(after["watermark"], before["watermark"], strict=True))
    made = {row["snapshot_id"] for row in snapshots if row["operation"] == "append"}
    of_ranges = await connection.fetch("SELECT DISTINCT snapshot_id FROM published_range")
    assert {row["snapshot_id"] for row in of_ranges} == made, "a publish came in parts"
    of_files = await connection.fetch("SELECT DISTINCT first_snapshot FROM data_file")
    assert {row["first_snapshot"] for row in of_files} <= made
    return ends


def _dense(rows: Sequence[asyncpg.Record]) -> tuple[int, int] | None:
    """(first, end) of ranges that follow each other without hole or overlap; None of none."""

    if not rows:
        return None
    for before, after in itertools.pairwise(rows):
        if before["hi"] != after["lo"]:
            return int(before["hi"]), -1
    return int(rows[0]["lo"]), int(rows[-1]["hi"])
