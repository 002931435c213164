"""The catalog: tables, snapshots, data files, and the one transaction that publishes.

The catalog is the only place that knows the truth (architecture, *What it is*). A commit is data:
files plus the lease under which they were made. Publishing checks the requirements and makes the
fact. A snapshot is a range predicate over data files: a file belongs to it from `first_snapshot`
until before `last_snapshot`.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile, Snapshot
from storage.bus.interface import LeaseRef


@dataclass(frozen=True, slots=True)
class HistoryFork:
    """One line of history and where it left its parent: positions above `positions` and snapshots
    above `snapshot_id` of the parent were lost."""

    history: uuid.UUID
    parent: uuid.UUID | None
    snapshot_id: int
    positions: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class LakeIdentity:
    """`histories` is the path from the first line to the current one (last)."""

    lake_id: uuid.UUID
    token_secret: bytes = field(repr=False)
    histories: tuple[HistoryFork, ...] = ()

    @property
    def history(self) -> uuid.UUID:
        return self.histories[-1].history


@dataclass(frozen=True, slots=True)
class Head:
    """The newest published snapshot and the database's clock, read in one statement.

    `erasures` grows when files of earlier snapshots were exchanged: what was remembered of files is
    to be forgotten. Tables of `erasures_owed` are not read before their erasures, which a restore
    has undone, are done again (E7)."""

    snapshot_id: int
    published_at: dt.datetime
    history: uuid.UUID
    watermark: Mapping[int, int]
    closed_until: dt.datetime
    now: dt.datetime
    oldest_snapshot_id: int
    erasures: int = 0
    erasures_owed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class QuarantinedEntry:
    """A verdict about one entry of a commit's range: kept with its bytes, reason and attempts."""

    position: int
    reason: str
    attempts: int
    payload: bytes
    by_crash: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """A proposal: these files hold exactly the rows of this leased range, less the quarantined
    entries. `range_bytes` is the bus's share that becomes terminal (backpressure accounting)."""

    commit_id: uuid.UUID
    lease: LeaseRef
    files: tuple[DataFile, ...]
    range_bytes: int
    owner: uuid.UUID
    quarantined: tuple[QuarantinedEntry, ...] = ()


class CommitOutcome(StrEnum):
    PUBLISHED = "published"
    LEASE_LOST = "lease_lost"
    INTENT_LOST = "intent_lost"
    QUARANTINE_STOPPED = "quarantine_stopped"


@dataclass(frozen=True, slots=True)
class Published:
    """What one publish transaction did. `snapshot_id` is None when no commit was accepted."""

    snapshot_id: int | None
    published_at: dt.datetime | None
    outcomes: Mapping[uuid.UUID, CommitOutcome]
    watermark: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class TableChange:
    """The result of a schema statement. `created` is False when `if_not_exists` found the table."""

    schema: TableSchema
    snapshot_id: int
    created: bool = True


@dataclass(frozen=True, slots=True)
class DropTicket:
    """A table closed at the door. It can be dropped once every shard's watermark has reached
    `positions`: the entries accepted before it are terminal then (A12)."""

    table_id: int
    name: str
    positions: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class SchemaLife:
    """One schema version of one table and the snapshots in which it holds."""

    schema: TableSchema
    first_snapshot: int
    last_snapshot: int | None
    table_first_snapshot: int
    table_last_snapshot: int | None


@dataclass(frozen=True, slots=True)
class Erased:
    """An erasure took `rows` from the snapshots `first_snapshot` until before `last_snapshot` of
    one table; they lay in `exchanged` files."""

    erasure_id: uuid.UUID
    table_id: int
    first_snapshot: int
    last_snapshot: int
    rows: int
    exchanged: int


def covering(marks: Sequence[Erased], snapshot_id: int) -> tuple[Erased, ...]:
    """Those of which the snapshot lost something."""

    return tuple(m for m in marks if m.first_snapshot <= snapshot_id < m.last_snapshot)


