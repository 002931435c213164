"""Which shard an entry belongs to: a pure function, the same in every backend and every process.

The result is stored in positions and tokens, so the function can never change within a line of
history; it hashes with BLAKE2b (RFC 7693), not with anything seeded per process.
"""

from __future__ import annotations

import hashlib

from storage.bus.interface import NewEntry


def ordering_of(entry: NewEntry) -> str:
    """The ordering key if the caller gave one, else the set of tables; the prefixes keep a key
    from ever meaning a table set."""

    if entry.ordering_key is not None:
        return f"k:{entry.ordering_key}"
    table_ids = {part.table_id for part in entry.parts} | {r.table_id for r in entry.rejects}
    return "t:" + ",".join(str(table_id) for table_id in sorted(table_ids))


def shard_of(principal_id: int, ordering: str, *, shards: int) -> int:
    """Stable hash of (principal, ordering) → 0..shards-1 (contract A7)."""

    digest = hashlib.blake2b(f"{principal_id}\x00{ordering}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % shards
