"""What an erasure asks of the control plane (contract E7), beside `interface.Upkeep`.

What is authoritative: the database. Files are exchanged within their own life, under the head row
and the lock of collection, so an exchange is one transaction that comes before or after every
publish, pin and tag. The note of what was taken (`Erased`) holds no value of any row.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from lakebus.snapshots import DataFile
from storage.catalog.interface import Erased, covering
from storage.maintenance.interface import CondemnedFile

#: Where the object store keeps what was erased, so that a restore cannot bring it back.
RECORDS: Final = "erasures/"


@dataclass(frozen=True, slots=True)
class Replacement:
    """`old` loses `rows`; `file` is what is left of it, None for nothing. `adopted`: it was made in
    a line of history that was lost, so no write intent protects it."""

    old: uuid.UUID
    rows: int
    file: DataFile | None
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class Stray:
    """A name under which an object of the table may lie that is no data file: a write intent that
    nobody has used, or a condemned file."""

    file_id: uuid.UUID
    object_key: str


class Erasing(Protocol):
    """All calls raise Unavailable when nothing happened, OutcomeUnknown when it may have; each may
    be repeated."""

    async def begin(self, erasure_id: uuid.UUID, table_id: int) -> None: ...

    async def files(self, table_id: int) -> Sequence[DataFile]:
        """Every data file of the table that is there, needed or not, with its life."""
        ...

    async def strays(self, table_id: int) -> Sequence[Stray]: ...

    async def replace(
        self, erasure_id: uuid.UUID, table_id: int, replacements: Sequence[Replacement]
    ) -> Sequence[uuid.UUID]:
        """ONE transaction. Answers the old files whose place was taken. The others were exchanged
        or collected by somebody else, or the intent of their file is gone: look again."""
        ...

    async def erase_strays(self, table_id: int, file_ids: Sequence[uuid.UUID]) -> None:
        """Their objects may be deleted: nobody can publish them from now on."""
        ...

    async def doomed(self, table_id: int) -> Sequence[CondemnedFile]:
        """Objects of erasures of the table that are not deleted yet."""
        ...

    async def finish(
        self,
        erasure_id: uuid.UUID,
        table_id: int,
        publication_id: uuid.UUID,
        summary: Mapping[str, Any],
    ) -> int:
        """Publishes the snapshot that tells of it, once; its id."""
        ...

    async def erased(self, erasure_id: uuid.UUID | None = None) -> Sequence[Erased]:
        """What one erasure, or all of them, took from which snapshots."""
        ...


def by_snapshots(marks: Sequence[Erased]) -> list[dict[str, int]]:
    """How many rows each run of snapshots has lost: `first_snapshot_id` to `last_snapshot_id`
    (inclusive), `rows`, and `files` that they were in."""

    edges = sorted({edge for m in marks for edge in (m.first_snapshot, m.last_snapshot)})
    runs: list[dict[str, int]] = []
    for start, end in itertools.pairwise(edges):
        inside = covering(marks, start)
        if not inside:
            continue
        rows, files = sum(m.rows for m in inside), sum(m.exchanged for m in inside)
        last = runs[-1] if runs else None
        if last and (last["last_snapshot_id"], last["rows"], last["files"]) == (
            start - 1,
            rows,
            files,
        ):
            last["last_snapshot_id"] = end - 1
            continue
        runs.append(
            {
                "first_snapshot_id": start,
                "last_snapshot_id": end - 1,
                "rows": rows,
                "files": files,
            }
        )
    return runs
