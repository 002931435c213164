"""What the object store remembers of erasures, so that nothing brings the rows back (E7).

Two kinds of records, written before anything is removed and never changed:

* `erasures/<erasure>.json` says what was to be erased. A catalog of a new line of history that does
  not know it to be done does it again before the table is read.
* `erasures/<erasure>/<file>.json` says which file was left of an old one. The old object is deleted
  although a backup may name it; whoever restores that backup finds here what took its place.

The first holds the condition, and so whatever personal data is in it: that is what has to be kept
to be able to erase again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from lakebus.errors import Corrupt
from lakebus.snapshots import DataFile
from storage.files.objects import ObjectExists, ObjectStore
from storage.files.statistics import statistics_from_json, statistics_to_json
from storage.maintenance.erasing import RECORDS, Replacement


def _text(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True).encode("utf-8", "surrogatepass")


async def write_record(
    store: ObjectStore, erasure_id: uuid.UUID, parameters: Mapping[str, Any]
) -> None:
    """Raises Unavailable. One that is there already is the same."""

    try:
        await store.put_new(f"{RECORDS}{erasure_id}.json", _text(parameters))
    except ObjectExists:
        return


async def read_records(store: ObjectStore) -> list[dict[str, Any]]:
    """Raises Unavailable, Corrupt."""

    keys = [key async for key, _ in store.list(RECORDS) if key.count("/") == 1]
    return [await _read(store, key) for key in sorted(keys)]


async def write_exchange(store: ObjectStore, erasure_id: uuid.UUID, one: Replacement) -> None:
    """Before the exchange. Attempts that died may have written others down for the same file: each
    is right by itself, and the one whose object is there is found. Raises Unavailable."""

    key = f"{RECORDS}{erasure_id}/{one.old}.{'none' if one.file is None else one.file.file_id}.json"
    document = {
        "old": str(one.old),
        "rows": one.rows,
        "file": None if one.file is None else _file_json(one.file),
    }
    try:
        await store.put_new(key, _text(document))
    except ObjectExists:
        return


async def find_exchange(store: ObjectStore, old: DataFile) -> Replacement | None:
    """What took the place of a file whose object is gone: of several the one that is still there.
    None when nobody wrote one down."""

    gone: Replacement | None = None
    keys = [key async for key, _ in store.list(RECORDS) if f"/{old.file_id}." in key]
    for key in sorted(keys):
        said = await _read(store, key)
        rows = int(said["rows"])
        if said["file"] is None:
            gone = Replacement(old.file_id, rows, None)
            continue
        file = _file_of(said["file"], old.table_id)
        if await store.size(file.object_key) is not None:
            return Replacement(old.file_id, rows, file, adopted=True)
        further = await find_exchange(store, file)  # it was exchanged itself, later
        if further is not None:
            left = None if further.file is None else further.file
            return Replacement(old.file_id, rows + further.rows, left, left is not None)
    return gone


async def _read(store: ObjectStore, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(await store.get(key))
    except ValueError as error:
        raise Corrupt(f"the record {key} of an erasure cannot be read") from error
    return found


def _file_json(file: DataFile) -> dict[str, Any]:
    return {
        "file_id": str(file.file_id),
        "schema_version": file.schema_version,
        "object_key": file.object_key,
        "rows": file.rows,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "statistics": statistics_to_json(file.statistics),
        "partition": file.partition,
        "layout": file.layout,
    }


def _file_of(said: Mapping[str, Any], table_id: int) -> DataFile:
    return DataFile(
        file_id=uuid.UUID(said["file_id"]),
        table_id=table_id,
        schema_version=said["schema_version"],
        object_key=said["object_key"],
        rows=said["rows"],
        size_bytes=said["size_bytes"],
        sha256=said["sha256"],
        statistics=statistics_from_json(said["statistics"]),
        partition=said["partition"],
        layout=said["layout"],
    )
