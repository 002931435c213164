"""The ingest bus: an append-only log of entries, cut into shards, claimed in ranges under leases.

What a bus promises is in the contract (sections A and B); what every backend must do is in the
conformance suite (`tests/conformance/bus.py`), which a new backend imports and runs. Acking is not
here: a range becomes terminal only inside the catalog's publish transaction (C1), which is why a
backend comes with a catalog that shares its control plane.

Positions are dense per shard and start at 0; ends are exclusive everywhere.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from lakebus.receipts import Receipt
from lakebus.schemas import TableSchema
from storage.rows.segment import EntryPart

BATCH_ID_PATTERN = r"b(\d{1,6})-(\d{1,5})-(\d{1,19})"


@dataclass(frozen=True, slots=True)
class RejectSet:
    """Rows of a request that were diverted: one JSON document, `rows` of them, stored with it."""

    table_id: int
    schema_version: int
    rows: int
    document: bytes


@dataclass(frozen=True, slots=True)
class TableNumbers:
    """Ids for tables to be made: nobody else gets them on the line of history that gave them."""

    history_serial: int
    table_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewTable:
    """A table to be made in the transaction of the entry that fills it. `schema` is whole: an id
    from `IngestBus.number_tables` (with its `history_serial`), version 1, columns 1..n."""

    schema: TableSchema
    history_serial: int


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What one ingest request puts on the bus: all its good rows, atomically, on one shard.

    `target` is the table name as called (folded), or `*`. `fingerprint` is 32 bytes. `parts` may be
    empty only when every row went to `rejects`. `creates` are tables that do not exist yet; they
    exist from the snapshot on that is published with the acceptance of the entry, or not at all.
    """

    principal_id: int
    target: str
    parts: tuple[EntryPart, ...]
    fingerprint: bytes
    idempotency_key: str | None = None
    first_attempt_at: dt.datetime | None = None
    ordering_key: str | None = None
    rejects: tuple[RejectSet, ...] = ()
    creates: tuple[NewTable, ...] = ()

    @property
    def rows(self) -> int:
        return sum(part.batch.num_rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What the bus remembers of an idempotency key: the receipt, the payload's fingerprint and the
    schema versions (by table id) under which its rows were first decoded (A3)."""

    receipt: Receipt
    fingerprint: bytes
    schema_versions: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The entry is durable."""

    receipt: Receipt
    shard: int
    position: int


@dataclass(frozen=True, slots=True)
class KeyTaken:
    """Nothing was appended: the key belongs to an earlier entry. The caller compares payloads."""

    record: KeyRecord


@dataclass(frozen=True, slots=True)
class SchemaStale:
    """Nothing was appended: a part was checked against a schema version that is not current, or
    its table is closed or gone (A12), or a table to be made is there already. The caller decodes
    again under the current schema."""

    table_ids: tuple[int, ...]


AppendOutcome = Accepted | KeyTaken | SchemaStale


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """The fence: everything done under a lease names its id and its epoch."""

    lease_id: int
    epoch: int
    shard: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class ClaimedSegment:
    """A run of claimed entries lo..hi that share one stored payload (see storage.rows.segment).

    `entry_indexes[i]` locates the entry at position lo + i; `entry_bytes` are their shares.
    """

    lo: int
    hi: int
    payload: bytes
    entry_indexes: tuple[bytes, ...]
    entry_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """A range to publish. `attempt` counts failures so far; `lone_failures` those that count
    towards quarantine (B8). `ttl_s` is what is left of the lease by the database's clock.
    `doomed` means: failed alone often enough; quarantine it instead of trying again.
    `file_ids` are write intents, one for each table in the range, registered with the claim (C6).
    `more` is False when nothing else was claimable: what comes later comes with a hint of its own.
    `brought` is all of a small range, if the bus had it at hand; as `read` gives it.
    """

    lease: LeaseRef
    attempt: int
    lone_failures: int
    ttl_s: float
    doomed: bool
    last_error: str | None
    file_ids: Mapping[int, uuid.UUID]
    more: bool = True
    brought: ClaimedSegment | None = None


class BatchState(StrEnum):
    ACCEPTED = "accepted"
    PUBLISHED = "published"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class BatchStatus:
    batch_id: str
    shard: int
    position: int
    principal_id: int
    state: BatchState
    snapshot_id: int | None = None
    reason: str | None = None
    successor_batch_id: str | None = None


@dataclass(frozen=True, slots=True)
class QuarantineItem:
    """A quarantined entry, or a reject set (`kind` is "entry" or "rejects")."""

    quarantine_id: int
    kind: str
    batch_id: str
    shard: int
    position: int
    principal_id: int
    table_ids: tuple[int, ...]
    rows: int
    reason: str
    attempts: int
    created_at: dt.datetime
    successor_batch_id: str | None
    payload: bytes
    target: str


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """`end` is the exclusive high position; `backlog_*` what is not yet terminal."""

    shard: int
    end: int
    watermark: int
    backlog_entries: int
    backlog_bytes: int
    backlog_age_s: float
    leases: int


@dataclass(frozen=True, slots=True)
class PurgeReport:
    segments_truncated: int = 0
    key_generations_truncated: int = 0
    log_rows_deleted: int = 0
    objects_deleted: int = 0
    gave_up_on_lock: bool = False


@dataclass(frozen=True, slots=True)
class EmptiedBus:
    """`bytes_left`: of entries that were to be emptied; they go as soon as what shares their place
    is terminal."""

    objects_deleted: int
    bytes_left: int


class IngestBus(Protocol):
    """A backend of the bus. All calls raise Unavailable when the backend cannot be reached and
    nothing happened, OutcomeUnknown when a write may have happened."""

    @property
    def shards(self) -> int: ...

    def shard_of(self, principal_id: int, ordering: str) -> int:
        """Stable hash of (principal, ordering key or table set) → shard (A7)."""
        ...

    async def append(self, entry: NewEntry) -> AppendOutcome:
        """Makes the entry durable, exactly once for its key (A1-A9, A12, A13).

        Raises Backpressure (A11), IdempotencyExpired (A13), OutcomeUnknown (A6), Unavailable.
        """
        ...

    async def number_tables(self, count: int) -> TableNumbers:
        """Ids for `NewEntry.creates`. Those that are not used are never used."""
        ...

    async def find_key(self, principal_id: int, target: str, key: str) -> KeyRecord | None:
        """What is stored for a key, looked up before a request is refused for any reason (A3)."""
        ...

    async def claim(self, owner: uuid.UUID) -> Claim | None:
        """The next range for `owner`, or None. Order: expired, returned, fresh (B1, B2, B5)."""
        ...

    async def read(self, claim: Claim) -> Sequence[ClaimedSegment]:
        """The payload of a claimed range. Raises LeaseLost when the lease is gone, Corrupt when
        bytes of a live range are missing or damaged (an empty read is an error, not "no data")."""
        ...

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        """Extends those leases still held under their epochs and returns them (B4)."""
        ...

    async def release(self, lease: LeaseRef) -> None:
        """Returns the range at once, not counted as an attempt (B7). Raises LeaseLost."""
        ...

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        """The entry itself failed: counted, isolated by halves, delayed (B7, B8). LeaseLost."""
        ...

    async def note_canary(self, lease: LeaseRef) -> None:
        """Records that this worker published or staged something else under this lease, so that a
        failure of the lone entry may count towards its quarantine (B8). Raises LeaseLost."""
        ...

    async def ends(self) -> Mapping[int, int]:
        """The authoritative exclusive high position of every shard (D5)."""
        ...

    async def shard_status(self) -> Sequence[ShardStatus]: ...

    async def batch(self, batch_id: str) -> BatchStatus | None:
        """The state of a batch; None when unknown or older than the window."""
        ...

    async def quarantined_of(self, entries: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
        """(batch id, reason) of the first of these (shard, position) entries that was quarantined
        and not replayed, or None (D4)."""
        ...

    async def quarantine_items(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[QuarantineItem]: ...

    async def quarantine_item(self, quarantine_id: int) -> QuarantineItem | None: ...

    async def mark_replayed(self, quarantine_id: int, successor_batch_id: str) -> None:
        """Records the successor (B9); doing it again with the same successor changes nothing."""
        ...

    async def drop_quarantined(self, quarantine_id: int) -> bool: ...

    async def erase_quarantined(self, quarantine_id: int, *, reason: str) -> bool:
        """Removes the bytes of an item, and its reason, which may tell of them; the item stays.
        False when it has none any more."""
        ...

    async def empty(self, positions: Mapping[int, int]) -> EmptiedBus:
        """Removes now what is stored of terminal entries below these positions, however young; the
        receipts stay. Call it again while bytes are left."""
        ...

    async def purge(self) -> PurgeReport:
        """Empties what is terminal and old; never blocks ingest for more than 50 ms (B10)."""
        ...
