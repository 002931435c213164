"""Mutations of the facts of the end state. See `forged`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.history.anomalies import Kind
from tests.history.end_state import FileFact, Range, SnapshotFact
from tests.history.forging.forged import (
    Forged,
    breaks,
    replace,
)
from tests.history.record import (
    Invoke,
)


def _change_snapshot(forged: Forged, place: int, **changes: Any) -> None:
    snapshots = list(forged.end_state.snapshots)
    snapshots[place] = replace(snapshots[place], **changes)
    forged.end_state = replace(forged.end_state, snapshots=tuple(snapshots))


@breaks(Kind.WATERMARK_REGRESSION)
def lower_watermark(forged: Forged) -> bool:
    snapshots = forged.end_state.snapshots
    chosen = forged.pick(
        [
            (place, shard)
            for place in range(1, len(snapshots))
            for shard, mark in snapshots[place - 1].watermark.items()
            if mark > 0
        ]
    )
    if chosen is None:
        return False
    place, shard = chosen
    mark = snapshots[place - 1].watermark[shard] - 1
    _change_snapshot(forged, place, watermark=snapshots[place].watermark | {shard: mark})
    return True


@breaks(Kind.WATERMARK_HOLE)
def raise_watermark(forged: Forged) -> bool:
    """A snapshot claims what became terminal only in the next one that moved the watermark."""

    snapshots: tuple[SnapshotFact, ...] = forged.end_state.snapshots
    chosen = forged.pick(
        [
            (place, shard)
            for place in range(len(snapshots) - 1)
            for shard, mark in snapshots[place].watermark.items()
            if snapshots[place + 1].watermark[shard] > mark
        ]
    )
    if chosen is None:
        return False
    place, shard = chosen
    mark = snapshots[place + 1].watermark[shard]
    _change_snapshot(forged, place, watermark=snapshots[place].watermark | {shard: mark})
    return True


@breaks(Kind.WATERMARK_HOLE)
def forget_range(forged: Forged) -> bool:
    ranges = list(forged.end_state.ranges)
    if not ranges:
        return False
    ranges.remove(forged.pick(ranges))
    forged.end_state = replace(forged.end_state, ranges=tuple(ranges))
    return True


@breaks(Kind.OVERLAPPING_RANGES)
def publish_twice(forged: Forged) -> bool:
    """The last entry of a range is in the next snapshot's range too."""

    row: Range | None = forged.pick(list(forged.end_state.ranges))
    if row is None:
        return False
    head = forged.end_state.snapshots[-1].snapshot_id
    again = Range(row.shard, row.hi - 1, row.hi, head)
    ranges = (*forged.end_state.ranges, again)
    forged.end_state = replace(forged.end_state, ranges=ranges)
    return True


@breaks(Kind.TIME_REGRESSION)
def repeat_time(forged: Forged) -> bool:
    snapshots = forged.end_state.snapshots
    place = forged.random.randrange(1, len(snapshots))
    _change_snapshot(forged, place, published_at=snapshots[place - 1].published_at)
    return True


@breaks(Kind.BROKEN_LINE)
def fork_line(forged: Forged) -> bool:
    snapshots = forged.end_state.snapshots
    place = forged.random.randrange(2, len(snapshots))
    _change_snapshot(forged, place, parent_id=snapshots[place - 2].snapshot_id)
    return True


def _change_file(forged: Forged, change: Callable[[FileFact], FileFact | None]) -> bool:
    files = list(forged.end_state.files)
    if not files:
        return False
    place = forged.random.randrange(len(files))
    changed = change(files[place])
    files[place : place + 1] = [] if changed is None else [changed]
    forged.end_state = replace(forged.end_state, files=tuple(files))
    return True


@breaks(Kind.DANGLING_FILE)
def grow_file(forged: Forged) -> bool:
    return _change_file(forged, lambda file: replace(file, rows=file.rows + 1))


@breaks(Kind.DANGLING_FILE)
def forget_file(forged: Forged) -> bool:
    return _change_file(forged, lambda file: None)


@breaks(Kind.DANGLING_FILE)
def remove_object(forged: Forged) -> bool:
    return _change_file(forged, lambda file: replace(file, present=False))


@breaks(Kind.DANGLING_FILE)
def repeat_file(forged: Forged) -> bool:
    """A zombie's file was published beside its successor's."""

    files = forged.end_state.files
    if not files:
        return False
    copied = replace(forged.random.choice(files), file_id="another")
    forged.end_state = replace(forged.end_state, files=(*files, copied))
    return True


@breaks(Kind.LOST_WRITE)
def forget_last_entry(forged: Forged) -> bool:
    """The bus ends before an acknowledged entry, as after a lost tail."""

    return _cut_last(forged, keep_entry=False)


@breaks(Kind.STUCK_ENTRY)
def leave_last_entry(forged: Forged) -> bool:
    """The last entry of a drained shard is not terminal."""

    return _cut_last(forged, keep_entry=True)


def _cut_last(forged: Forged, *, keep_entry: bool) -> bool:
    """Cuts the last entry of a shard for which somebody holds the receipt."""

    last = {shard.shard: shard.end - 1 for shard in forged.end_state.shards}
    own = {receipt.token.own[0] for receipt in forged.receipts().values()}
    place = forged.pick([place for place in last.items() if place in own])
    if place is None:
        return False
    return _cut(forged, place, keep_entry=keep_entry)


def _cut(forged: Forged, place: tuple[int, int], *, keep_entry: bool) -> bool:
    """Takes the last entry of a shard out of its range and below every watermark."""

    shard, position = place
    end_state = forged.end_state
    ranges = [
        replace(row, hi=position) if (row.shard, row.hi) == (shard, position + 1) else row
        for row in end_state.ranges
    ]
    end = position + int(keep_entry)
    forged.end_state = replace(
        end_state,
        ranges=tuple(row for row in ranges if row.lo < row.hi),
        entries=tuple(
            replace(e, state="accepted", snapshot_id=None) if keep_entry else e
            for e in end_state.entries
            if keep_entry or (e.shard, e.position) != place
        ),
        shards=tuple(
            replace(s, end=end, watermark=position) if s.shard == shard else s
            for s in end_state.shards
        ),
        snapshots=tuple(
            replace(s, watermark=s.watermark | {shard: min(position, s.watermark[shard])})
            for s in end_state.snapshots
        ),
    )
    return True


@breaks(Kind.PHANTOM)
def add_strangers(forged: Forged) -> bool:
    """Entries on the bus of which nobody was told, more than unknown outcomes explain."""

    known = sum(isinstance(line, Invoke) for line in forged.lines)
    first = forged.end_state.shards[0]
    again = Range(
        first.shard, first.end, first.end + known, forged.end_state.snapshots[-1].snapshot_id
    )
    shards = (replace(first, end=again.hi, watermark=again.lo), *forged.end_state.shards[1:])
    forged.end_state = replace(
        forged.end_state, ranges=(*forged.end_state.ranges, again), shards=shards
    )
    return True
