"""The publish transaction of the in-memory catalog.

Judge first, change after: every commit of a publication is judged on the state as it is plus what
its accepted neighbours will consume; only then is anything written, all of it in one step of the
event loop. So snapshot, files, ack and watermark appear together or not at all (C1), a loser is
reported while its neighbours are published (A9), and two commits of one lease or one file cannot
both win (C2, C6).

A loser keeps what it had: after INTENT_LOST or QUARANTINE_STOPPED the range is still leased to its
owner, who gives it back with the delay it thinks right.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Sequence

from storage.bus.interface import BatchState, QuarantineItem
from storage.bus.memory_ranges import held
from storage.catalog.interface import (
    Commit,
    CommitOutcome,
    Published,
    PublishedRange,
    QuarantinedEntry,
)
from storage.memory_lake import MemoryLake, advance_watermark
from storage.memory_state import FileRow, LogEntry, QuarantineRow


def publish(lake: MemoryLake, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
    """Publishes what is still entitled to it. A publication that happened answers as before (C5);
    one that changed nothing leaves no record."""

    earlier = lake.state.publications.get(publication_id)
    if earlier is not None:
        return earlier
    outcomes, accepted = _judge_all(lake, commits)
    if not accepted:
        return Published(None, None, outcomes, lake.watermark())
    at = lake.next_publish_time()
    snapshot_id = lake.state.head_id + 1
    for commit in accepted:
        _apply(lake, commit, snapshot_id, at)
    snapshot = lake.next_snapshot("append", _summary(accepted), at=at)
    published = Published(snapshot.snapshot_id, at, outcomes, snapshot.watermark)
    lake.state.publications[publication_id] = published
    return published


def _judge_all(
    lake: MemoryLake, commits: Sequence[Commit]
) -> tuple[dict[uuid.UUID, CommitOutcome], list[Commit]]:
    outcomes: dict[uuid.UUID, CommitOutcome] = {}
    accepted: list[Commit] = []
    for commit in commits:
        outcome = _judge(lake, commit, accepted)
        outcomes[commit.commit_id] = outcome
        if outcome is CommitOutcome.PUBLISHED:
            accepted.append(commit)
    return outcomes, accepted


def _judge(lake: MemoryLake, commit: Commit, accepted: Sequence[Commit]) -> CommitOutcome:
    taken = {other.lease.lease_id for other in accepted}
    if held(lake, commit.lease) is None or commit.lease.lease_id in taken:
        return CommitOutcome.LEASE_LOST
    consumed = {file.file_id for other in accepted for file in other.files}
    wanted = [file.file_id for file in commit.files]
    there = all(f in lake.state.intents and f not in consumed for f in wanted)
    if not there or len(set(wanted)) != len(wanted):
        return CommitOutcome.INTENT_LOST
    crashed = _by_crash(commit)
    if crashed:
        before = _crash_quarantines(lake) + sum(_by_crash(other) for other in accepted)
        if before + crashed > lake.settings.quarantine_rate_max:
            return CommitOutcome.QUARANTINE_STOPPED
    return CommitOutcome.PUBLISHED


def _by_crash(commit: Commit) -> int:
    return sum(entry.by_crash for entry in commit.quarantined)


def _crash_quarantines(lake: MemoryLake) -> int:
    since = lake.now() - dt.timedelta(seconds=lake.settings.quarantine_window_s)
    rows = lake.state.quarantine.values()
    return sum(row.by_crash and row.item.created_at > since for row in rows)


def _apply(lake: MemoryLake, commit: Commit, snapshot_id: int, at: dt.datetime) -> None:
    state, lease = lake.state, commit.lease
    for file in commit.files:
        del state.intents[file.file_id]
        named = dataclasses.replace(file, first_snapshot=snapshot_id, last_snapshot=None)
        state.files[file.file_id] = FileRow(named, snapshot_id)
    shard = state.shards[lease.shard]
    verdicts = {entry.position: entry for entry in commit.quarantined}
    for position in range(lease.lo, lease.hi):
        entry = shard.log[position]
        _end(lake, entry, verdicts.get(position), snapshot_id, at)
    shard.terminal_bytes += commit.range_bytes
    shard.done[lease.lo] = lease.hi
    state.published_ranges.append(PublishedRange(lease.shard, lease.lo, lease.hi, snapshot_id))
    advance_watermark(shard)
    del state.ranges[lease.lease_id]
    state.owner_commits[commit.owner] = state.owner_commits.get(commit.owner, 0) + 1


def _end(
    lake: MemoryLake,
    entry: LogEntry,
    verdict: QuarantinedEntry | None,
    snapshot_id: int,
    at: dt.datetime,
) -> None:
    """The one place where an entry becomes terminal."""

    entry.terminal_at = at
    lake.state.segments[entry.segment_id].live -= 1
    if verdict is None:
        entry.state, entry.snapshot_id = BatchState.PUBLISHED, snapshot_id
    else:
        entry.state, entry.reason = BatchState.QUARANTINED, verdict.reason
        _quarantine(lake, entry, verdict, at)


def _quarantine(
    lake: MemoryLake, entry: LogEntry, verdict: QuarantinedEntry, at: dt.datetime
) -> None:
    state = lake.state
    state.last_quarantine_id += 1
    item = QuarantineItem(
        quarantine_id=state.last_quarantine_id,
        kind="entry",
        batch_id=entry.batch_id,
        shard=entry.shard,
        position=entry.position,
        principal_id=entry.principal_id,
        table_ids=entry.table_ids,
        rows=entry.rows,
        reason=verdict.reason,
        attempts=verdict.attempts,
        created_at=at,
        successor_batch_id=None,
        payload=verdict.payload,
        target=entry.target,
    )
    state.quarantine[item.quarantine_id] = QuarantineRow(item, verdict.by_crash)


def _summary(accepted: Sequence[Commit]) -> dict[str, object]:
    tables: dict[str, dict[str, int]] = {}
    for file in (file for commit in accepted for file in commit.files):
        counts = tables.setdefault(
            str(file.table_id), {"files_added": 0, "rows_added": 0, "bytes_added": 0}
        )
        counts["files_added"] += 1
        counts["rows_added"] += file.rows
        counts["bytes_added"] += file.size_bytes
    return {"tables": tables}
