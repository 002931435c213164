"""Objects that nobody knows (contract E4: a thing to report, never a reason to delete)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from storage.files.objects import ObjectStore
from storage.maintenance.findings import Findings, Severity
from storage.maintenance.inspection import Inspection

#: Folders in which every object is named by a file id of the catalog or of the bus.
FOLDERS = ("tables/", "bus/", "canary/")
_PAGE = 1_000


async def check_strays(inspection: Inspection, store: ObjectStore, findings: Findings) -> int:
    """Lists the store; answers how many objects there are."""

    seen = 0
    page: list[str] = []
    for folder in FOLDERS:
        async for key, _ in store.list(folder):
            seen += 1
            page.append(key)
            if len(page) >= _PAGE:
                await _judge(inspection, store, findings, page)
                page = []
    await _judge(inspection, store, findings, page)
    return seen


async def _judge(
    inspection: Inspection, store: ObjectStore, findings: Findings, keys: Sequence[str]
) -> None:
    strange = [key for key in keys if file_id_of(key) is None]
    suspects = await _unknown(inspection, keys)
    # An object is deleted before it is noted as deleted, so one that goes just now is still here.
    suspects = {key: why for key, why in suspects.items() if await store.size(key) is not None}
    again = await _unknown(inspection, list(suspects))
    for key, why in again.items():
        if why == "deleted":
            findings.add("stray_object", f"object {key}", "it was deleted, and is there again")
        else:
            _note_unknown(findings, key)
    for key in strange:
        _note_unknown(findings, key)


def _note_unknown(findings: Findings, key: str) -> None:
    findings.add(
        "stray_object",
        f"object {key}",
        "the catalog knows nothing of it",
        severity=Severity.INFO,
    )


async def _unknown(inspection: Inspection, keys: Sequence[str]) -> dict[str, str]:
    by_id = {found: key for key in keys if (found := file_id_of(key)) is not None}
    if not by_id:
        return {}
    unknown = await inspection.unknown(list(by_id))
    return {by_id[file_id]: why for file_id, why in unknown.items()}


def file_id_of(key: str) -> uuid.UUID | None:
    name = key.rpartition("/")[2].partition(".")[0]
    try:
        return uuid.UUID(name)
    except ValueError:
        return None
