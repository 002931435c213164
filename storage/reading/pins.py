"""Pins of a process that answers queries: the files it reads are not deleted under it (E3).

What is authoritative: the pin's row in the database. There is one a process, with a floor: every
snapshot from the floor on is protected, and so are a few older ones by name. It is renewed every
`renew_s`, and each renewal moves the floor up to the oldest snapshot still in use. So the usual
query, which reads a new snapshot, is covered by what was granted before it came and costs no round
trip; one at an older snapshot asks once, and is granted only if the snapshot is retained (E3).

Why it is safe:

* A hold is given when every state that the row can be in protects its snapshot: what was granted,
  what is being asked for right now, and what was asked for without an answer. A floor that moves up
  takes with it no hold, because it is computed from them, and holds made meanwhile must lie above.
* After an answer was lost the next call makes a new row: a late write of the lost call meets a row
  that nobody relies on. What the new row cannot take over stays with the old one, until that ends.
* Time is this process's own, counted from before the call was sent, on a clock that also counts
  while the machine sleeps. The database counts from later, so its expiry comes later; `margin_s` is
  for clocks that run at different speeds and for the work that must stop. Nobody's wall clock
  enters.
* `Hold.check` looks at the clock itself, so a process that was paused finds its hold broken before
  it gives away another byte, whichever of its tasks runs first.
* Whoever dies leaves a row that expires. Renewing ends no wait: a hold is broken for good.

Floors lag one renewal behind the newest snapshot, so that a query which resolved its snapshot just
before a renewal still finds it covered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from lakebus.clock import SYSTEM_CHANCE, Chance, Clock, SystemClock
from lakebus.errors import Gone, LakebusError, NotFound, Unavailable
from storage.catalog.interface import Head
from storage.maintenance.interface import Upkeep
from storage.reading.holds import Grant, Hold, Proposal, Want

_log = logging.getLogger(__name__)

_TIMER_MIN_S = 0.001
#: The database's word that something is not retained; nothing was changed then.
_REFUSED = (Gone, NotFound)


@dataclass(frozen=True, slots=True)
class PinSettings:
    """`ttl_s`: how long the database keeps the pin of a process that stopped renewing. Queries stop
    `margin_s` before it. `call_s`: a call without an answer for so long is taken for lost."""

    renew_s: float = 5.0
    ttl_s: float = 120.0
    margin_s: float = 10.0
    call_s: float = 10.0


class AwakeClock(SystemClock):
    """A monotonic clock that goes on while the machine is suspended, where there is one: the
    database does not sleep with us."""

    if sys.platform == "linux":

        def monotonic_s(self) -> float:
            return time.clock_gettime(time.CLOCK_BOOTTIME)


class PinKeeper:
    """One per process. `head` answers a head that is at most a renewal old.

    One task makes all calls, one after the other, so no two of them can overtake each other.
    """

    def __init__(
        self,
        *,
        upkeep: Upkeep,
        head: Callable[[], Awaitable[Head]],
        settings: PinSettings | None = None,
        clock: Clock | None = None,
        chance: Chance = SYSTEM_CHANCE,
        note: str = "",
    ) -> None:
        self._upkeep = upkeep
        self._head = head
        self._settings = settings or PinSettings()
        self._clock = clock or AwakeClock()
        self._chance = chance
        self._note = note
        self._grant: Grant | None = None
        self._older: list[Grant] = []
        self._asking: Proposal | None = None
        self._next_floor = self._heard_head = 0
        self._heard_s = -math.inf
        self._waiting: dict[Want, list[asyncio.Future[Hold]]] = {}
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # --- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to ask for the pin, on the running loop. Holds wait until it is granted."""

        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep(), name="pins")

    async def stop(self) -> None:
        """Breaks what is still held and gives the pin back."""

        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait((task,))
        self._refuse_waiting(Unavailable("this server is stopping; ask another one"))
        grant, self._grant = self._grant, None
        for one in [*self._older, *([] if grant is None else [grant])]:
            self._end(one)
        if grant is not None:
            # A pin that stays behind expires; what a lost call writes later does, too.
            with contextlib.suppress(LakebusError, TimeoutError):
                async with asyncio.timeout(self._settings.call_s):
                    await self._upkeep.release_pin(grant.pin_id)

    async def check(self) -> None:
        """Raises Unavailable while queries cannot be answered for want of a pin."""

        if not self._valid():
            raise Unavailable("this server holds no pin on the lake's files", retry_after_s=1.0)

    @property
    def floor(self) -> int | None:
        """Every snapshot from here on is held without a call. None: there is no pin now."""

        return self._grant.proposal.floor if self._grant is not None and self._valid() else None

    @property
    def held(self) -> int:
        grants = [*self._older, *([] if self._grant is None else [self._grant])]
        return sum(len(grant.holds) for grant in grants)

    # --- holds ------------------------------------------------------------------------------

    async def hold(self, snapshot_id: int, *, onward: bool = False) -> Hold:
        """See `Pins`. At once when what was granted covers it, otherwise after one call."""

        want = (snapshot_id, onward)
        found = self._at_once(want)
        if found is not None:
            return found
        if self._task is None:
            raise Unavailable("this server is not reading now; ask another one", retry_after_s=1.0)
        asked: asyncio.Future[Hold] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(want, []).append(asked)
        self._asked.set()
        try:
            return await asked
        except asyncio.CancelledError:
            # Granted in the very moment in which the caller left.
            if asked.done() and not asked.cancelled() and asked.exception() is None:
                asked.result().release()
            raise

    def _valid(self) -> bool:
        return self._grant is not None and self._clock.monotonic_s() < self._grant.stops_s

    def _at_once(self, want: Want) -> Hold | None:
        grant, asking = self._grant, self._asking
        if grant is None or not grant.covers(want):
            return None
        if asking is not None and not asking.covers(want):
            return None
        if self._clock.monotonic_s() >= grant.stops_s:
            return None
        return Hold(want, grant, self._clock)

    # --- the one task -----------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            self._asked.clear()
            try:
                await self._turn()
            except Exception as error:  # noqa: BLE001 (a bug of a backend must not end the pins)
                _log.warning("the pin cannot be renewed: %r", error)
                self._refuse_waiting(_unavailable(error))
            pause_s = self._settings.renew_s * (0.8 + 0.2 * self._chance.jitter())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._asked.wait()

    async def _turn(self) -> None:
        """One renewal, and the answer to everybody who waits."""

        if self._grant is not None and not self._valid():
            self._end(self._grant)
            self._grant = None
        head = await self._head()
        wanted = set(self._waiting)
        begun = self._grant is None
        if begun:
            await self._begin(head)
        else:
            self._hear(head)
        if not begun or any(snapshot_id < head.snapshot_id for snapshot_id, _ in wanted):
            try:
                await self._ask(wanted)
            except _REFUSED:
                await self._sort_out(head, wanted)
        for want in wanted:
            self._answer(want)

    def _hear(self, head: Head) -> None:
        """The floor follows the head a renewal later, also when calls come closer together."""

        now_s = self._clock.monotonic_s()
        if now_s - self._heard_s >= self._settings.renew_s / 2:
            self._next_floor, self._heard_head, self._heard_s = (
                self._heard_head,
                head.snapshot_id,
                now_s,
            )

    async def _begin(self, head: Head) -> None:
        """A row of its own for a process that has none: everything from the head on."""

        self._next_floor = self._heard_head = head.snapshot_id
        self._heard_s = self._clock.monotonic_s()
        await self._call(self._chance.new_uuid(), Proposal(head.snapshot_id))

    async def _sort_out(self, head: Head, wanted: set[Want]) -> None:
        """Something was refused: what we have, or what somebody waits for?"""

        try:
            await self._ask(())
        except _REFUSED:
            await self._begin_again(head)
        for want in sorted(wanted):
            try:
                await self._ask((want,))
            except _REFUSED as error:
                for waiter in self._waiting.pop(want, ()):
                    if not waiter.done():
                        waiter.set_exception(error)
            else:
                self._answer(want)  # before the next call leaves it out

    async def _begin_again(self, head: Head) -> None:
        """The row we ask for is refused. After a lost answer it is a new row, which cannot take
        over what only the old one protects. Otherwise the old row is not there any more, whatever
        our clock says, and nothing that relies on it may go on."""

        refused, self._grant = self._grant, None
        if refused is not None:
            if refused.doubts:
                self._older.append(refused)
            else:
                self._end(refused)
        await self._begin(head)
        fresh = self._grant
        if refused is not None and fresh is not None:
            for hold in [one for one in refused.holds if fresh.covers(one.want)]:
                hold.move(fresh)

    async def _ask(self, extra: Collection[Want]) -> None:
        """Renews, with `extra` beside the holds. Raises a refusal, and then nothing has changed."""

        grant = self._grant
        if grant is None:
            raise Unavailable("this server holds no pin on the lake's files")
        used = {hold.want for hold in grant.holds}
        onwards = [s for s, onward in used.union(extra) if onward]
        above = [s for s, _ in used if s >= grant.proposal.floor]
        floor = min([self._next_floor, *onwards, *above])
        named = frozenset(s for s, _ in used.union(extra) if s < floor)
        pin_id = self._chance.new_uuid() if grant.doubts else grant.pin_id
        await self._call(pin_id, Proposal(floor, named))

    async def _call(self, pin_id: uuid.UUID, proposal: Proposal) -> None:
        settings, grant = self._settings, self._grant
        self._asking = proposal
        sent_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(settings.call_s):
                await self._upkeep.pin(
                    pin_id,
                    kind="reader",
                    floor=proposal.floor,
                    snapshot_ids=sorted(proposal.snapshot_ids),
                    ttl_s=settings.ttl_s,
                    note=self._note,
                )
        except _REFUSED:
            raise
        except Exception as error:
            # Whatever the error says: that nothing happened is not relied on.
            if grant is not None and grant.pin_id == pin_id:
                grant.doubts.append(proposal)
            raise _unavailable(error) from error
        finally:
            self._asking = None
        self._accept(pin_id, proposal, sent_s + settings.ttl_s - settings.margin_s)

    def _accept(self, pin_id: uuid.UUID, proposal: Proposal, stops_s: float) -> None:
        grant = self._grant
        if grant is not None and grant.pin_id == pin_id:
            grant.proposal, grant.stops_s = proposal, stops_s
            return
        fresh = Grant(pin_id, proposal, stops_s)
        self._grant = fresh
        self._watch(fresh)
        if grant is not None:
            for hold in list(grant.holds):
                hold.move(fresh)
            self._end(grant)

    # --- answers and ends -------------------------------------------------------------------

    def _answer(self, want: Want) -> None:
        for waiter in self._waiting.pop(want, ()):
            if waiter.done():
                continue
            hold = self._at_once(want)
            if hold is None:  # the call took so long that what it granted is over
                waiter.set_exception(_unavailable(None))
            else:
                waiter.set_result(hold)

    def _refuse_waiting(self, error: Unavailable) -> None:
        waiting, self._waiting = self._waiting, {}
        for waiter in [one for group in waiting.values() for one in group]:
            if not waiter.done():
                waiter.set_exception(error)

    def _watch(self, grant: Grant) -> None:
        """Breaks what relies on a row when its time is over, also while no call is answered."""

        left_s = grant.stops_s - self._clock.monotonic_s()
        if left_s <= 0:
            self._end(grant)
            return
        loop = asyncio.get_running_loop()
        grant.timer = loop.call_later(max(left_s, _TIMER_MIN_S), self._watch, grant)

    def _end(self, grant: Grant) -> None:
        if grant.timer is not None:
            grant.timer.cancel()
        grant.stops_s = -math.inf
        if grant in self._older:
            self._older.remove(grant)
        if grant.holds:
            _log.warning("%d queries lose their claim on files and are stopped", len(grant.holds))
        for hold in list(grant.holds):
            hold.break_now()


def _unavailable(error: BaseException | None) -> Unavailable:
    detail = error.detail if isinstance(error, LakebusError) else "the catalog did not answer"
    return Unavailable(detail, retry_after_s=1.0)
