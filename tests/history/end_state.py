"""The catalog's truth at the end of a run, as plain facts: what `check` compares the record with.

Taken in one read-only transaction from PostgreSQL, or from a `MemoryLake`. It holds facts only; the
checker draws the conclusions. Log rows that were purged are missing from `entries`, and in a memory
lake also from `ranges`; `purged` names the positions of which nothing is known any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from lakebus.clock import format_time
from storage.bus.interface import BatchState
from storage.memory_lake import MemoryLake
from storage.memory_state import LakeState, LogEntry, ShardRow

Position = tuple[int, int]


class Line(msgspec.Struct, frozen=True):
    """One line of history and the positions at which it left its parent (empty for the first)."""

    serial: int
    history: str
    fork_snapshot_id: int
    fork_positions: dict[int, int]


class ShardEnd(msgspec.Struct, frozen=True, gc=False):
    shard: int
    end: int
    watermark: int


class SnapshotFact(msgspec.Struct, frozen=True):
    """`published_at` is RFC 3339 with microseconds in UTC, so that text order is time order. By
    table, `rows_added`, `rows_removed` and `files_added` are what its summary says; `expired`: no
    reader may ask for it any more, and its files may be gone."""

    snapshot_id: int
    parent_id: int | None
    serial: int
    published_at: str
    operation: str
    watermark: dict[int, int]
    rows_added: dict[str, int] = {}
    rows_removed: dict[str, int] = {}
    files_added: dict[str, int] = {}
    expired: bool = False


class Range(msgspec.Struct, frozen=True, gc=False):
    """Entries [lo, hi) of one shard that became terminal in one snapshot."""

    shard: int
    lo: int
    hi: int
    snapshot_id: int


class FileFact(msgspec.Struct, frozen=True, gc=False):
    """`present`: whether the object store has the object; None when nobody looked."""

    file_id: str
    table: str
    rows: int
    first_snapshot: int
    last_snapshot: int | None = None
    present: bool | None = None


class EntryFact(msgspec.Struct, frozen=True, gc=False):
    """`state`: accepted, published or quarantined, as ranges and quarantine say."""

    batch_id: str
    shard: int
    position: int
    rows: int
    state: str
    snapshot_id: int | None = None


class QuarantineFact(msgspec.Struct, frozen=True, gc=False):
    batch_id: str
    shard: int
    position: int
    successor_batch_id: str | None = None


class EndState(msgspec.Struct, frozen=True):
    """`drained`: whoever took the dump waited until the bus had nothing left to do. `skipped`
    are (shard, lo, hi) that a restore gave up, `purged` those of which nothing is known now.
    `collected`: by table, how many data files collection has removed from the catalog."""

    lines: tuple[Line, ...]
    shards: tuple[ShardEnd, ...]
    snapshots: tuple[SnapshotFact, ...]
    ranges: tuple[Range, ...]
    files: tuple[FileFact, ...]
    entries: tuple[EntryFact, ...]
    quarantined: tuple[QuarantineFact, ...]
    drained: bool
    skipped: tuple[tuple[int, int, int], ...] = ()
    purged: tuple[tuple[int, int, int], ...] = ()
    collected: dict[str, int] = {}


def write_end_state(path: Path, end_state: EndState) -> None:
    path.write_bytes(msgspec.json.encode(end_state))


def read_end_state(path: Path) -> EndState:
    return msgspec.json.decode(path.read_bytes(), type=EndState)


# --- from PostgreSQL -----------------------------------------------------------------------------

_LINES = """SELECT history_serial, history_id, parent_serial, fork_snapshot_id, fork_positions
  FROM lakebus.history ORDER BY history_serial"""
_SHARDS = """SELECT s.shard, s.next_append, l.watermark[s.shard + 1] AS watermark
  FROM lakebus.bus_shard s, lakebus.lake l ORDER BY s.shard"""
_SNAPSHOTS = """SELECT snapshot_id, parent_id, history_serial, published_at, operation, watermark,
       summary -> 'tables' AS tables, expired_at IS NOT NULL AS expired
  FROM lakebus.snapshot ORDER BY snapshot_id"""
# What a restore skipped is kept as a range of the snapshot that began its line (F3).
_RANGES = """SELECT r.shard, r.lo, r.hi, r.snapshot_id,
       coalesce(s.operation, '') = 'restore' AS skip
  FROM lakebus.published_range r LEFT JOIN lakebus.snapshot s USING (snapshot_id)
 ORDER BY r.shard, r.lo"""
_FILES = """SELECT f.file_id, t.name, f.table_id, f.rows, f.first_snapshot, f.last_snapshot
  FROM lakebus.data_file f LEFT JOIN lakebus.lake_table t USING (table_id)
 ORDER BY f.first_snapshot, f.file_id"""
# The end of an entry is derived here, by one join, and not with the product's own functions.
_ENTRIES = """SELECT e.history_serial, e.shard, e.position, e.rows, r.snapshot_id,
       q.position IS NOT NULL AS quarantined
  FROM (SELECT l.history_serial, l.shard, l.lo + i - 1 AS position, l.row_counts[i] AS rows
          FROM lakebus.bus_log l, generate_series(1, (l.hi - l.lo)::integer) i) e
  LEFT JOIN lakebus.published_range r
         ON r.shard = e.shard AND r.lo <= e.position AND r.hi > e.position
  LEFT JOIN (SELECT DISTINCT shard, position FROM lakebus.bus_quarantine WHERE kind = 'entry') q
         ON q.shard = e.shard AND q.position = e.position
 ORDER BY e.shard, e.position"""
_QUARANTINED = """SELECT history_serial, shard, position, successor_batch_id
  FROM lakebus.bus_quarantine WHERE kind = 'entry' ORDER BY quarantine_id"""
# Published files only: an orphan was never in the catalog.
_COLLECTED = """SELECT t.name, c.table_id, count(*) AS files
  FROM lakebus.condemned_file c LEFT JOIN lakebus.lake_table t USING (table_id)
 WHERE c.reason = 'unreferenced' AND c.state <> 'condemned' GROUP BY 1, 2"""
_TABLE_NAMES = "SELECT table_id, name FROM lakebus.lake_table"


async def dump_postgres(dsn: str, *, drained: bool) -> EndState:
    """The truth in the database of `dsn`, all of it from one moment."""

    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return await read_database(connection, drained=drained)
    finally:
        await connection.close()


async def read_database(
    connection: asyncpg.Connection[asyncpg.Record], *, drained: bool
) -> EndState:
    """The same as a transaction of the caller's sees it."""

    names = {r["table_id"]: r["name"] for r in await connection.fetch(_TABLE_NAMES)}
    ranges = await connection.fetch(_RANGES)
    return EndState(
        lines=tuple(_line(r) for r in await connection.fetch(_LINES)),
        shards=tuple(ShardEnd(*r) for r in await connection.fetch(_SHARDS)),
        snapshots=tuple(_snapshot(r, names) for r in await connection.fetch(_SNAPSHOTS)),
        ranges=tuple(
            Range(r["shard"], r["lo"], r["hi"], r["snapshot_id"]) for r in ranges if not r["skip"]
        ),
        files=tuple(_file(r) for r in await connection.fetch(_FILES)),
        entries=tuple(_entry(r) for r in await connection.fetch(_ENTRIES)),
        quarantined=tuple(_quarantine(r) for r in await connection.fetch(_QUARANTINED)),
        drained=drained,
        skipped=tuple((r["shard"], r["lo"], r["hi"]) for r in ranges if r["skip"]),
        collected={
            r["name"] or f"#{r['table_id']}": r["files"] for r in await connection.fetch(_COLLECTED)
        },
    )


