"""The bus: bytes of what waits, bytes of what was set aside, and the marker in the object store."""

from __future__ import annotations

import datetime as dt

from storage.files.objects import ObjectStore
from storage.maintenance.findings import Findings
from storage.maintenance.inspection import Inspection, WaitingPayload
from storage.postgres.rewind_marker import read_marker

_QUARANTINE_MAX = 1_000
#: It is written about a second after a publication; a store that was away for a while is no news.
_MARKER_LATE = dt.timedelta(minutes=10)


async def check_payloads(inspection: Inspection, store: ObjectStore, findings: Findings) -> int:
    """That the bytes of everything not terminal are there; answers how many groups wait."""

    waiting = 0
    async for one in inspection.waiting_payloads():
        waiting += 1
        if await _has_bytes(one, store):
            continue
        # It may have become terminal, and its bytes have been let go, since.
        now = await inspection.waiting_payload(one.shard, one.lo)
        if now is not None and not await _has_bytes(now, store):
            where = "no segment" if now.payload_key is None else f"no object {now.payload_key}"
            findings.add(
                "payload_missing",
                f"shard {now.shard} position {now.lo}",
                f"there is {where} with the bytes of the positions [{now.lo}, {now.hi})",
            )
    for quarantine_id in await inspection.quarantine_without_payload(limit=_QUARANTINE_MAX):
        findings.add("quarantine_payload_missing", f"quarantine {quarantine_id}", "it is empty")
    return waiting


async def _has_bytes(one: WaitingPayload, store: ObjectStore) -> bool:
    if one.has_bytes or one.payload_key is None:
        return one.has_bytes
    return await store.size(one.payload_key) is not None


async def check_marker(inspection: Inspection, store: ObjectStore, findings: Findings) -> None:
    """The marker first, the head after it: a head read later is never behind a true marker."""

    if not inspection.keeps_marker:
        return
    async with inspection.look() as view:
        before = await view.head()
    marker = await read_marker(store, before.lake_id)
    async with inspection.look() as view:
        head = await view.head()
    if marker is None or marker["lake_id"] != str(head.lake_id):
        findings.add("marker_behind", "marker", "the object store holds no marker of this lake")
        return
    count, snapshot_id = marker["publish_count"], marker["snapshot_id"]
    if count > head.publish_count:
        findings.add(
            "marker_ahead",
            "marker",
            f"it tells of {count} publications until snapshot {snapshot_id}, and the catalog has"
            f" {head.publish_count} until {head.snapshot_id}",
        )
    elif snapshot_id < before.snapshot_id and before.now - before.published_at > _MARKER_LATE:
        findings.add(
            "marker_behind",
            "marker",
            f"it tells of snapshot {snapshot_id}, and {before.snapshot_id} was published"
            f" {(before.now - before.published_at).total_seconds():.0f} s ago",
        )
