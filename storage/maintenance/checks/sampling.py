"""Reading the contents of data files: all of them, or a sample that turns through the lake.

The sample goes on in order of file id where the last validation left off (the first begins at a
place given by its job id), so every file is read sooner or later, however few a run may read.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from lakebus.clock import Clock
from lakebus.errors import Corrupt
from lakebus.schemas import TableSchema
from storage.catalog.interface import Catalog
from storage.files.objects import ObjectStore
from storage.maintenance.checks.contents import Contents, positions_outside, read_contents
from storage.maintenance.checks.places import PlaceTable, Twice, unpublished_intervals
from storage.maintenance.checks.references import needs_of, still_needed
from storage.maintenance.findings import Findings
from storage.maintenance.inspection import InspectedFile, Inspection

_PAGE = 200
_RANGES_PAGE = 20_000
_DOWNLOAD_BYTES = 8 * 1024 * 1024
_SCHEMAS_MAX = 1_000
_FIRST = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True)
class SampleBudget:
    """What one run may read. None: no bound."""

    files: int | None = None
    size_bytes: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Sample:
    """What was read. `complete`: every file that a snapshot needs."""

    files: int = 0
    size_bytes: int = 0
    rows: int = 0
    complete: bool = False
    next: uuid.UUID | None = None
    stopped_by: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "bytes": self.size_bytes,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "complete": self.complete,
            "next": None if self.next is None else str(self.next),
            "stopped_by": self.stopped_by,
        }


@dataclass(slots=True)
class Sampler:
    """Reads files one after the other and judges them. `places` is closed by its owner."""

    inspection: Inspection
    catalog: Catalog
    store: ObjectStore
    clock: Clock
    temp_dir: Path
    places: PlaceTable
    findings: Findings
    _schemas: dict[tuple[int, int], TableSchema | None] = field(default_factory=dict)

    async def run(
        self, start: uuid.UUID, budget: SampleBudget, *, table_id: int | None
    ) -> AsyncIterator[Sample]:
        """Answers the sample as it stands after each file, and at the end."""

        began_s = self.clock.monotonic_s()
        sample = Sample(next=start)
        async for found in self._rotation(start):
            if table_id is not None and found.file.table_id != table_id:
                continue
            sample.seconds = self.clock.monotonic_s() - began_s
            sample.stopped_by = _over(sample, found, budget)
            if sample.stopped_by is not None:
                break
            if await self._judge(found):
                sample.files += 1
                sample.size_bytes += found.file.size_bytes
                sample.rows += found.file.rows
            sample.next = found.file.file_id
            yield sample
        else:
            sample.complete = True
        await self._report_twice()
        sample.seconds = self.clock.monotonic_s() - began_s
        yield sample

    async def _rotation(self, start: uuid.UUID) -> AsyncIterator[InspectedFile]:
        """Every needed file once: from after `start` to the end, then up to `start`."""

        after, turned = start, False
        while True:
            async with self.inspection.look() as view:
                needs = await needs_of(view)
                page = await view.sample(after, limit=_PAGE)
            for found in page:
                if turned and found.file.file_id > start:
                    return
                if needs.file(found):
                    yield found
            if page:
                after = page[-1].file.file_id
            elif turned or start == _FIRST:
                return
            else:
                after, turned = _FIRST, True

    async def _judge(self, found: InspectedFile) -> bool:
        """False for a file that could not be read, because it has gone or another check told."""

        schema = await self._schema(found)
        path = await self._fetch(found)
        if schema is None or path is None:
            return False
        file = found.file
        live = file.last_snapshot is None
        take = (lambda rows: self.places.add(file, rows)) if live else None
        try:
            if path.stat().st_size != file.size_bytes:
                return False  # told by the check of objects
            contents = await asyncio.to_thread(read_contents, file, schema, path, take_places=take)
        except FileNotFoundError:
            return False
        finally:
            if self.store.local_path(file.object_key) is None:
                path.unlink(missing_ok=True)
        await self._judge_places(found, contents)
        if contents.findings and await still_needed(self.inspection, found):
            for code, detail in contents.findings:
                self.findings.add(code, found.subject(), detail)
        return True

    async def _schema(self, found: InspectedFile) -> TableSchema | None:
        key = (found.file.table_id, found.file.schema_version)
        if key not in self._schemas:
            if len(self._schemas) >= _SCHEMAS_MAX:
                self._schemas.clear()
            self._schemas[key] = await self.catalog.schema_version(*key)
        return self._schemas[key]

    async def _fetch(self, found: InspectedFile) -> Path | None:
        """The object as a file on this machine; None when it has gone, or is shorter than told."""

        file = found.file
        local = self.store.local_path(file.object_key)
        if local is not None:
            return local if await asyncio.to_thread(local.exists) else None
        path = self.temp_dir / f"{file.file_id}.parquet"
        size = await self.store.size(file.object_key)
        if size is None:
            return None
        with path.open("wb") as copy:
            for start in range(0, size, _DOWNLOAD_BYTES):
                length = min(_DOWNLOAD_BYTES, size - start)
                try:
                    data = await self.store.get_range(file.object_key, start, length)
                except Corrupt:
                    return None  # collected just now, or told by the check of objects
                await asyncio.to_thread(copy.write, data)
        return path

    async def _judge_places(self, found: InspectedFile, contents: Contents) -> None:
        for shard in sorted(contents.positions):
            bounds = pc.min_max(contents.positions[shard])
            lo, hi = bounds["min"].as_py(), bounds["max"].as_py() + 1
            intervals = await self._unpublished(shard, lo, hi, found.file.first_snapshot)
            outside = positions_outside(contents.positions, shard, intervals)
            if outside:
                contents.findings.append(
                    (
                        "places_differ",
                        f"{outside} of its positions on shard {shard} were not published at"
                        f" snapshot {found.file.first_snapshot}, some of them in"
                        f" [{intervals[0][0]}, {intervals[0][1]})",
                    )
                )

    async def _unpublished(
        self, shard: int, lo: int, hi: int, snapshot_id: int
    ) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while lo < hi:
            page = await self.inspection.ranges_within(shard, lo, hi, limit=_RANGES_PAGE)
            end = hi if len(page) < _RANGES_PAGE else min(hi, page[-1].hi)
            found += unpublished_intervals(page, lo=lo, hi=end, snapshot_id=snapshot_id)
            lo = end
        return found

    async def _report_twice(self) -> None:
        for twice in await asyncio.to_thread(self.places.twice):
            pair = await self._at_one_time(twice)
            if pair is not None:
                self.findings.add(
                    "published_twice",
                    f"file {pair[1]}",
                    f"{twice.rows} of its rows are also in file {pair[0]}, one of them at"
                    f" position {twice.position} of shard {twice.shard}",
                )

    async def _at_one_time(self, twice: Twice) -> tuple[uuid.UUID, uuid.UUID] | None:
        """Two of the files that some snapshot has both. Files read at different moments may be the
        inputs and the outputs of one swap; what the catalog says of them now tells."""

        seen: list[InspectedFile] = []
        for file_id in twice.files:
            found = await self.inspection.file(file_id)
            if found is None:
                continue
            for other in seen:
                if _meet(other, found):
                    return other.file.file_id, file_id
            seen.append(found)
        return None


def _over(sample: Sample, found: InspectedFile, budget: SampleBudget) -> str | None:
    if budget.files is not None and sample.files >= budget.files:
        return "files"
    if budget.seconds is not None and sample.seconds >= budget.seconds:
        return "seconds"
    wanted = sample.size_bytes + found.file.size_bytes
    if budget.size_bytes is not None and sample.files and wanted > budget.size_bytes:
        return "bytes"
    return None


def _meet(one: InspectedFile, other: InspectedFile) -> bool:
    first = max(one.file.first_snapshot, other.file.first_snapshot)
    ends = [f.file.last_snapshot for f in (one, other) if f.file.last_snapshot is not None]
    return all(first < end for end in ends)


def first_start(job_id: uuid.UUID) -> uuid.UUID:
    """Where the very first sample of a lake begins."""

    return uuid.UUID(bytes=hashlib.sha256(job_id.bytes).digest()[:16])
