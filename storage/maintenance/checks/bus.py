"""The bus: bytes of what waits, bytes of what was set aside, and the marker in the object store."""

from __future__ import annotations

import datetime as dt

from lakebus.errors import Corrupt
from storage.files.objects import ObjectStore
from storage.maintenance.findings import Findings
from storage.maintenance.inspection import Inspection, WaitingPayload
from storage.postgres.rewind_marker import read_marker
from storage.rows.segment import decode_segment

_QUARANTINE_MAX = 1_000
#: It is written about a second after a publication; a store that was away for a while is no news.
_MARKER_LATE = dt.timedelta(minutes=10)


async def check_payloads(
    inspection: Inspection, store: ObjectStore, findings: Findings, *, contents: bool = False
) -> int:
    """That the bytes of everything not terminal are there; answers how many groups wait.

    :param contents: read large payloads, too, and not only look whether they are there.
    """

    waiting = 0
    async for one in inspection.waiting_payloads():
        waiting += 1
        if await payload_fault(one, store, contents=contents) is None:
            continue
        # It may have become terminal, and its bytes have been let go, since.
        now = await inspection.waiting_payload(one.shard, one.lo)
        fault = None if now is None else await payload_fault(now, store, contents=contents)
        if now is not None and fault is not None:
            findings.add(
                "payload_missing",
                f"entries {now.shard}-{now.lo}",
                f"{fault}; the bytes of the positions [{now.lo}, {now.hi}) of shard {now.shard}"
                " were there",
            )
    for quarantine_id in await inspection.quarantine_without_payload(limit=_QUARANTINE_MAX):
        findings.add("quarantine_payload_missing", f"quarantine {quarantine_id}", "it is empty")
    return waiting


async def payload_fault(one: WaitingPayload, store: ObjectStore, *, contents: bool) -> str | None:
    """Why the bytes cannot be had; None when they can."""

    if one.has_bytes:
        return None
    if one.payload_key is None:
        return "there is no segment"
    if await store.size(one.payload_key) is None:
        return f"there is no object {one.payload_key}"
    if contents:
        try:
            decode_segment(await store.get(one.payload_key))
        except Corrupt as fault:
            return f"the object {one.payload_key} cannot be read: {fault}"
    return None


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
