"""Upkeep: what maintenance asks of the control plane, beside what everybody asks of the catalog.

What is authoritative: the database. Every call is one transaction, or with a limit a few, each of
them right by itself. A maintenance job publishes like everybody else: it proposes a swap of files,
and the requirement that makes it true is checked in the publish transaction (its inputs are all
live), so a job may be late, doubled or paused, and can only lose. Files never change and deletes
are copy-on-write, so "live" also says "no delete has touched it" (contract E2).

The life of a file's end (contract E3): unreferenced → condemned (time and reason) → deleting (the
re-check has agreed, nobody can name it any more) → deleted. Only the step to `deleting` decides; it
excludes pins, tags and expiry by one lock, so each of them comes before it or is refused.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from lakebus.snapshots import DataFile


class SwapOperation(StrEnum):
    """Why files are swapped; the `operation` of the snapshot."""

    COMPACT = "compact"
    RETAIN = "retain"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Swap:
    """A proposal: `files` take the place of `inputs` in one table.

    `rows_removed`: exactly how many rows fewer `files` hold; the catalog compares its own counts
    (E1). The write intents of `files` are consumed. `summary` is added to the table's summary.
    """

    publication_id: uuid.UUID
    table_id: int
    operation: SwapOperation
    inputs: tuple[uuid.UUID, ...]
    files: tuple[DataFile, ...]
    rows_removed: int = 0
    summary: Mapping[str, object] = field(default_factory=dict)


def check_swap(swap: Swap) -> None:
    """Raises ValueError for a swap that no plan can mean: a bug of whoever made it."""

    if not swap.inputs:
        raise ValueError("a swap replaces files, and this one names none")
    if swap.rows_removed < 0:
        raise ValueError("a swap never adds rows")
    if any(file.table_id != swap.table_id for file in swap.files):
        raise ValueError("a swap stays within one table")


class SwapOutcome(StrEnum):
    PUBLISHED = "published"
    INPUTS_LOST = "inputs_lost"  # one of them is not live any more: plan again
    INTENT_LOST = "intent_lost"
    ROWS_DIFFER = "rows_differ"  # a bug of the rewrite: nothing was published


@dataclass(frozen=True, slots=True)
class Swapped:
    """`snapshot_id` and `published_at` are None unless published."""

    outcome: SwapOutcome
    snapshot_id: int | None = None
    published_at: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """Snapshots `first`..`last` (inclusive; None: none) are expired, `tagged` of them kept.
    `oldest_snapshot_id` is the oldest retained one that needs no tag."""

    first: int | None
    last: int | None
    tagged: int
    oldest_snapshot_id: int


@dataclass(frozen=True, slots=True)
class Tag:
    """A name that keeps a snapshot for ever."""

    name: str
    snapshot_id: int
    created_at: dt.datetime
    created_by: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Files that these snapshots need are not deleted: every snapshot from `floor` on, and those of
    `snapshot_ids`. `expires_at` None: until it is released."""

    pin_id: uuid.UUID
    kind: str
    floor: int | None
    snapshot_ids: tuple[int, ...]
    expires_at: dt.datetime | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class CondemnedFile:
    """`state`: `condemned`, `deleting` or `deleted`. `reason`: `unreferenced`, `orphan`, `payload`
    (a bus object whose log row is gone) or `erased`."""

    file_id: uuid.UUID
    object_key: str
    table_id: int | None
    reason: str
    size_bytes: int | None
    state: str
    condemned_at: dt.datetime
    deleted_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class Intent:
    """A registered write that nobody has referred to yet. `kind`: `data` (an object at
    `tables/<table id>/<file id>.parquet`), `payload` (`bus/<file id>.segment`) or `canary`
    (`canary/<file id>.parquet`)."""

    file_id: uuid.UUID
    kind: str
    owner: uuid.UUID
    expires_at: dt.datetime
    table_id: int | None


