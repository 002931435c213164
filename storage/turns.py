"""Turns: who may go next, fairly over principals, and first come first served within one.

What is scarce (places in the SQL engine, work at the door) is given out here. The rules:

* A principal that is alone may take all places. As soon as another one is there too, each may hold
  only its equal share, so that a newcomer finds a place instead of a queue. "There" is who holds or
  waits, and for `memory_s` longer who did: one who asks again and again is not pushed out between
  two of its requests.
* A free place goes to the waiting principals in turn, one request each, whatever number a principal
  has waiting. So a wait is bounded by the number of principals, not by the number of requests.
* Who has had clearly more than an equal part of late (`_takes_most`), while others are there, is
  paced: it gets its share of places in rounds, each twice as long as its turns take. What a turn
  costs besides its place (parsing, planning, sockets, other processes) is shared by nobody, and a
  flood that has its share of places filled all the time would take all of it. Rounds rather than
  single turns, because what begins together costs less: rows are committed in groups.
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
from storage.turn_uses import Use

_RETRY_AFTER_S = 1.0
#: Equal parts are never exactly equal: so much more than one is clearly more.
_MORE_THAN_EQUAL = 1.25
#: A round lasts so many turns. Of turns that are longer than that no more is counted: they cost
#: little besides their place.
_ROUND_TURNS, _TURN_S_MAX = 2.0, 0.02
#: What "of late" is.
_LATE_S = 1.0
_NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class Party:
    """Who asks for a turn. `at_once_max`: the most places this one may hold, however free."""

    principal_id: int = 0
    at_once_max: int | None = None


#: Work of our own, of no principal.
OURSELVES = Party()


@dataclass(slots=True)
class _Line:
    """One principal's places and its waiting requests. `round_turns`: of those that began in the
    round that lasts until `round_s`."""

    use: Use
    held: int = 0
    round_turns: int = 0
    round_s: float = 0.0
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
        self._gone: OrderedDict[int, tuple[float, _Line]] = OrderedDict()
        self._use = self._unused()
        #: Principals with waiting requests, the next to be served first.
        self._next: deque[int] = deque()
        self._waking: asyncio.Task[None] | None = None
        self._waking_s = _NEVER_S
        self.held = 0
        self.waiting = 0

    async def take(self, party: Party, deadline_s: float) -> None:
        """Returns with a place, which `give` ends.

        Raises TimeoutError at the deadline (monotonic clock), RateLimited when the principal waits
        too often already, Unavailable when everybody does.
        """

        line = self._there(party.principal_id)
        now_s = self._clock.monotonic_s()
        if not line.waiting and self._may_have(line, party, now_s):
            self._hand(line, now_s)
            return
        self._make_room(party.principal_id, line)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not line.waiting:
            self._next.append(party.principal_id)
        line.waiting.append((place, party))
        self.waiting += 1
        self._wake_later(line.round_s if line.round_s > now_s else _NEVER_S)
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
        self._count(line, -1, self._clock.monotonic_s())
        self._forget_if_gone(party.principal_id)
        self._serve()

    # --- who is there --------------------------------------------------------------------------

    def _there(self, principal_id: int) -> _Line:
        line = self._lines.get(principal_id)
        if line is None:
            gone = self._gone.pop(principal_id, None)
            line = _Line(self._unused()) if gone is None else gone[1]
            self._lines[principal_id] = line
        return line

    def _unused(self) -> Use:
        return Use(_LATE_S, at_s=self._clock.monotonic_s())

    def _forget_if_gone(self, principal_id: int) -> None:
        line = self._lines[principal_id]
        if not line.held and not line.waiting:
            del self._lines[principal_id]
            self._gone[principal_id] = self._clock.monotonic_s() + self._memory_s, line

    def _present(self, now_s: float) -> int:
        while self._gone and next(iter(self._gone.values()))[0] <= now_s:
            self._gone.popitem(last=False)
        return len(self._lines) + len(self._gone)

    def _share(self, present: int) -> int:
        return self._all if present <= 1 else max(1, self._places // present)

    def _takes_most(self, line: _Line, now_s: float) -> bool:
        """Others are there, and of what all have had of late this one had clearly more than an
        equal part."""

        present = self._present(now_s)
        if present <= 1:
            return False
        self._use.pass_to(now_s, self.held)
        line.use.pass_to(now_s, line.held)
        return line.use.held_s * present > self._use.held_s * _MORE_THAN_EQUAL

    def _may_have(self, line: _Line, party: Party, now_s: float) -> bool:
        present = self._present(now_s)
        share = most = self._share(present)
        if party.at_once_max is not None:
            most = min(most, party.at_once_max)
        if line.held >= most or self.held >= self._all:
            return False
        return present <= 1 or now_s >= line.round_s or line.round_turns < share

    # --- the line ------------------------------------------------------------------------------

    def _hand(self, line: _Line, now_s: float) -> None:
        self._count(line, 1, now_s)
        if now_s >= line.round_s:
            line.round_s, line.round_turns = now_s + self._round_s(line, now_s), 0
        line.round_turns += 1

    def _count(self, line: _Line, more: int, now_s: float) -> None:
        self._use.pass_to(now_s, self.held)
        line.use.pass_to(now_s, line.held)
        line.held += more
        self.held += more
        if more > 0:
            line.use.turns += 1

    def _round_s(self, line: _Line, now_s: float) -> float:
        """How long a round takes that begins now; 0 for who is not paced."""

        if not self._takes_most(line, now_s):
            return 0.0
        return min(line.use.turn_s, _TURN_S_MAX) * _ROUND_TURNS

    def _serve(self) -> None:
        """Hands free places to those who wait, one principal after the other."""

        passed, paced_s = 0, _NEVER_S
        now_s = self._clock.monotonic_s()
        while passed < len(self._next) and self.held < self._all:
            principal_id = self._next.popleft()
            line = self._lines[principal_id]
            place, party = line.waiting[0]
            if not self._may_have(line, party, now_s):
                self._next.append(principal_id)
                passed += 1
                if line.round_s > now_s:
                    paced_s = min(paced_s, line.round_s)
                continue
            passed = 0
            line.waiting.popleft()
            self.waiting -= 1
            if line.waiting:
                self._next.append(principal_id)
            if place.done():  # its request has gone, and is about to say so
                self._forget_if_gone(principal_id)
                continue
            self._hand(line, now_s)
            place.set_result(None)
        self._wake_later(paced_s)

    def _wake_later(self, paced_s: float) -> None:
        """What was kept for a principal that has gone is given to who waits when its time ends, and
        a paced one goes on when its has: no turn need end then."""

        if not self._next:
            return
        if self._gone:
            paced_s = min(paced_s, next(iter(self._gone.values()))[0])
        if paced_s >= self._waking_s:
            return
        if self._waking is not None:
            self._waking.cancel()
        self._waking_s = paced_s
        self._waking = asyncio.create_task(self._serve_at(paced_s))

    async def _serve_at(self, at_s: float) -> None:
        await self._clock.sleep_s(max(0.0, at_s - self._clock.monotonic_s()))
        self._waking, self._waking_s = None, _NEVER_S
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
