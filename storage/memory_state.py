"""The rows of the in-memory control plane: what PostgreSQL keeps in tables, as plain records.

All of a lake's truth is one `LakeState`, so that a copy of it is a backup and whatever is not in
it is lost at a restart. The records are mutable; only the functions of `storage.bus.memory_*` and
`storage.catalog.memory*` change them, each within one step of the event loop, which is what stands
for a transaction here.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass, field

from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile, Snapshot
from storage.bus.interface import BatchState, KeyRecord, QuarantineItem
from storage.catalog.interface import DropTicket, HistoryFork, Published, PublishedRange
from storage.maintenance.interface import CondemnedFile, Intent, Pin, Swapped, Tag
from storage.maintenance.jobs import Job

#: (principal, target, key): one caller's key means one entry for one target (A3).
KeyScope = tuple[int, str, str]


@dataclass(slots=True)
class StoredSegment:
    """One group commit's payload; dropped once `live` reaches zero and purge comes by."""

    payload: bytes
    live: int


@dataclass(slots=True)
class LogEntry:
    """One accepted entry. `place` is its index in the segment, `index` its entry index."""

    shard: int
    position: int
    batch_id: str
    principal_id: int
    target: str
    table_ids: tuple[int, ...]
    rows: int
    segment_id: int
    index: bytes
    size_bytes: int
    accepted_at: dt.datetime
    key_scope: KeyScope | None
    state: BatchState = BatchState.ACCEPTED
    snapshot_id: int | None = None
    terminal_at: dt.datetime | None = None
    reason: str | None = None


@dataclass(slots=True)
class RangeRow:
    """A range that was claimed at least once and is not terminal: leased, or ready to be."""

    lease_id: int
    epoch: int
    shard: int
    lo: int
    hi: int
    leased: bool
    owner: uuid.UUID | None
    expires_at: dt.datetime
    not_before: dt.datetime
    attempt: int = 0
    lone_failures: int = 0
    canary: bool = False
    owner_commits_at_claim: int = 0
    last_error: str | None = None


@dataclass(slots=True)
class ShardRow:
    """Counters of one shard. `done` maps lo → hi of terminal ranges above the watermark."""

    end: int = 0
    next_claim: int = 0
    watermark: int = 0
    appended_bytes: int = 0
    terminal_bytes: int = 0
    done: dict[int, int] = field(default_factory=dict)
    log: dict[int, LogEntry] = field(default_factory=dict)
    gaps: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class SchemaRow:
    schema: TableSchema
    first_snapshot: int
    last_snapshot: int | None = None


@dataclass(slots=True)
class TableRow:
    """A table for ever: its versions, and the ticket once it is closed."""

    table_id: int
    name: str
    first_snapshot: int
    last_column_id: int
    versions: list[SchemaRow]
    last_snapshot: int | None = None
    ticket: DropTicket | None = None

    @property
    def current(self) -> TableSchema:
        return self.versions[-1].schema

    @property
    def live(self) -> bool:
        return self.last_snapshot is None

    @property
    def accepts_rows(self) -> bool:
        return self.live and self.ticket is None


@dataclass(slots=True)
class FileRow:
    file: DataFile
    first_snapshot: int
    last_snapshot: int | None = None


@dataclass(slots=True)
class ErasureRow:
    table_id: int
    owed: bool = False
    ended: bool = False


@dataclass(slots=True)
class ErasedRow:
    """What the snapshots from the first until before the last lost with one file."""

    erasure_id: uuid.UUID
    table_id: int
    first_snapshot: int
    last_snapshot: int
    rows: int
    files: int
    size_bytes: int


@dataclass(slots=True)
class QuarantineRow:
    item: QuarantineItem
    by_crash: bool
    dropped: bool = False


@dataclass(slots=True)
class JobRow:
    job: Job
    principal_id: int | None
    key: str | None
    fingerprint: bytes | None
    not_before: dt.datetime
    expires_at: dt.datetime | None = None
    epoch: int = 0


@dataclass(slots=True)
class LakeState:
    """Everything that survives a restart."""

    lake_id: uuid.UUID
    token_secret: bytes
    shards: list[ShardRow]
    histories: list[HistoryFork]
    snapshots: dict[int, Snapshot]
    head_id: int
    closed_until: dt.datetime
    oldest_snapshot_id: int
    lost_snapshots: list[tuple[int, int]] = field(default_factory=list)
    lost_times: list[tuple[dt.datetime, dt.datetime]] = field(default_factory=list)
    last_lease_id: int = 0
    last_epoch: int = 0
    last_segment_id: int = 0
    last_quarantine_id: int = 0
    history_serial: int = 1
    table_id_floor: int = 0
    claim_turn: int = 0
    segments: dict[int, StoredSegment] = field(default_factory=dict)
    keys: dict[KeyScope, KeyRecord] = field(default_factory=dict)
    ranges: dict[int, RangeRow] = field(default_factory=dict)
    intents: dict[uuid.UUID, Intent] = field(default_factory=dict)
    owner_commits: dict[uuid.UUID, int] = field(default_factory=dict)
    tables: dict[int, TableRow] = field(default_factory=dict)
    files: dict[uuid.UUID, FileRow] = field(default_factory=dict)
    quarantine: dict[int, QuarantineRow] = field(default_factory=dict)
    publications: dict[uuid.UUID, Published] = field(default_factory=dict)
    published_ranges: list[PublishedRange] = field(default_factory=list)
    swaps: dict[uuid.UUID, Swapped] = field(default_factory=dict)
    tags: dict[str, Tag] = field(default_factory=dict)
    pins: dict[uuid.UUID, Pin] = field(default_factory=dict)
    condemned: dict[uuid.UUID, CondemnedFile] = field(default_factory=dict)
    jobs: dict[uuid.UUID, JobRow] = field(default_factory=dict)
    job_schedule: dict[str, dt.datetime] = field(default_factory=dict)
    erasures: dict[uuid.UUID, ErasureRow] = field(default_factory=dict)
    erased: dict[uuid.UUID, ErasedRow] = field(default_factory=dict)
    erasure_count: int = 0
    erasures_serial: int = 1
