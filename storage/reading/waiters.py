"""Who waits for which snapshot: waiters ordered by what they still miss.

A token asks for several things at once (a floor, a position on each of some shards). A waiter
stands in one queue at a time, the queue of one part that is not covered yet, ordered by the value
asked for. A new head looks only at the front of each queue: whoever is reached there either has
everything and is woken, or moves on to the queue of another part that is missing. So a head that
wakes nobody costs a glance at each queue, however many wait (P18).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools

from lakebus.tokens import VisibilityToken
from storage.catalog.interface import Head

#: The queue of the snapshot floor; the other queues are the shards, from 0.
_FLOOR = -1


class Waiter:
    """One caller that waits for a head that covers `token`."""

    __slots__ = ("future", "token")

    def __init__(self, token: VisibilityToken, future: asyncio.Future[Head]) -> None:
        self.token = token
        self.future = future

    def missing(self, head: Head) -> tuple[int, int] | None:
        """(queue, value) of one part that `head` does not cover, or None when it covers all."""

        if head.snapshot_id < self.token.floor:
            return _FLOOR, self.token.floor
        for shard, position in self.token.positions.items():
            if head.watermark.get(shard, 0) < position:
                return shard, position
        return None


class WaitingRoom:
    """All waiters of a process. Not thread-safe: it belongs to one event loop."""

    def __init__(self) -> None:
        self._queues: dict[int, list[tuple[int, int, Waiter]]] = {}
        self._ticket = itertools.count()
        # In order of arrival, so that what wakes them wakes them in one order.
        self._members: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def enter(self, waiter: Waiter, head: Head) -> bool:
        """Queues the waiter, or returns False when `head` covers it already."""

        part = waiter.missing(head)
        if part is None:
            return False
        self._members[waiter] = None
        self._queue(waiter, part)
        return True

    def leave(self, waiter: Waiter) -> None:
        """The waiter's wait is over. The place of one that gave up stays until a head passes it or
        dead places are many. Leaving twice is allowed."""

        self._members.pop(waiter, None)
        if sum(map(len, self._queues.values())) > 2 * len(self._members) + 64:
            self._sweep()

    def advance(self, head: Head) -> int:
        """Wakes everybody whom `head` covers; returns how many."""

        woken = 0
        moved: list[Waiter] = []
        for part, queue in self._queues.items():
            reached = head.snapshot_id if part == _FLOOR else head.watermark.get(part, 0)
            while queue and queue[0][0] <= reached:
                waiter = heapq.heappop(queue)[2]
                if waiter.future.done():
                    continue
                if waiter.missing(head) is None:
                    waiter.future.set_result(head)
                    self._members.pop(waiter, None)
                    woken += 1
                else:
                    moved.append(waiter)
        for waiter in moved:
            part_missing = waiter.missing(head)
            assert part_missing is not None
            self._queue(waiter, part_missing)
        return woken

    def wake_all(self, error: Exception) -> None:
        """Ends every wait with `error`."""

        waiting, self._members, self._queues = self._members, {}, {}
        for waiter in waiting:
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _queue(self, waiter: Waiter, part: tuple[int, int]) -> None:
        queue, value = part
        entry = (value, next(self._ticket), waiter)
        heapq.heappush(self._queues.setdefault(queue, []), entry)

    def _sweep(self) -> None:
        for part, queue in list(self._queues.items()):
            kept = [entry for entry in queue if not entry[2].future.done()]
            heapq.heapify(kept)
            if kept:
                self._queues[part] = kept
            else:
                del self._queues[part]
