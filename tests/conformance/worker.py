"""A commit coordinator reduced to what the contract needs: claim, stage, publish.

Files are stand-ins: what a Parquet file would hold is kept in `StagedFiles` under its file id, so
that a test can ask a snapshot for its rows through nothing but the catalog's manifest.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lakebus.clock import new_uuid
from lakebus.snapshots import DataFile
from storage.bus.interface import Claim, ClaimedSegment, IngestBus
from storage.catalog.interface import Catalog, Commit, Published, QuarantinedEntry
from storage.rows.segment import EntryPart, decode_segment, single_entry_segment

#: Where a row came from: (shard, position).
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ReadEntry:
    """One claimed entry, decoded. `ids` are the values of the first column, in row order."""

    position: int
    size_bytes: int
    parts: tuple[EntryPart, ...]

    @property
    def ids(self) -> list[int]:
        return [value for part in self.parts for value in part.batch.column(0).to_pylist()]


@dataclass(slots=True)
class StagedFiles:
    """The object store's stand-in: rows of every (shard, position) by file id."""

    contents: dict[uuid.UUID, dict[Place, int]] = field(default_factory=dict)

    def write(self, file_id: uuid.UUID, rows: dict[Place, int]) -> None:
        """A name is written once; a second writer of other rows would change a snapshot (C6)."""

        assert self.contents.setdefault(file_id, rows) == rows, "a file was written twice"

    async def rows_at(
        self, catalog: Catalog, snapshot_id: int, *, table_id: int | None = None
    ) -> dict[Place, int]:
        """Rows by entry in a snapshot. An entry in two files of one table is a double publish."""

        delta = await catalog.manifest_delta(after=0, until=snapshot_id)
        found: dict[Place, int] = {}
        seen: set[tuple[int, Place]] = set()
        for file in delta.files:
            over = file.last_snapshot is not None and file.last_snapshot <= snapshot_id
            if over or (table_id is not None and file.table_id != table_id):
                continue
            for place, rows in self.contents[file.file_id].items():
                assert (file.table_id, place) not in seen, f"{place} was published twice"
                seen.add((file.table_id, place))
                found[place] = found.get(place, 0) + rows
        return found


class Worker:
    """One owner. `stage` makes the files of a whole claim; nothing is visible before `publish`."""

    def __init__(
        self,
        *,
        bus: IngestBus,
        catalog: Catalog,
        files: StagedFiles,
        owner: uuid.UUID | None = None,
    ) -> None:
        self.bus = bus
        self.catalog = catalog
        self.files = files
        self.owner = owner or new_uuid()

    async def claim(self) -> Claim:
        claim = await self.bus.claim(self.owner)
        assert claim is not None, "nothing was claimable"
        return claim

    async def read(self, claim: Claim) -> list[ReadEntry]:
        return decode_entries(await self.bus.read(claim))

    async def stage(
        self, claim: Claim, *, quarantine: Collection[int] = (), by_crash: bool = False
    ) -> Commit:
        """The commit of a claim, with the entries at the positions of `quarantine` set aside."""

        entries = await self.read(claim)
        bad = [
            QuarantinedEntry(
                position=entry.position,
                reason="poison",
                attempts=claim.attempt + 1,
                payload=single_entry_segment(entry.parts),
                by_crash=by_crash,
            )
            for entry in entries
            if entry.position in quarantine
        ]
        good = [entry for entry in entries if entry.position not in quarantine]
        return Commit(
            commit_id=new_uuid(),
            lease=claim.lease,
            files=self._write(claim, good),
            range_bytes=sum(entry.size_bytes for entry in entries),
            owner=self.owner,
            quarantined=tuple(bad),
        )

    async def publish(self, *commits: Commit) -> Published:
        return await self.catalog.publish(new_uuid(), commits)

    async def publish_one(self) -> Published:
        return await self.publish(await self.stage(await self.claim()))

    def _write(self, claim: Claim, entries: Sequence[ReadEntry]) -> tuple[DataFile, ...]:
        by_table: dict[int, dict[Place, int]] = {}
        versions: dict[int, int] = {}
        for entry in entries:
            for part in entry.parts:
                rows = by_table.setdefault(part.table_id, {})
                place = (claim.lease.shard, entry.position)
                rows[place] = rows.get(place, 0) + part.batch.num_rows
                versions[part.table_id] = part.schema_version
        files = []
        for table_id, contents in by_table.items():
            file_id = claim.file_ids[table_id]
            self.files.write(file_id, contents)
            files.append(fake_file(file_id, table_id, versions[table_id], sum(contents.values())))
        return tuple(files)


def fake_file(file_id: uuid.UUID, table_id: int, schema_version: int, rows: int) -> DataFile:
    return DataFile(
        file_id=file_id,
        table_id=table_id,
        schema_version=schema_version,
        object_key=f"data/{file_id}.parquet",
        rows=rows,
        size_bytes=100 * rows,
        sha256=hashlib.sha256(file_id.bytes).hexdigest(),
        statistics={},
    )


def decode_entries(segments: Sequence[ClaimedSegment]) -> list[ReadEntry]:
    """The entries of claimed segments, in order of position."""

    entries = []
    for segment in segments:
        decoded = decode_segment(segment.payload)
        assert len(segment.entry_indexes) == len(segment.entry_bytes) == segment.hi - segment.lo
        for n, index in enumerate(segment.entry_indexes):
            parts = tuple(decoded.parts(index))
            entries.append(ReadEntry(segment.lo + n, segment.entry_bytes[n], parts))
    return entries