def _line(row: asyncpg.Record) -> Line:
    first = row["parent_serial"] is None
    return Line(
        serial=row["history_serial"],
        history=str(row["history_id"]),
        fork_snapshot_id=row["fork_snapshot_id"],
        fork_positions={} if first else dict(enumerate(row["fork_positions"])),
    )


def _snapshot(row: asyncpg.Record, names: Mapping[int, str]) -> SnapshotFact:
    tables = msgspec.json.decode(row["tables"]) if row["tables"] else {}
    return SnapshotFact(
        snapshot_id=row["snapshot_id"],
        parent_id=row["parent_id"],
        serial=row["history_serial"],
        published_at=format_time(row["published_at"]),
        operation=row["operation"],
        watermark=dict(enumerate(row["watermark"])),
        rows_added=_told(tables, names, "rows_added"),
        rows_removed=_told(tables, names, "rows_removed"),
        files_added=_told(tables, names, "files_added"),
        expired=row["expired"],
    )


def _told(tables: Mapping[str, Any], names: Mapping[int, str], what: str) -> dict[str, int]:
    return {
        names.get(int(table_id), table_id): table[what]
        for table_id, table in tables.items()
        if what in table
    }


def _file(row: asyncpg.Record) -> FileFact:
    return FileFact(
        file_id=str(row["file_id"]),
        table=row["name"] or f"#{row['table_id']}",
        rows=row["rows"],
        first_snapshot=row["first_snapshot"],
        last_snapshot=row["last_snapshot"],
    )


def _batch_id(row: asyncpg.Record) -> str:
    return f"b{row['history_serial']}-{row['shard']}-{row['position']}"


