"""The life of one entry, for whoever asks where its rows are: what is stored about it, in order.

Read only, and put together from several reads: each part is true by itself at the moment it was
read, and the parts may be a moment apart. Nothing decides anything by it.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TracedEntry:
    """What was accepted. `lo` and `hi`: the positions of the group commit it came with."""

    principal_id: int
    target: str
    rows: int
    rows_rejected: int
    size_bytes: int
    lo: int
    hi: int
    accepted_at: dt.datetime
    idempotency_expires_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class TracedLease:
    """The range that holds it while it is not terminal: `leased`, or `ready` to be claimed."""

    epoch: int
    state: str
    lo: int
    hi: int
    owner: uuid.UUID | None
    claimed_at: dt.datetime | None
    expires_at: dt.datetime | None
    attempt: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class TracedPublication:
    """The commit that ended it. `readable`: the snapshot is still retained."""

    lo: int
    hi: int
    commit_id: uuid.UUID | None
    owner: uuid.UUID | None
    snapshot_id: int
    published_at: dt.datetime
    readable: bool


@dataclass(frozen=True, slots=True)
class TracedFile:
    """A file that its snapshot added to one of its tables. `last_snapshot_id`: the first one
    without the file (its rows are in another one then, or deleted)."""

    table: str
    file_id: uuid.UUID
    rows: int
    size_bytes: int
    last_snapshot_id: int | None


@dataclass(frozen=True, slots=True)
class TracedQuarantine:
    quarantine_id: int
    kind: str
    rows: int
    reason: str
    attempts: int
    created_at: dt.datetime
    successor_batch_id: str | None


@dataclass(frozen=True, slots=True)
class Trace:
    """`watermark`: of its shard; every position below is terminal. `head`: the newest snapshot."""

    batch_id: str
    shard: int
    position: int
    watermark: int
    head_snapshot_id: int
    entry: TracedEntry
    lease: TracedLease | None
    publication: TracedPublication | None
    files: tuple[TracedFile, ...]
    quarantine: tuple[TracedQuarantine, ...]


class Traces(Protocol):
    async def trace(self, batch_id: str) -> Trace | None:
        """None when the batch is unknown, or older than the idempotency window."""
        ...
