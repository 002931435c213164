"""A claim as one statement: the range, whether there is more, and the bytes of a small range.

A lone row is claimed and read on its way to be visible, so what one answer can bring is not asked
for twice; and a coordinator that is told that nothing else was there need not find out.
"""

from __future__ import annotations

import asyncpg

from storage.bus.interface import Claim, ClaimedSegment, LeaseRef

#: A small range of one group brings its bytes along: so few that they fit into the buffers of the
#: way, and a paused client cannot hold up the end of the transaction (B11).
_BROUGHT_BYTES_MAX = 32 * 1024
# What is beside the function's call sees the state at its beginning: it may miss an entry that came
# meanwhile, whose hint comes meanwhile, too.
CLAIM = f"""
SELECT c.*, g.lo AS group_lo, g.entry_indexes, g.entry_bytes, g.payload,
       EXISTS (SELECT FROM bus_claim k JOIN bus_shard s USING (shard)
                WHERE s.next_append > CASE k.shard WHEN c.shard THEN c.hi ELSE k.next_claim END)
       OR EXISTS (SELECT FROM bus_lease b WHERE b.state = 'ready') AS more
  FROM claim_range($1, $2, $3, $4, $5, $6, $7, $8, $9) c
  LEFT JOIN LATERAL (
       SELECT l.lo, l.entry_indexes, l.entry_bytes, s.payload
         FROM (SELECT f.lo, f.hi, f.segment_id, f.entry_indexes, f.entry_bytes FROM bus_log f
                WHERE f.shard = c.shard AND f.lo <= c.lo ORDER BY f.lo DESC LIMIT 1) l
         JOIN LATERAL (SELECT b.payload FROM bus_segment b
                        WHERE b.segment_id = l.segment_id LIMIT 1) s
              ON octet_length(s.payload) <= {_BROUGHT_BYTES_MAX}
        WHERE l.hi >= c.hi) g ON true"""


def claim_of(row: asyncpg.Record | None) -> Claim | None:
    """None when there was nothing to claim."""

    if row is None or row["lease_id"] is None:
        return None
    lease = LeaseRef(row["lease_id"], row["epoch"], row["shard"], row["lo"], row["hi"])
    return Claim(
        lease=lease,
        attempt=row["attempt"],
        lone_failures=row["lone_failures"],
        ttl_s=row["ttl_s"],
        doomed=row["doomed"],
        last_error=row["last_error"],
        file_ids=dict(zip(row["table_ids"], row["file_ids"], strict=True)),
        more=row["more"],
        brought=_brought(lease, row),
    )


def _brought(lease: LeaseRef, row: asyncpg.Record) -> ClaimedSegment | None:
    if row["payload"] is None:
        return None
    first, last = lease.lo - row["group_lo"], lease.hi - row["group_lo"]
    return ClaimedSegment(
        lo=lease.lo,
        hi=lease.hi,
        payload=row["payload"],
        entry_indexes=tuple(row["entry_indexes"][first:last]),
        entry_bytes=tuple(row["entry_bytes"][first:last]),
    )