def _entry(row: asyncpg.Record) -> EntryFact:
    published = row["snapshot_id"] is not None
    state = "quarantined" if row["quarantined"] else "published" if published else "accepted"
    return EntryFact(
        _batch_id(row), row["shard"], row["position"], row["rows"], state, row["snapshot_id"]
    )


def _quarantine(row: asyncpg.Record) -> QuarantineFact:
    return QuarantineFact(_batch_id(row), row["shard"], row["position"], row["successor_batch_id"])


# --- from a memory lake --------------------------------------------------------------------------


def dump_memory(lake: MemoryLake, *, drained: bool) -> EndState:
    """The truth of an in-memory lake, between two steps of its event loop."""

    state = lake.state
    names = {table_id: table.name for table_id, table in state.tables.items()}
    when = {snapshot.published_at: n for n, snapshot in state.snapshots.items()}
    serials = {fork.history: n for n, fork in enumerate(state.histories, 1)}
    entries = [
        _log_entry(entry, when) for shard in state.shards for _, entry in sorted(shard.log.items())
    ]
    return EndState(
        lines=tuple(
            Line(n, str(fork.history), fork.snapshot_id, dict(fork.positions) if n > 1 else {})
            for n, fork in enumerate(state.histories, 1)
        ),
        shards=tuple(ShardEnd(n, s.end, s.watermark) for n, s in enumerate(state.shards)),
        snapshots=tuple(
            SnapshotFact(
                snapshot_id=number,
                parent_id=snapshot.parent_id,
                serial=serials[snapshot.history],
                published_at=format_time(snapshot.published_at),
                operation=snapshot.operation,
                watermark=dict(snapshot.watermark),
                rows_added=_told(_tables_of(snapshot.summary), names, "rows_added"),
                rows_removed=_told(_tables_of(snapshot.summary), names, "rows_removed"),
                files_added=_told(_tables_of(snapshot.summary), names, "files_added"),
            )
            for number, snapshot in sorted(state.snapshots.items())
        ),
        ranges=tuple(_runs(entries)),
        files=tuple(_memory_files(state, names)),
        entries=tuple(entries),
        quarantined=tuple(
            QuarantineFact(
                row.item.batch_id, row.item.shard, row.item.position, row.item.successor_batch_id
            )
            for row in state.quarantine.values()
            if row.item.kind == "entry"
        ),
        drained=drained,
        skipped=tuple(
            (n, lo, hi) for n, s in enumerate(state.shards) for lo, hi in sorted(s.gaps.items())
        ),
        purged=tuple(_purged(state.shards)),
    )


def _tables_of(summary: Mapping[str, object]) -> Mapping[str, Any]:
    tables = summary.get("tables", {})
    assert isinstance(tables, Mapping)
    return tables


def _log_entry(entry: LogEntry, when: Mapping[Any, int]) -> EntryFact:
    """A quarantined entry does not name its snapshot; the time of its end does."""

    ended_in = entry.snapshot_id
    if entry.state is BatchState.QUARANTINED and entry.terminal_at is not None:
        ended_in = when.get(entry.terminal_at)
    return EntryFact(
        entry.batch_id, entry.shard, entry.position, entry.rows, entry.state.value, ended_in
    )


def _runs(entries: list[EntryFact]) -> list[Range]:
    """Ranges, as far as the log still tells: neighbours that ended in one snapshot."""

    runs: list[Range] = []
    for entry in entries:
        if entry.snapshot_id is None:
            continue
        last = runs[-1] if runs else None
        place = (entry.shard, entry.position, entry.snapshot_id)
        if last is not None and place == (last.shard, last.hi, last.snapshot_id):
            runs[-1] = Range(last.shard, last.lo, last.hi + 1, last.snapshot_id)
        else:
            runs.append(Range(entry.shard, entry.position, entry.position + 1, entry.snapshot_id))
    return runs


def _memory_files(state: LakeState, names: Mapping[int, str]) -> list[FileFact]:
    return [
        FileFact(
            str(file_id),
            names[row.file.table_id],
            row.file.rows,
            row.first_snapshot,
            row.last_snapshot,
        )
        for file_id, row in state.files.items()
    ]


def _purged(shards: list[ShardRow]) -> list[tuple[int, int, int]]:
    """Positions below the watermark whose log rows are gone and that no restore skipped."""

    purged: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        position = 0
        known = sorted([(p, p + 1) for p in shard.log] + list(shard.gaps.items()))
        reached = min(shard.watermark, shard.end)
        for lo, hi in [*known, (reached, reached)]:
            if position < lo <= reached:
                purged.append((number, position, lo))
            position = max(position, hi)
    return purged
