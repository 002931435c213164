"""A follower of the change feed: every published row exactly once, whatever was compacted (D12).

It keeps the place of each row it was given, and per request what it saw of it; at the end that is
compared with what was acknowledged (`judging.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.soak.calls import Caller, GaveUp, Refused, Trouble
from tests.history.record import Groups

_LIMIT = 5_000
_PLACE = ("$snapshot", "$shard", "$position", "$row")


@dataclass(slots=True)
class Followed:
    """What was seen of one table. `gaps`: where `after` had expired when it was asked for next, so
    that rows published in (first, last] are missing by right."""

    table: str
    groups: Groups = field(default_factory=dict)
    places: set[int] = field(default_factory=set)
    windows: int = 0
    pages: int = 0
    rows: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)


class Follower:
    def __init__(
        self,
        table: str,
        caller: Callable[[str], Caller],
        trouble: Trouble,
        *,
        randomness: random.Random,
        stopping: asyncio.Event,
        pause_s: tuple[float, float] = (0.5, 5.0),
    ) -> None:
        self.seen = Followed(table)
        self._caller = caller(f"feed-{table}")
        self._trouble = trouble
        self._random = randomness
        self._stopping = stopping
        self._pause_s = pause_s
        self._after = 0

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self.window()
            except GaveUp as error:
                self._trouble.add(str(error))
            try:
                async with asyncio.timeout(self._random.uniform(*self._pause_s)):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def window(self) -> None:
        """Everything published since the last window. Its rows count when it is whole."""
        path = f"/v1/tables/{self.seen.table}/changes"
        limit = self._random.choice((200, 1_000, _LIMIT))
        after, asked = self._after, f"?after={self._after}"
        pages: list[dict[str, Any]] = []
        while True:
            said = await self._caller.ask("GET", f"{path}{asked}&limit={limit}", kind="changes")
            if isinstance(said, Refused):
                await self._restart(said, in_window=bool(pages))
                return
            pages.append(said.json())
            if pages[-1]["cursor"] is None:
                break
            asked = f"?cursor={pages[-1]['cursor']}"
        until = int(pages[-1]["until"])
        if until < after or any(int(page["until"]) != until for page in pages):
            self._trouble.add(f"feed of {self.seen.table}: windows end at {until} after {after}")
        for page in pages:
            self._take(page, after, until)
        self.seen.windows += 1
        self.seen.pages += len(pages)
        self._after = until

    async def _restart(self, said: Refused, *, in_window: bool) -> None:
        """A window that took longer than the retention is begun again; an `after` that has expired
        ends what can be judged."""
        if said.code != "snapshot_expired":
            self._trouble.add(f"feed of {self.seen.table}: {said.code}: {said.detail}")
            await asyncio.sleep(1.0)
            return
        self._trouble.counts[f"feed {self.seen.table} expired"] += 1
        if in_window:
            return
        answer = await self._caller.ask("GET", "/v1/snapshots/latest", kind="snapshot")
        if not isinstance(answer, Refused):
            newest = int(answer.json()["snapshot_id"])
            self.seen.gaps.append((self._after, newest))
            self._after = newest

    def _take(self, page: dict[str, Any], after: int, until: int) -> None:
        names = [column["name"] for column in page["columns"]]
        at = [names.index(name) for name in (*_PLACE, "request", "check_value")]
        seen, before = self.seen, None
        for row in page["rows"]:
            snapshot, shard, position, number, request, check = (int(row[n]) for n in at)
            place = (shard << 96) | (position << 32) | number
            if place in seen.places:
                self._trouble.add(
                    f"feed of {seen.table}: the row {shard}/{position}/{number} of snapshot "
                    f"{snapshot} came twice"
                )
            if not after < snapshot <= until:
                self._trouble.add(
                    f"feed of {seen.table}: a row of snapshot {snapshot} in ({after}, {until}]"
                )
            if before is not None and before >= place:
                self._trouble.add(f"feed of {seen.table}: rows are not in order of their places")
            before = place
            seen.places.add(place)
            seen.rows += 1
            count, total = seen.groups.get(request, (0, 0))
            seen.groups[request] = (count + 1, total + check)
