"""The line of snapshots against the published ranges: times, parents, watermarks, gaps, overlaps.

Both are read once, side by side: a watermark is right at a snapshot if it is the end of the longest
prefix of ranges that this snapshot or an earlier one published. Memory does not grow with either.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator

from storage.catalog.interface import PublishedRange
from storage.maintenance.checks.counts import CountCheck
from storage.maintenance.findings import Findings
from storage.maintenance.inspection import InspectedHead, InspectedSnapshot, View


async def check_line(view: View, head: InspectedHead, findings: Findings) -> dict[str, int]:
    """Reads all snapshots and ranges of the view; answers how many there were."""

    line = _Line(findings)
    counts = CountCheck(view, findings)
    shards = [
        _Shard(number, mark, view.ranges(number), findings)
        for number, mark in enumerate(head.watermark)
    ]
    for shard in shards:
        await shard.start()
    snapshots = 0
    async for snapshot in view.snapshots():
        snapshots += 1
        line.look_at(snapshot)
        await counts.look_at(snapshot)
        for shard, mark in zip(shards, snapshot.watermark, strict=False):
            await shard.look_at(snapshot.snapshot_id, mark)
    await counts.finish()
    line.finish(head)
    for shard, mark in zip(shards, head.watermark, strict=True):
        await shard.finish(head.snapshot_id, mark)
    return {"snapshots": snapshots, "ranges": sum(shard.seen for shard in shards)}


class _Line:
    """Parents and times."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._last: tuple[int, dt.datetime] | None = None

    def look_at(self, snapshot: InspectedSnapshot) -> None:
        subject = f"snapshot {snapshot.snapshot_id}"
        last_id, last_time = self._last or (None, None)
        if snapshot.parent_id != last_id:
            self._findings.add(
                "snapshot_line",
                subject,
                f"its parent is {snapshot.parent_id}, and the snapshot before it is {last_id}",
            )
        if last_time is not None and snapshot.published_at <= last_time:
            self._findings.add(
                "snapshot_times",
                subject,
                f"published at {snapshot.published_at.isoformat()}, and the one before it at"
                f" {last_time.isoformat()}",
            )
        self._last = (snapshot.snapshot_id, snapshot.published_at)

    def finish(self, head: InspectedHead) -> None:
        if self._last != (head.snapshot_id, head.published_at):
            newest = None if self._last is None else self._last[0]
            self._findings.add(
                "snapshot_line",
                "head",
                f"the head is snapshot {head.snapshot_id}, published at"
                f" {head.published_at.isoformat()}, and the newest snapshot is {newest}",
            )


class _Shard:
    """The ranges of one shard in their order, walked along with the snapshots.

    `_mark` is the end of what is published so far; `_next` the first range beyond it. A gap below
    the newest watermark is reported as a gap, and then passed over as if it had been published.
    """

    def __init__(
        self,
        shard: int,
        newest_mark: int,
        ranges: AsyncIterator[PublishedRange],
        findings: Findings,
    ) -> None:
        self.seen = 0
        self._shard = shard
        self._newest_mark = newest_mark
        self._ranges = ranges
        self._findings = findings
        self._end = 0
        self._mark = 0
        self._next: PublishedRange | None = None
        self._wrong = False

    async def start(self) -> None:
        await self._pull()

    async def look_at(self, snapshot_id: int, mark: int) -> None:
        while (following := self._next) is not None:
            if following.lo > self._mark:
                # A gap: reported when it was met. The watermark tells how far it counted.
                if self._mark >= min(mark, self._newest_mark):
                    break
                self._mark = min(following.lo, mark)
                if self._mark < following.lo:
                    break
            elif following.hi <= self._mark:
                await self._pull()  # lies within others: reported as an overlap
            elif following.snapshot_id <= snapshot_id:
                self._mark = following.hi
                await self._pull()
            else:
                break
        if mark != self._mark and not self._wrong:
            self._wrong = True  # those after it are as wrong, and say nothing new
            self._findings.add(
                "watermark_wrong",
                f"shard {self._shard}",
                f"the watermark of snapshot {snapshot_id} is {mark}, and what was published until"
                f" then reaches from 0 to {self._mark}",
            )

    async def finish(self, snapshot_id: int, mark: int) -> None:
        await self.look_at(snapshot_id, mark)
        while self._next is not None:
            await self._pull()

    async def _pull(self) -> None:
        found = await anext(self._ranges, None)
        if found is not None:
            self.seen += 1
            words = f"[{found.lo}, {found.hi}) of snapshot {found.snapshot_id}"
            if found.lo < self._end:
                self._findings.add(
                    "range_overlap",
                    f"shard {self._shard}",
                    f"the range {words} begins before {self._end}, where an earlier one ends",
                )
            elif found.lo > self._end and self._end < self._newest_mark:
                self._findings.add(
                    "range_gap",
                    f"shard {self._shard}",
                    f"nothing was published for the positions [{self._end}, {found.lo}), and the"
                    f" watermark is {self._newest_mark}",
                )
            self._end = max(self._end, found.hi)
        self._next = found
