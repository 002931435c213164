"""Turns: who may go next, fairly over principals, and first come first served within one.

What is scarce (places in the SQL engine, work at the door) is given out here. The rules:

* A principal that is alone may take all places. As soon as another one is there too, each may hold
  only its equal share, so that a newcomer finds a place instead of a queue. "There" is who holds or
  waits, and for `memory_s` longer who did: one who asks again and again is not pushed out between
  two of its requests.
* A free place goes to the waiting principals in turn, one request each, whatever number a principal
  has waiting. So a wait is bounded by the number of principals, not by the number of requests.
* The line has an end. When it is full, the one who waits most loses its last request: a flood is
  refused before anybody else is.

Nothing is taken away from who holds it: a place comes back when its request ends. All of it runs on
one event loop, and between two awaits nothing changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from lakebus.clock import Clock, SystemClock
from lakebus.errors import LakebusError, RateLimited, Unavailable

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Party:
    """Who asks for a turn. `at_once_max`: the most places this one may hold, however free."""

    principal_id: int = 0
    at_once_max: int | None = None


#: Work of our own, of no principal.
OURSELVES = Party()


@dataclass(slots=True)
class _Line:
    """One principal's places and its waiting requests."""

    held: int = 0
    waiting: deque[tuple[asyncio.Future[None], Party]] = field(default_factory=deque)


class Turns:
    """`what`: the word for the things that wait, in refusals.

    :param places: held at once by all, and shared equally when several principals are there.
    :param alone: what one principal may hold while it is alone, and all together in any case;
        `places` unless given. More than `places` means that `places` is no bound, but a measure of
        how much of a flood may stand in the way of others.
    :param waiting_max: requests that may wait, of all principals together.
    """

    def __init__(
        self,
        what: str,
        *,
        places: int,
        waiting_max: int,
        alone: int | None = None,
        memory_s: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        self._what = what
        self._places = places
        self._all = max(places, alone or places)
        self._waiting_max = waiting_max
        self._memory_s = memory_s
        self._clock = clock or SystemClock()
        self._lines: dict[int, _Line] = {}
        #: Principals that have gone, with the time until which they count as there; oldest first.
        self._gone_s: OrderedDict[int, float] = OrderedDict()
        #: Principals with waiting requests, the next to be served first.
        self._next: deque[int] = deque()
        self._waking: asyncio.Task[None] | None = None
        self.held = 0
        self.waiting = 0

    async def take(self, party: Party, deadline_s: float) -> None:
        """Returns with a place, which `give` ends.

        Raises TimeoutError at the deadline (monotonic clock), RateLimited when the principal waits
        too often already, Unavailable when everybody does.
        """

        line = self._there(party.principal_id)
        if not line.waiting and self._may_have(line, party):
            self._hand(line)
            return
        self._make_room(party.principal_id, line)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not line.waiting:
            self._next.append(party.principal_id)
        line.waiting.append((place, party))
        self.waiting += 1
        self._wake_when_one_is_forgotten()
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s())):
                await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.give(party)  # it came together with the end of the wait
            else:
                self._leave(party.principal_id, place)
            raise

    def give(self, party: Party) -> None:
        """Ends a turn that `take` gave."""

        line = self._lines[party.principal_id]
        line.held -= 1
        self.held -= 1
        self._forget_if_gone(party.principal_id)
        self._serve()

    # --- who is there --------------------------------------------------------------------------

    def _there(self, principal_id: int) -> _Line:
        line = self._lines.get(principal_id)
        if line is None:
            line = self._lines[principal_id] = _Line()
            self._gone_s.pop(principal_id, None)
        return line

    def _forget_if_gone(self, principal_id: int) -> None:
        line = self._lines[principal_id]
        if not line.held and not line.waiting:
            del self._lines[principal_id]
            self._gone_s[principal_id] = self._clock.monotonic_s() + self._memory_s

    def _share(self) -> int:
        now_s = self._clock.monotonic_s()
        while self._gone_s and next(iter(self._gone_s.values())) <= now_s:
            self._gone_s.popitem(last=False)
        present = len(self._lines) + len(self._gone_s)
        return self._all if present <= 1 else max(1, self._places // present)

    def _may_have(self, line: _Line, party: Party) -> bool:
        most = self._share()
        if party.at_once_max is not None:
            most = min(most, party.at_once_max)
        return line.held < most and self.held < self._all

    # --- the line ------------------------------------------------------------------------------

    def _hand(self, line: _Line) -> None:
        line.held += 1
        self.held += 1

    def _serve(self) -> None:
        """Hands free places to those who wait, one principal after the other."""

        passed = 0
        while passed < len(self._next) and self.held < self._all:
            principal_id = self._next.popleft()
            line = self._lines[principal_id]
            place, party = line.waiting[0]
            if not self._may_have(line, party):
                self._next.append(principal_id)
                passed += 1
                continue
            passed = 0
            line.waiting.popleft()
            self.waiting -= 1
            if line.waiting:
                self._next.append(principal_id)
            if place.done():  # its request has gone, and is about to say so
                self._forget_if_gone(principal_id)
                continue
            self._hand(line)
            place.set_result(None)
        self._wake_when_one_is_forgotten()

    def _wake_when_one_is_forgotten(self) -> None:
        """What was kept for a principal that has gone is given to who waits, when its time ends:
        no turn need end then."""

        if self._waking is None and self._next and self._gone_s:
            until_s = next(iter(self._gone_s.values()))
            self._waking = asyncio.create_task(self._serve_after(until_s))

    async def _serve_after(self, until_s: float) -> None:
        try:
            await self._clock.sleep_s(max(0.0, until_s - self._clock.monotonic_s()))
        finally:
            self._waking = None
        self._serve()

    def _leave(self, principal_id: int, place: asyncio.Future[None]) -> None:
        line = self._lines.get(principal_id)
        if line is None:
            return
        for entry in line.waiting:
            if entry[0] is place:
                line.waiting.remove(entry)
                self._left(principal_id, line)
                return

    def _left(self, principal_id: int, line: _Line) -> None:
        self.waiting -= 1
        if not line.waiting:
            self._next.remove(principal_id)
            self._forget_if_gone(principal_id)

    def _make_room(self, principal_id: int, mine: _Line) -> None:
        """Room for one more in the line. Raises RateLimited, Unavailable."""

        if self.waiting < self._waiting_max:
            return
        longest_id = max(
            self._next, key=lambda one: len(self._lines[one].waiting), default=principal_id
        )
        longest = self._lines[longest_id]
        if len(longest.waiting) <= len(mine.waiting) + 1:
            # Refused, it counts as there all the same: a place comes free for its next try.
            self._forget_if_gone(principal_id)
            raise self._refusal(len(mine.waiting))
        place, _ = longest.waiting.pop()
        self._left(longest_id, longest)
        if not place.done():
            place.set_exception(self._refusal(len(longest.waiting) + 1))

    def _refusal(self, waiting: int) -> LakebusError:
        if not waiting:
            return Unavailable(
                f"too many {self._what} are waiting; send it again later",
                retry_after_s=_RETRY_AFTER_S,
                phase="queue",
            )
        return RateLimited(
            f"{waiting} {self._what} of yours are waiting here, and there is no room for more "
            f"(the line has {self._waiting_max} places for all): send fewer at a time",
            retry_after_s=_RETRY_AFTER_S,
            limit=f"{self._what}_waiting",
            limit_value=self._waiting_max,
        )
