"""Checks of the catalog's own truth at the end, and of the record against it (B2, C1-C6)."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from tests.history.anomalies import Kind
from tests.history.end_state import EndState
from tests.history.stories import Knowledge, Story


def check_catalog(known: Knowledge) -> None:
    end_state = known.end_state
    if end_state is None:
        return
    _check_line(known, end_state)
    _check_ranges(known, end_state)
    _check_watermarks(known, end_state)
    _check_entries(known, end_state)


def _check_line(known: Knowledge, end_state: EndState) -> None:
    before = None
    ids = {fact.snapshot_id for fact in end_state.snapshots}
    for fact in sorted(end_state.snapshots, key=lambda fact: fact.snapshot_id):
        if before is not None:
            if fact.parent_id != before.snapshot_id and fact.parent_id in ids | {None}:
                known.findings.add(
                    Kind.BROKEN_LINE,
                    f"snapshot {fact.snapshot_id} has the parent {fact.parent_id}, and "
                    f"{before.snapshot_id} was before it",
                )
            if fact.published_at <= before.published_at:
                known.findings.add(
                    Kind.TIME_REGRESSION,
                    f"snapshot {fact.snapshot_id} was published at {fact.published_at}, "
                    f"{before.snapshot_id} at {before.published_at}",
                )
            if fact.serial == before.serial:
                for shard, mark in before.watermark.items():
                    if fact.watermark.get(shard, 0) < mark:
                        known.findings.add(
                            Kind.WATERMARK_REGRESSION,
                            f"shard {shard} was at {mark} in snapshot {before.snapshot_id} and at "
                            f"{fact.watermark.get(shard, 0)} in {fact.snapshot_id}",
                        )
        before = fact
    for row in end_state.ranges:
        if row.snapshot_id not in ids:
            known.findings.add(
                Kind.BROKEN_LINE,
                f"shard {row.shard} [{row.lo}, {row.hi}) names snapshot {row.snapshot_id}, which "
                "does not exist",
            )


def _terminal(end_state: EndState) -> dict[int, list[tuple[int, int]]]:
    """Per shard, everything that is terminal or was skipped, in order."""

    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in end_state.ranges:
        spans[row.shard].append((row.lo, row.hi))
    for shard, lo, hi in (*end_state.skipped, *end_state.purged):
        if lo < hi:
            spans[shard].append((lo, hi))
    for listed in spans.values():
        listed.sort()
    return spans


def _check_ranges(known: Knowledge, end_state: EndState) -> None:
    """Disjoint, not beyond the end, and without a hole below the watermark."""

    spans = _terminal(end_state)
    for shard in end_state.shards:
        reached = 0
        for lo, hi in spans[shard.shard]:
            if lo < reached:
                known.findings.add(
                    Kind.OVERLAPPING_RANGES,
                    f"shard {shard.shard} [{lo}, {hi}) became terminal, and was up to {reached}",
                )
            elif reached < lo and reached < shard.watermark:
                known.findings.add(
                    Kind.WATERMARK_HOLE,
                    f"shard {shard.shard} [{reached}, {lo}) is in no snapshot, and the watermark "
                    f"is {shard.watermark}",
                )
            reached = max(reached, hi)
        if reached > shard.end:
            known.findings.add(
                Kind.POSITION_GAP,
                f"shard {shard.shard} is terminal up to {reached}, beyond its end {shard.end}",
            )
        if reached < shard.watermark:
            known.findings.add(
                Kind.WATERMARK_HOLE,
                f"shard {shard.shard} is terminal up to {reached}, and the watermark is "
                f"{shard.watermark}",
            )


def _check_watermarks(known: Knowledge, end_state: EndState) -> None:
    """No snapshot claims more than what was terminal in it: ranges of it or of an earlier one."""

    arriving = sorted(end_state.ranges, key=lambda row: row.snapshot_id, reverse=True)
    upto: dict[int, dict[int, int]] = defaultdict(dict)
    prefix: dict[int, int] = defaultdict(int)
    for shard, lo, hi in (*end_state.skipped, *end_state.purged):
        upto[shard][lo] = hi
    told = _unjoined(end_state)
    for fact in sorted(end_state.snapshots, key=lambda fact: fact.snapshot_id):
        while arriving and arriving[-1].snapshot_id <= fact.snapshot_id:
            row = arriving.pop()
            upto[row.shard][row.lo] = max(row.hi, upto[row.shard].get(row.lo, 0))
        for shard, mark in fact.watermark.items():
            while (hi := upto[shard].pop(prefix[shard], -1)) >= 0:
                prefix[shard] = hi
            if mark > prefix[shard] and shard not in told:
                told.add(shard)
                known.findings.add(
                    Kind.WATERMARK_HOLE,
                    f"snapshot {fact.snapshot_id} says shard {shard} is terminal below {mark}; "
                    f"it was below {prefix[shard]}",
                )


def _unjoined(end_state: EndState) -> set[int]:
    """Shards whose final ranges do not join: overlaps and holes are told by their own check."""

    return {
        shard
        for shard, spans in _terminal(end_state).items()
        if any(a[1] != b[0] for a, b in pairwise(spans))
    }


def _check_entries(known: Knowledge, end_state: EndState) -> None:
    entries = {(entry.shard, entry.position): entry for entry in end_state.entries}
    ends = {shard.shard: shard.end for shard in end_state.shards}
    terminal = {
        (row.shard, position) for row in end_state.ranges for position in range(row.lo, row.hi)
    }
    purged = {(shard, position) for shard, lo, hi in end_state.purged for position in range(lo, hi)}
    for story in known.by_place.values():
        assert story.place is not None
        if story.excused or story.place in terminal or story.place in purged:
            continue
        if story.place not in entries or story.place[1] >= ends.get(story.place[0], 0):
            known.findings.add(
                Kind.LOST_WRITE,
                f"request {story.request} has a receipt for {_where(story)}, and the bus does not "
                "know it",
                story.attempts[:1],
            )
        elif end_state.drained:
            known.findings.add(
                Kind.STUCK_ENTRY,
                f"request {story.request}, {_where(story)}, is not terminal on a drained bus",
                story.attempts[:1],
            )
    if known.history.closed:
        _check_strangers(known, entries.keys() | terminal)


def _where(story: Story) -> str:
    assert story.place is not None
    return f"shard {story.place[0]}, position {story.place[1]}"


def _check_strangers(known: Knowledge, places: set[tuple[int, int]]) -> None:
    """Entries without a receipt must be explained: an unknown outcome, or a quarantine replay."""

    base = known.history.base
    strangers = sorted(
        place
        for place in places
        if place not in known.by_place and place[1] >= base.get(place[0], 0)
    )
    replays = sum(bool(successor) for successor in known.quarantined.values())
    explained = known.unresolved + replays
    if len(strangers) > explained:
        shown = ", ".join(f"{shard}:{position}" for shard, position in strangers[:10])
        known.findings.add(
            Kind.PHANTOM,
            f"{len(strangers)} entries (shard:position {shown}, …) have no receipt, and only "
            f"{explained} can be explained",
        )
