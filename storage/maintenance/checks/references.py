"""References: between the rows of the catalog, and from the catalog to the object store."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass

from storage.files.objects import ObjectStore
from storage.maintenance.findings import Findings
from storage.maintenance.inspection import InspectedFile, InspectedHead, Inspection, View

_PAGE = 1_000
_STORE_CALLS = 16
_SHARED_MAX = 1_000
#: Whoever held it may just be renewing it.
_PIN_GRACE = dt.timedelta(minutes=1)
_GIVEN_UP = ("deleting", "deleted")


@dataclass(frozen=True, slots=True)
class Needs:
    """Which files a snapshot that can be read needs: those from the oldest on, and the tagged."""

    oldest_snapshot_id: int
    tagged: tuple[int, ...]

    def file(self, found: InspectedFile) -> bool:
        first, last = found.file.first_snapshot, found.file.last_snapshot
        if last is None or last > self.oldest_snapshot_id:
            return True
        return any(first <= snapshot_id < last for snapshot_id in self.tagged)


async def needs_of(view: View) -> Needs:
    head = await view.head()
    tagged = tuple(tag.snapshot_id for tag in await view.tags())
    return Needs(head.oldest_snapshot_id, tagged)


async def check_references(
    view: View, head: InspectedHead, findings: Findings, *, table_id: int | None
) -> int:
    """What the catalog's rows say about each other; answers how many files there are."""

    for tag in await view.tags():
        if not tag.readable:
            findings.add(
                "tag_without_snapshot",
                f"tag {tag.name}",
                f"it names snapshot {tag.snapshot_id}, which is not there or has expired",
            )
    for pin_id, kind in await view.expired_pins(before=head.now - _PIN_GRACE):
        findings.add("pin_expired", f"pin {pin_id}", f"a pin of the kind {kind}")
    for key, files in await view.shared_objects(limit=_SHARED_MAX):
        for file_id in files[1:]:
            findings.add(
                "published_twice", f"file {file_id}", f"its object {key} is also that of {files[0]}"
            )
    needs = await needs_of(view)
    files_seen = 0
    async for found in view.files():
        if table_id is None or found.file.table_id == table_id:
            files_seen += 1
            _judge(found, head, needs, findings)
    return files_seen


def _judge(found: InspectedFile, head: InspectedHead, needs: Needs, findings: Findings) -> None:
    file = found.file
    reason = None
    if not found.has_table:
        reason = f"there is no table {file.table_id}"
    elif not found.has_schema:
        reason = f"table {file.table_id} has no schema version {file.schema_version}"
    elif found.table_last_snapshot is not None and file.last_snapshot is None:
        reason = f"it is live, and its table was dropped with {found.table_last_snapshot}"
    elif file.first_snapshot > head.snapshot_id or (file.last_snapshot or 0) > head.snapshot_id:
        reason = f"it belongs to snapshots after the newest one, {head.snapshot_id}"
    elif found.condemned in _GIVEN_UP and needs.file(found):
        reason = f"it is {found.condemned}, and a snapshot that can be read needs it"
    if reason is not None:
        findings.add("dangling_reference", found.subject(), reason)
    if found.has_intent:
        findings.add("leftover_intent", found.subject(), "it is published")


async def check_objects(
    inspection: Inspection,
    store: ObjectStore,
    findings: Findings,
    *,
    table_id: int | None,
) -> int:
    """That every object a snapshot needs is there in its size; answers how many were asked for."""

    asked = 0
    after = uuid.UUID(int=0)
    while True:
        async with inspection.look() as view:
            needs = await needs_of(view)
            page = await view.sample(after, limit=_PAGE)
        if not page:
            return asked
        after = page[-1].file.file_id
        wanted = [
            found
            for found in page
            if needs.file(found) and (table_id is None or found.file.table_id == table_id)
        ]
        asked += len(wanted)
        await _all(_sizes(inspection, store, findings, part) for part in _parts(wanted))


async def _all(calls: Iterable[Coroutine[None, None, None]]) -> None:
    """Runs them at once; the first error ends the others, and is raised as it is."""

    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _parts(files: Sequence[InspectedFile]) -> list[Sequence[InspectedFile]]:
    step = max(1, -(-len(files) // _STORE_CALLS))
    return [files[start : start + step] for start in range(0, len(files), step)]


async def _sizes(
    inspection: Inspection,
    store: ObjectStore,
    findings: Findings,
    files: Sequence[InspectedFile],
) -> None:
    for found in files:
        file = found.file
        size = await store.size(file.object_key)
        if size == file.size_bytes or not await still_needed(inspection, found):
            continue
        if size is None:
            findings.add("missing_object", found.subject(), f"there is no object {file.object_key}")
        else:
            findings.add(
                "size_differs",
                found.subject(),
                f"{file.object_key} has {size} bytes, and {file.size_bytes} were published",
            )


async def still_needed(inspection: Inspection, found: InspectedFile) -> bool:
    """Looks once more: collection takes the reference away before it deletes an object."""

    now = await inspection.file(found.file.file_id)
    return now is not None and now.condemned not in _GIVEN_UP