@dataclass(frozen=True, slots=True)
class ManifestDelta:
    """What changed in (after, until]: files that began, files that ended (id → last snapshot),
    and schema versions that began or ended. `erasures` is the lake's count; with another one than
    before, it does not fit to what was read before. `erased` is told with after=0 only."""

    after: int
    until: int
    files: tuple[DataFile, ...]
    ended: Mapping[uuid.UUID, int]
    schemas: tuple[SchemaLife, ...]
    erasures: int = 0
    erased: tuple[Erased, ...] = ()


@dataclass(frozen=True, slots=True)
class PublishedRange:
    """The positions [lo, hi) of one shard became terminal with this snapshot."""

    shard: int
    lo: int
    hi: int
    snapshot_id: int


@dataclass(frozen=True, slots=True)
class TableState:
    """A live table as the door sees it: `open` accepts rows."""

    schema: TableSchema
    open: bool


class Catalog(Protocol):
    """All calls raise Unavailable when the catalog cannot be reached."""

    async def identity(self) -> LakeIdentity: ...

    async def head(self) -> Head: ...

    async def snapshot(self, snapshot_id: int) -> Snapshot:
        """Raises SnapshotNotFound, SnapshotExpired, HistoryLost (D2)."""
        ...

    async def snapshot_at(self, time: dt.datetime) -> Snapshot:
        """The newest snapshot published at or before `time`, once that time is closed (C4).

        Raises TimeInFuture, SnapshotNotFound (before the first), SnapshotExpired, HistoryLost.
        """
        ...

    async def snapshots(self, *, limit: int, before: int | None = None) -> Sequence[Snapshot]: ...

    async def create_table(
        self,
        *,
        name: str,
        columns: Sequence[Column],
        partition_by: Sequence[str] = (),
        sort_by: Sequence[str] = (),
        retention: Mapping[str, object] | None = None,
        if_not_exists: bool = False,
        actor: str = "",
    ) -> TableChange:
        """Publishes a snapshot with the new table. Column ids are given by the catalog (1, 2, …).

        Raises TableExists.
        """
        ...

    async def alter_table(
        self, *, schema: TableSchema, expected_version: int, actor: str = ""
    ) -> TableChange:
        """Publishes `schema` as the next version (its `version` is ignored). New columns carry
        column_id 0 and get ids never used before in the table.

        Raises TableNotFound, SchemaVersionMismatch.
        """
        ...

    async def begin_drop(self, *, name: str, actor: str = "") -> DropTicket:
        """Closes the table at the door; repeating it gives the same ticket. TableNotFound."""
        ...

    async def finish_drop(self, ticket: DropTicket) -> int:
        """Publishes the drop and returns its snapshot id; repeating it returns the same id.

        Raises Unavailable when entries accepted before the drop are not yet terminal.
        """
        ...

    async def closing_tables(self) -> Sequence[DropTicket]:
        """Drops that were begun and not finished, for whoever finishes them after a crash."""
        ...

    async def table(self, name: str) -> TableState | None:
        """The live table of this name, from the database now."""
        ...

    async def schema_version(self, table_id: int, version: int) -> TableSchema | None: ...

    async def tables(self) -> Sequence[TableState]: ...

    async def publish(self, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        """ONE transaction: files, snapshot, ranges, watermark, leases ended (C1, C2). A commit
        whose lease was reclaimed is left out and reported; its neighbours are published (A9).

        Raises OutcomeUnknown when the reply was lost: ask `publish_outcome` first (C5).
        """
        ...

    async def publish_outcome(self, publication_id: uuid.UUID) -> Published | None:
        """What became of a publication, after any transaction of it in flight has ended."""
        ...

    async def published_ranges(
        self, *, after: int, until: int, shard: int = 0, position: int = 0, limit: int = 1_000
    ) -> Sequence[PublishedRange]:
        """The first `limit` ranges published in (after, until] that do not end at or before
        (shard, position), in order of (shard, lo). They are kept for ever (D12)."""
        ...

    async def removed_rows(self, table_id: int, *, after: int, until: int) -> bool:
        """Whether a snapshot in (after, until], expired ones among them, removed rows of the table
        (operation `delete` or `retain`)."""
        ...

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        """Every change in (after, until]; with after=0 the whole manifest that retained and tagged
        snapshots up to `until` need. Raises SnapshotExpired when `after` is older than the oldest
        retained snapshot: what ended since may be forgotten already, so begin anew with 0."""
        ...
