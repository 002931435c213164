"""What the validator reads of the control plane: a narrow, read-only face of the catalog and bus.

A `View` is one consistent look: in PostgreSQL one REPEATABLE READ transaction, which sees what was
committed when it began and holds nothing that anybody waits for (no tables that are emptied by
TRUNCATE are read in it, whose emptying it would hold up, and which a transaction older than the
TRUNCATE would see empty). Everything is read by pages, so memory does not grow with the lake. The
other calls look at the present, each in a statement of its own: they are for judging once more what
a view made suspicious.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from lakebus.snapshots import ColumnStatistics, DataFile
from storage.catalog.interface import PublishedRange


@dataclass(frozen=True, slots=True)
class InspectedHead:
    """The head row and the database's clock. `watermark` is by shard."""

    lake_id: uuid.UUID
    history: uuid.UUID
    snapshot_id: int
    published_at: dt.datetime
    publish_count: int
    oldest_snapshot_id: int
    watermark: tuple[int, ...]
    now: dt.datetime


@dataclass(frozen=True, slots=True)
class InspectedSnapshot:
    """`tables`: its summary by table id (as text). `retained`: it can be read."""

    snapshot_id: int
    parent_id: int | None
    published_at: dt.datetime
    operation: str
    watermark: tuple[int, ...]
    tables: Mapping[str, Mapping[str, Any]]
    retained: bool


@dataclass(frozen=True, slots=True)
class InspectedFile:
    """A data file, and what the rest of the catalog says about it. `condemned`: the state of its
    condemnation. `table_last_snapshot`: when its table was dropped."""

    file: DataFile
    has_schema: bool
    has_table: bool
    table_last_snapshot: int | None
    condemned: str | None
    has_intent: bool

    def subject(self) -> str:
        return f"file {self.file.file_id}"


@dataclass(frozen=True, slots=True)
class AddedFiles:
    """Files whose first snapshot it is, of one table."""

    files: int
    rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AcceptedRows:
    """What the bus still knows of the ranges of one append: `positions` of them, of which the log
    has `logged`; `rows` of these, less the quarantined."""

    positions: int
    logged: int
    rows: int


@dataclass(frozen=True, slots=True)
class WaitingPayload:
    """A group on the bus of which something is not terminal, and where its bytes are."""

    shard: int
    lo: int
    hi: int
    payload_key: str | None
    has_bytes: bool


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Entries whose bytes were lost, the rows that they had, and the snapshot that ended them."""

    entries: int
    rows: int
    snapshot_id: int


@dataclass(frozen=True, slots=True)
class InspectedTag:
    """`readable`: its snapshot is there and retained."""

    name: str
    snapshot_id: int
    readable: bool


class View(Protocol):
    """One consistent look. Do not keep it open while anything slow happens."""

    async def head(self) -> InspectedHead: ...

    def snapshots(self) -> AsyncIterator[InspectedSnapshot]:
        """All that were ever published in the line, by id."""
        ...

    def ranges(self, shard: int) -> AsyncIterator[PublishedRange]:
        """In order of their beginning."""
        ...

    def files(self) -> AsyncIterator[InspectedFile]:
        """By id."""
        ...

    async def added(self, snapshot_ids: Sequence[int]) -> Mapping[tuple[int, int], AddedFiles]:
        """By (snapshot id, table id)."""
        ...

    async def accepted(self, snapshot_ids: Sequence[int]) -> Mapping[int, AcceptedRows]: ...

    async def shared_objects(self, *, limit: int) -> Sequence[tuple[str, Sequence[uuid.UUID]]]:
        """Object keys that several data files name."""
        ...

    async def tags(self) -> Sequence[InspectedTag]: ...

    async def expired_pins(self, *, before: dt.datetime) -> Sequence[tuple[uuid.UUID, str]]:
        """(id, kind)"""
        ...

    async def sample(self, after: uuid.UUID, *, limit: int) -> Sequence[InspectedFile]:
        """The files after this id, in order of id."""
        ...


class Inspection(Protocol):
    """All calls raise Unavailable; none changes anything."""

    #: Whether a marker of the catalog is kept in the object store.
    keeps_marker: bool

    def look(self) -> AbstractAsyncContextManager[View]: ...

    async def file(self, file_id: uuid.UUID) -> InspectedFile | None: ...

    async def ranges_within(
        self, shard: int, lo: int, hi: int, *, limit: int
    ) -> Sequence[PublishedRange]:
        """The first ranges that touch [lo, hi), in their order."""
        ...

    def waiting_payloads(self) -> AsyncIterator[WaitingPayload]: ...

    async def waiting_payload(self, shard: int, lo: int) -> WaitingPayload | None:
        """The one that begins there, while it waits."""
        ...

    async def quarantine_without_payload(self, *, limit: int) -> Sequence[int]: ...

    async def unknown(self, ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, str]:
        """Those that no data file, intent, waiting or trimmed payload, or condemnation in progress
        names: `deleted` for those condemned and deleted, else `unknown`."""
        ...

    async def last_report(self) -> Mapping[str, Any] | None:
        """Of the validation that ended last."""
        ...

    async def sampled_until(self) -> uuid.UUID | None:
        """Where the last validation that ended left off in its rotation."""
        ...


class Repairs(Protocol):
    """The changes that a repair makes, each one transaction that checks its reason once more and
    records what it did in the audit log. They answer whether anything was changed."""

    async def drop_intent(self, file_id: uuid.UUID, *, by: str) -> bool: ...

    async def drop_tag_without_snapshot(self, name: str, *, by: str) -> bool: ...

    async def replace_statistics(
        self,
        file: DataFile,
        statistics: Mapping[int, ColumnStatistics],
        *,
        by: str,
    ) -> bool: ...

    async def give_up(self, payload: WaitingPayload, *, reason: str, by: str) -> GivenUp | None:
        """Sets the entries of the group that have no end yet aside without their bytes, in a
        publication. None: there are none, or nobody has tried to publish them yet."""
        ...

    async def note(self, action: str, subject: str, detail: Mapping[str, Any], *, by: str) -> None:
        """Records a change of the object store."""
        ...
