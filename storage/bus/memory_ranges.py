"""Ranges and leases of the in-memory bus: claim, renew, return, and how failure isolates.

The fence is the pair (lease id, epoch): a claim writes a new epoch into the range's row, and
whoever holds the old one fails every later check (B4, B6). Expiry alone only permits a reclaim. A
failure halves the range; a lone entry's failure counts towards quarantine only when its worker
showed that it can do other work: a canary under this epoch, or another commit published since the
claim (B8).
"""

from __future__ import annotations

import datetime as dt
import uuid

from lakebus.errors import LeaseLost
from storage.bus.interface import Claim, LeaseRef
from storage.maintenance.interface import Intent
from storage.memory_lake import MemoryLake
from storage.memory_state import RangeRow

_EXPIRED = "the lease expired"


def held(lake: MemoryLake, lease: LeaseRef) -> RangeRow | None:
    """The leased range under this very epoch, expired or not."""

    row = lake.state.ranges.get(lease.lease_id)
    if row is None or not row.leased:
        return None
    same = (row.epoch, row.shard, row.lo, row.hi) == (lease.epoch, lease.shard, lease.lo, lease.hi)
    return row if same else None


def held_or_lost(lake: MemoryLake, lease: LeaseRef) -> RangeRow:
    row = held(lake, lease)
    if row is None:
        raise LeaseLost(
            f"the lease on shard {lease.shard} [{lease.lo}, {lease.hi}) under epoch {lease.epoch} "
            "was ended or reclaimed; drop the work and claim again"
        )
    return row


def claim_range(lake: MemoryLake, owner: uuid.UUID) -> Claim | None:
    """The next range: expired first, then returned, then fresh."""

    row = _expired(lake) or _returned(lake) or _fresh(lake)
    if row is None:
        return None
    state = lake.state
    state.last_epoch += 1
    row.epoch, row.leased, row.owner, row.canary = state.last_epoch, True, owner, False
    row.owner_commits_at_claim = state.owner_commits.get(owner, 0)
    extend(lake, row)
    return Claim(
        lease=LeaseRef(row.lease_id, row.epoch, row.shard, row.lo, row.hi),
        attempt=row.attempt,
        lone_failures=row.lone_failures,
        ttl_s=(row.expires_at - lake.now()).total_seconds(),
        doomed=_is_lone(row) and row.lone_failures >= lake.settings.quarantine_attempts,
        last_error=row.last_error,
        file_ids=_register_intents(lake, row, owner),
        more=_returned(lake) is not None or _has_fresh(lake),
    )


def extend(lake: MemoryLake, row: RangeRow) -> None:
    """A range that failed before gets a short lease, so that it cannot hold its shard (B8)."""

    settings = lake.settings
    ttl_ms = settings.isolation_ttl_ms if row.attempt else settings.lease_ttl_ms
    row.expires_at = lake.now() + dt.timedelta(milliseconds=ttl_ms)


def give_back(lake: MemoryLake, row: RangeRow, *, delay_s: float = 0.0) -> None:
    """Ready again after `delay_s`, not counted as an attempt."""

    row.leased, row.owner = False, None
    row.not_before = lake.now() + dt.timedelta(seconds=delay_s)


def fail(lake: MemoryLake, row: RangeRow, *, error: str, delay_s: float) -> None:
    """A counted failure: halved, or judged alone; both halves come back after `delay_s`."""

    upper = _count_failure(lake, row, error=error)
    for half in (row, upper):
        if half is not None:
            give_back(lake, half, delay_s=delay_s)


def _count_failure(lake: MemoryLake, row: RangeRow, *, error: str) -> RangeRow | None:
    """Attempt + 1. Halves a range of several entries in place and returns the new upper half."""

    showed_other_work = row.canary or (
        row.owner is not None
        and lake.state.owner_commits.get(row.owner, 0) > row.owner_commits_at_claim
    )
    row.attempt += 1
    row.last_error = error
    if _is_lone(row):
        row.lone_failures += int(showed_other_work)
        return None
    middle = (row.lo + row.hi) // 2
    upper = _new_row(lake, row.shard, middle, row.hi)
    upper.attempt, upper.last_error, upper.epoch = row.attempt, error, row.epoch
    row.hi = middle
    return upper


def _expired(lake: MemoryLake) -> RangeRow | None:
    now = lake.now()
    rows = [r for r in lake.state.ranges.values() if r.leased and r.expires_at <= now]
    if not rows:
        return None
    row = min(rows, key=_place)
    upper = _count_failure(lake, row, error=_EXPIRED)
    if upper is not None:
        give_back(lake, upper, delay_s=lake.settings.backoff_ms(row.attempt) / 1000)
    return row


def _returned(lake: MemoryLake) -> RangeRow | None:
    now = lake.now()
    rows = [r for r in lake.state.ranges.values() if not r.leased and r.not_before <= now]
    return min(rows, key=_place, default=None)


def _fresh(lake: MemoryLake) -> RangeRow | None:
    """Takes never-claimed entries; shards take turns so that a busy one does not starve others."""

    state = lake.state
    count = len(state.shards)
    for turn in range(count):
        number = (state.claim_turn + turn) % count
        hi = _fresh_end(lake, number)
        lo = state.shards[number].next_claim
        if hi > lo:
            state.claim_turn = (number + 1) % count
            state.shards[number].next_claim = hi
            return _new_row(lake, number, lo, hi)
    return None


def _has_fresh(lake: MemoryLake) -> bool:
    shards = lake.state.shards
    return any(_fresh_end(lake, n) > shards[n].next_claim for n in range(len(shards)))


def _fresh_end(lake: MemoryLake, number: int) -> int:
    """Where a fresh range ends: within the budgets, at least one entry, never across a gap that a
    restore left."""

    settings, shard = lake.settings, lake.state.shards[number]
    shard.next_claim = shard.gaps.get(shard.next_claim, shard.next_claim)
    hi, size = shard.next_claim, 0
    while (entry := shard.log.get(hi)) is not None and hi - shard.next_claim < (
        settings.claim_entries_max
    ):
        size += entry.size_bytes
        if size > settings.claim_bytes_max and hi > shard.next_claim:
            break
        hi += 1
    return hi


def _new_row(lake: MemoryLake, shard: int, lo: int, hi: int) -> RangeRow:
    state, now = lake.state, lake.now()
    state.last_lease_id += 1
    row = RangeRow(
        lease_id=state.last_lease_id,
        epoch=0,
        shard=shard,
        lo=lo,
        hi=hi,
        leased=False,
        owner=None,
        expires_at=now,
        not_before=now,
    )
    state.ranges[row.lease_id] = row
    return row


def _register_intents(lake: MemoryLake, row: RangeRow, owner: uuid.UUID) -> dict[int, uuid.UUID]:
    """One new file id for each table in the range, before the first byte of a file (C6)."""

    log = lake.state.shards[row.shard].log
    table_ids = {t for position in range(row.lo, row.hi) for t in log[position].table_ids}
    file_ids = {table_id: lake.new_uuid() for table_id in sorted(table_ids)}
    expires_at = lake.now() + dt.timedelta(seconds=lake.settings.intent_ttl_s)
    for table_id, file_id in file_ids.items():
        lake.state.intents[file_id] = Intent(file_id, "data", owner, expires_at, table_id)
    return file_ids


def _is_lone(row: RangeRow) -> bool:
    return row.hi - row.lo == 1


def _place(row: RangeRow) -> tuple[int, int]:
    return row.shard, row.lo
