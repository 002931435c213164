"""What was found at one size: a few curves, each with a value for every repetition."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.growth.counters import Meter
from benchmarks.growth.lake import GrowingLake
from benchmarks.measures import percentile
from storage.bus.interface import Claim
from storage.catalog.interface import Head
from storage.reading.manifest import Manifest

#: Publications whose ranges are claimed together, so that only publishing is counted.
PUBLICATIONS = 20

Call = Callable[[int], Awaitable[object]]


class Point:
    """`curves`: values by name; a name ends with its unit. `by_table`: rows that PostgreSQL read
    for a call, by table, of the last repetition: where a slope comes from."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.curves: dict[str, list[float]] = {}
        self.by_table: dict[str, dict[str, float]] = {}
        self.calls = 0

    def note(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(round(value, 4))

    def note_times(self, what: str, took_ms: Sequence[float]) -> None:
        """Median and 99th percentile of one repetition."""

        self.note(f"{what}, ms", statistics.median(took_ms))
        if len(took_ms) >= 100:
            self.note(f"{what}, p99 ms", percentile(list(took_ms), 0.99))

    async def timed(self, what: str, calls: int, call: Call) -> None:
        """One repetition of calls that ask PostgreSQL nothing."""

        self.note_times(what, await _times(calls, call))
        self.calls += calls

    async def counted(self, what: str, calls: int, call: Call) -> None:
        """One repetition, and what PostgreSQL did for each call."""

        took_ms, work = await self._meter.count(lambda: _times(calls, call))
        each = work.each(calls)
        self.note_times(what, took_ms)
        self.note(f"{what}, statements", each.statements)
        self.note(f"{what}, rows read", each.rows_read)
        self.note(f"{what}, blocks", each.blocks)
        self.note(f"{what}, WAL bytes", each.wal_bytes)
        self.note(f"{what}, PostgreSQL CPU ms", each.cpu_ms)
        self.by_table[what] = {name: round(rows, 2) for name, rows in each.by_table.items()}
        self.calls += calls

    async def publications(self, lake: GrowingLake) -> None:
        """One repetition of append, claim and publish, of one entry each."""

        tables = [lake.any_table() for _ in range(PUBLICATIONS)]
        claims: list[Claim] = []

        async def claim(_: int) -> None:
            claims.append(await lake.claim())

        await self.counted("append", PUBLICATIONS, lambda n: lake.append(tables[n]))
        await self.counted("claim", PUBLICATIONS, claim)
        commits = [await lake.commit_of(one) for one in claims]
        await self.counted("publish", PUBLICATIONS, lambda n: lake.publish(commits[n]))

    def figures(self, **more: Any) -> dict[str, Any]:
        return {
            "requests": self.calls, "curves": self.curves, "by_table": self.by_table, **more,
        }  # fmt: skip


async def advances(point: Point, lake: GrowingLake, manifest: Manifest) -> None:
    """What a publication costs whoever keeps a manifest; three, as one repetition each."""

    for _ in range(3):
        await lake.publish_entry()
        head = await lake.head()

        async def advance(_: int, head: Head = head) -> None:
            await manifest.at(head.snapshot_id, head)

        await point.counted("advance the manifest", 1, advance)


async def _times(calls: int, call: Call) -> list[float]:
    took_ms = []
    for number in range(calls):
        began = time.perf_counter()
        await call(number)
        took_ms.append((time.perf_counter() - began) * 1000)
    return took_ms


class Held:
    """The longest time for which nothing else of this process had a turn: what its other requests
    wait for. Around work on the loop."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Held:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *failure: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait((self._task,))

    async def _watch(self) -> None:
        before = time.perf_counter()
        try:
            while True:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                self.longest_ms = max(self.longest_ms, (now - before) * 1000)
                before = now
        finally:
            self.longest_ms = max(self.longest_ms, (time.perf_counter() - before) * 1000)
