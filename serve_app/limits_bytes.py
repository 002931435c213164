"""Bytes of requests that a process holds at a time, and each principal's part of them (A11).

Beyond the budget the door says 429. What is left goes by these rules:

* One principal takes at most its `share` of the budget, so that a newcomer finds room. A request
  that is its principal's only one is bound by the budget alone, and one that is alone in the
  process by nothing: a large body must not be refused for ever.
* Who was refused, though it would have stayed within an equal part, has a claim on these bytes
  until its client comes back: meanwhile nobody takes them who holds more than an equal part.
* The replay of a request that was accepted before is answered, not refused (A3). One at a time may
  be read beyond the budget for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lakebus.clock import Clock, SystemClock
from lakebus.errors import Backpressure

_RETRY_AFTER_S = 1.0
#: How much longer than the time it was told a refused client may take to come back.
_CLAIM_S = _RETRY_AFTER_S + 1.0
#: Keys of refused requests that are looked up at a time: a flood must not reach the database.
_LOOK_UPS_MAX = 2

Known = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class _Claim:
    count: int
    until_s: float


class ByteBudget:
    def __init__(self, limit_bytes: int, *, share: float = 1.0, clock: Clock | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._share_bytes = int(limit_bytes * share)
        self._clock = clock or SystemClock()
        self._held: dict[int, int] = {}
        self._claims: dict[int, _Claim] = {}
        self._looking_up = asyncio.Semaphore(_LOOK_UPS_MAX)
        self._replaying = asyncio.Semaphore(1)
        self.held_bytes = 0

    def reserve(self, principal_id: int = 0, *, known: Known | None = None) -> Reservation:
        """`known` says whether the request was accepted before; asked before it is refused."""

        return Reservation(self, principal_id, known)

    def take(self, principal_id: int, count: int, *, mine: int) -> None:
        """`count` more bytes for a request that holds `mine`. Raises Backpressure."""

        if self.held_bytes > mine:
            self._judge(principal_id, count, mine)
        self._claims.pop(principal_id, None)
        self.add(principal_id, count)

    def add(self, principal_id: int, count: int) -> None:
        """Takes without asking."""

        self._held[principal_id] = self._held.get(principal_id, 0) + count
        self.held_bytes += count

    def give(self, principal_id: int, count: int) -> None:
        self.held_bytes -= count
        left = self._held.get(principal_id, 0) - count
        if left > 0:
            self._held[principal_id] = left
        else:
            self._held.pop(principal_id, None)

    def held_by(self, principal_id: int) -> int:
        return self._held.get(principal_id, 0)

    # --- who gets them -------------------------------------------------------------------------

    def _judge(self, principal_id: int, count: int, mine: int) -> None:
        ours = self.held_by(principal_id)
        after = ours + count
        if ours > mine and after > self._share_bytes:
            raise Backpressure(
                f"your requests hold {ours} of the {self._share_bytes} bytes that one principal "
                "may hold in this server; send it again a little later, nothing was stored",
                retry_after_s=_RETRY_AFTER_S,
                limit="inflight_bytes",
                limit_value=self._share_bytes,
            )
        claimed = self._claimed_by_others(principal_id) if self._claims else 0
        equal = self._limit_bytes // len({principal_id, *self._held, *self._claims})
        free = self._limit_bytes - self.held_bytes
        if count <= free and (after <= equal or count <= free - claimed):
            return
        if after <= equal:
            self._claims[principal_id] = _Claim(mine + count, self._clock.monotonic_s() + _CLAIM_S)
        raise Backpressure(
            "this server holds as many bytes of requests as it may; send it again a little "
            "later, nothing was stored",
            retry_after_s=_RETRY_AFTER_S,
            limit="inflight_bytes",
            limit_value=self._limit_bytes,
        )

    def _claimed_by_others(self, principal_id: int) -> int:
        now_s = self._clock.monotonic_s()
        for other, claim in list(self._claims.items()):
            if claim.until_s <= now_s:
                del self._claims[other]
        return sum(c.count for other, c in self._claims.items() if other != principal_id)

    # --- replays -------------------------------------------------------------------------------

    async def accepted_before(self, known: Known) -> bool:
        async with self._looking_up:
            return await known()

    async def replay_lane(self) -> None:
        await self._replaying.acquire()

    def leave_replay_lane(self) -> None:
        self._replaying.release()


class Reservation:
    """One request's part of a ByteBudget, given back when the block ends."""

    def __init__(self, budget: ByteBudget, principal_id: int, known: Known | None) -> None:
        self._budget = budget
        self._principal_id = principal_id
        self._known = known
        self._bytes = 0
        self._replay = False

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give(self._principal_id, self._bytes)
        self._bytes = 0
        if self._replay:
            self._replay = False
            self._budget.leave_replay_lane()

    def take_at_once(self, total: int) -> bool:
        """The first bytes of a request. False: `grow_to` says why not, or waits."""

        try:
            self._budget.take(self._principal_id, total, mine=0)
        except Backpressure:
            return False
        self._bytes = total
        return True

    async def grow_to(self, total: int) -> None:
        """Raises Backpressure, and what looking up the key raises. A replay may wait here for its
        lane: the caller sets the time."""

        more = total - self._bytes
        if more <= 0:
            return
        if not self._replay:
            try:
                self._budget.take(self._principal_id, more, mine=self._bytes)
            except Backpressure:
                if self._known is None or not await self._budget.accepted_before(self._known):
                    raise
                await self._budget.replay_lane()
                self._replay = True
        if self._replay:
            self._budget.add(self._principal_id, more)
        self._bytes = total