class Upkeep(Protocol):
    """All calls raise Unavailable when nothing happened, OutcomeUnknown when it may have."""

    # --- rewriting ---------------------------------------------------------------------

    async def live_files(self, table_id: int) -> Sequence[DataFile]:
        """The live files of one table, from the database now, oldest first."""
        ...

    async def file_counts(self, *, small_bytes: int) -> Mapping[int, tuple[int, int]]:
        """Live files by table id: (all, those smaller than `small_bytes`). Tables without files
        are left out."""
        ...

    async def register_intents(
        self, table_id: int, count: int, *, owner: uuid.UUID, ttl_s: float
    ) -> Sequence[uuid.UUID]:
        """Write intents for data files of the table, before their first byte (C6)."""
        ...

    async def register_canary(self, *, owner: uuid.UUID, ttl_s: float) -> uuid.UUID:
        """A write intent for one object at `canary/<id>.parquet`, which nobody will refer to."""
        ...

    async def forget_canary(self, file_id: uuid.UUID) -> None:
        """The object is gone again. Whoever dies before leaves an orphan (E4)."""
        ...

    async def publish_swap(self, swap: Swap) -> Swapped:
        """ONE transaction, like every publish. Repeating a publication answers as before (C5)."""
        ...

    async def swap_outcome(self, publication_id: uuid.UUID) -> Swapped | None:
        """What became of a swap, after any transaction of it in flight has ended."""
        ...

    # --- snapshots ---------------------------------------------------------------------

    async def expire_snapshots(
        self, *, keep_s: float, keep_count: int, limit: int, dry_run: bool = False
    ) -> Expired:
        """Expires at most `limit` snapshots that are older than `keep_s` AND beyond the newest
        `keep_count` (E8), oldest first. The head never expires. A tagged one stays readable."""
        ...

    async def create_tag(self, name: str, snapshot_id: int, *, created_by: str) -> Tag:
        """Repeating it for the same snapshot answers as before. Raises TagExists for another one,
        SnapshotExpired, SnapshotNotFound, HistoryLost."""
        ...

    async def drop_tag(self, name: str) -> Tag | None:
        """None when there is none. A snapshot older than the oldest retained one expires with its
        last tag."""
        ...

    async def tags(self) -> Sequence[Tag]:
        """By name."""
        ...

    # --- pins --------------------------------------------------------------------------

    async def pin(
        self,
        pin_id: uuid.UUID,
        *,
        kind: str,
        floor: int | None,
        snapshot_ids: Sequence[int] = (),
        ttl_s: float | None,
        note: str = "",
    ) -> Pin:
        """Makes or replaces the pin, whole. Raises SnapshotExpired when one of the snapshots (or
        `floor`, unless the pin already protects it) is not retained in this very transaction;
        nothing is changed then."""
        ...

    async def release_pin(self, pin_id: uuid.UUID) -> None: ...

    async def pins(self) -> Sequence[Pin]:
        """Those that have not expired by the database's clock."""
        ...

    # --- collection --------------------------------------------------------------------

    async def condemn(self, *, limit: int, dry_run: bool = False) -> Sequence[CondemnedFile]:
        """Condemns files that no retained or tagged snapshot and no pin needs."""
        ...

    async def condemn_orphans(
        self, *, older_than_s: float, limit: int, dry_run: bool = False
    ) -> Sequence[CondemnedFile]:
        """Removes intents that expired unconsumed so long ago, and condemns what may lie under
        their names (E4). From then on no publish can name these files (C6)."""
        ...

    async def begin_deletes(
        self, *, window_s: float, limit: int, dry_run: bool = False
    ) -> Sequence[CondemnedFile]:
        """The re-check: files condemned for longer than `window_s` that still nobody needs become
        `deleting`, and their `data_file` rows go. A file that is needed again stays a data file
        and is pardoned. Answers everything that is `deleting`, also from earlier runs that died."""
        ...

    async def note_deleted(self, file_ids: Sequence[uuid.UUID]) -> None:
        """The objects are gone from the store."""
        ...

    async def condemned(
        self, *, state: str | None = None, limit: int = 1_000, before: dt.datetime | None = None
    ) -> Sequence[CondemnedFile]:
        """Newest first."""
        ...

    async def intents(self) -> Sequence[Intent]: ...

    async def known_names(self, file_ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, str]:
        """What the catalog knows of names found in the store: `used` (a data file, or a payload of
        the bus), `intended`, or else the state of its record as condemned. Left out: unknown."""
        ...

    async def forget_deleted(self, *, older_than_s: float, limit: int) -> int:
        """Forgets records of files deleted so long ago."""
        ...
