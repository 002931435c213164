"""The marker: what the object store remembers of the catalog (contract F4).

The marker is one small object, the catalog's state as `lake_state` gives it, under a name that
orders markers by publications and then by the write-ahead log. Objects are never overwritten, so a
newer marker is a new object, and whoever wrote it removes the older ones; until then, and after a
crash in between, readers take the greatest. A line of history begins a million publications after
all that was known of the one before, so its marker is greater than any that a writer of the lost
line can still bring.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from lakebus.clock import new_uuid
from lakebus.errors import Corrupt, Unavailable
from storage.files.objects import ObjectStore

PREFIX = "marker/"
#: How often a marker may vanish under a reader, because a newer one took its place.
_ATTEMPTS = 5

#: What `lake_state` gives.
State = Mapping[str, Any]


async def read_marker(store: ObjectStore, lake_id: uuid.UUID | None) -> State | None:
    """The greatest marker of this lake, or of another one when there is none of it; None on a store
    without any. Raises Unavailable, Corrupt."""

    for attempt in range(_ATTEMPTS):
        keys = [key async for key, _ in store.list(PREFIX)]
        own = [key for key in keys if lake_id is not None and key.startswith(_folder(lake_id))]
        found = max(own or keys, key=_order, default=None)
        if found is None:
            return None
        try:
            return _parse(found, await store.get(found))
        except Corrupt:
            # Gone since it was listed: a newer one is there. An unreadable one stays unreadable.
            if attempt + 1 == _ATTEMPTS or await store.size(found) is not None:
                raise
    raise Unavailable("the marker was replaced again and again while it was read")


async def write_marker(store: ObjectStore, state: State) -> None:
    """Makes `state` the marker, durably, then removes the older ones of the lake."""

    folder = _folder(uuid.UUID(state["lake_id"]))
    place = f"{state['publish_count']:020d}-{state['wal'] or 0:020d}"
    key = f"{folder}{place}-{new_uuid().hex[:12]}.json"
    await store.put_new(key, json.dumps(state, sort_keys=True).encode())
    older = [other async for other, _ in store.list(folder) if _order(other) < _order(key)]
    for other in older:
        await store.delete(other)


def is_newer(state: State, marker: State | None) -> bool:
    """Whether the marker does not tell yet what the catalog would have to lose to be behind it."""

    names = ("history_id", "publish_count", "snapshot_id", "ends")
    return marker is None or any(state[name] != marker[name] for name in names)


def sees_more(witness: State, marker: State) -> bool:
    """Whether `witness`, of the same line, saw something that the marker did not."""

    return witness["snapshot_id"] > marker["snapshot_id"] or any(
        end > known for end, known in zip(witness["ends"], marker["ends"], strict=False)
    )


def _folder(lake_id: uuid.UUID) -> str:
    return f"{PREFIX}{lake_id.hex}/"


def _order(key: str) -> str:
    return key.rpartition("/")[2]


def _parse(key: str, data: bytes) -> State:
    try:
        state = json.loads(data)
        uuid.UUID(state["lake_id"])
        uuid.UUID(state["history_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"the marker {key} in the object store cannot be read") from error
    return dict(state)
