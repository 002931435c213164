"""Tables that compaction leaves alone for a while, because a delete has lost to it again and again.

Both rewrite files, and whoever publishes first wins; a delete of a large table could lose for ever.
After some losses it says so by a pin: everybody who plans rewrites can see it, it protects the
files that the delete reads, and it ends by itself when the delete dies. Nothing depends on it but
speed: who does not look loses a race, or wins one.
"""

from __future__ import annotations

from typing import Final

from storage.maintenance.interface import Upkeep

#: The kind of such a pin; its note is the table's id.
PRIORITY: Final = "delete"


async def tables_taken(upkeep: Upkeep) -> frozenset[int]:
    """The ids of tables that a delete has asked to leave alone. Raises Unavailable."""

    pins = await upkeep.pins()
    return frozenset(int(pin.note) for pin in pins if pin.kind == PRIORITY and pin.note.isdigit())
