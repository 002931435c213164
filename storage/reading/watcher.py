"""The head of the lake as one process sees it: one watcher, however many wait.

What is authoritative: the head row, read anew. A wake-up from outside (LISTEN) only says "look
now"; one that is lost costs at most one poll interval, one too many costs a read. Nothing here
holds a transaction or a connection while somebody waits (contract D4).

Why an answer is never stale (D2): `fresh_head` gives a head whose read started after the caller
asked. Why nobody hangs: every wait has a deadline of its own on the loop's clock, which needs
neither the catalog nor the background task. Why a failing catalog does not end a wait: the
background task reads again after each failure, and only the deadline gives up.

A process that nobody asks follows slowly: where publications come many times a second, reading each
of them in every process cost as much as answering. Who asks reads for himself, who waits ends the
rest, and whoever asked lately finds everything read ahead.

A head older than one that this process has read before is a catalog that went back in time
(a fail-over to a lagging standby, a restored volume); it is refused as `history_rewound` (F4).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import AsyncIterator, Callable

from lakebus.clock import SYSTEM_CHANCE, Chance, Clock, SystemClock
from lakebus.errors import HistoryRewound, LakebusError, Unavailable, VisibilityTimeout
from lakebus.tokens import VisibilityToken
from storage.catalog.interface import Catalog, Head
from storage.reading.shared_read import SharedRead
from storage.reading.waiters import Waiter, WaitingRoom

_log = logging.getLogger(__name__)

WakeUps = Callable[[], AsyncIterator[None]]

#: So long after somebody asked for the head, wake-ups are followed at once.
_ACTIVE_S = 1.5


class HistoryChanged(Exception):
    """Internal: a new line of history began while somebody waited; tokens are mapped again."""


def visibility_timeout(waited_ms: float) -> VisibilityTimeout:
    return VisibilityTimeout(
        "no snapshot was known to cover the token in time; what it names is stored: ask again "
        "with the same token, or with a longer timeout_ms",
        waited_ms=round(waited_ms),
    )


class HeadWatcher:
    """`listen` gives wake-ups for ever (see `postgres_listener`); without it the poll does all.

    `on_head` is called with every newer head, so that others can prepare for it (the manifest).
    `idle_s` is the least time between two reads that only wake-ups ask for. `refuse` raises
    HistoryRewound while the catalog must not be served.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        listen: WakeUps | None = None,
        poll_s: float = 0.25,
        idle_s: float = 1.0,
        read_s: float = 5.0,
        clock: Clock | None = None,
        on_head: Callable[[Head], None] | None = None,
        chance: Chance = SYSTEM_CHANCE,
        refuse: Callable[[], None] | None = None,
    ) -> None:
        self._chance = chance
        self._refuse = refuse
        self._catalog = catalog
        self._listen = listen
        self._poll_s = poll_s
        self._idle_s = idle_s
        self._clock = clock or SystemClock()
        self._on_head = on_head
        self._head: Head | None = None
        self._read_started_s = self._head_read_s = float("-inf")
        self._room = WaitingRoom()
        self._reads: SharedRead[Head] = SharedRead(self._read_head, read_s=read_s)
        self._look = asyncio.Event()
        self._asked = asyncio.Event()
        self._asked_s = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def current(self) -> Head | None:
        """The newest head read so far; it may be stale. None before the first read."""

        return self._head

    @property
    def waiting(self) -> int:
        return len(self._room)

    def head_within(self, staleness_s: float) -> Head | None:
        """The newest head, if the read that last confirmed it started at most so long ago.

        Raises what `refuse` raises: of a catalog that went back in time not even an old head is
        given.
        """

        if self._refuse is not None:
            self._refuse()
        if self._clock.monotonic_s() - self._read_started_s > staleness_s:
            return None
        return self._head

    def database_time(self, head: Head) -> dt.datetime:
        """The database's clock now, told from `head` by this process's monotonic clock. For a head
        that was just read it is the head's own time; a step of the clock does not enter."""

        if head is not self._head:
            return head.now
        passed_s = max(0.0, self._clock.monotonic_s() - self._head_read_s)
        return head.now + dt.timedelta(seconds=passed_s)

    def start(self) -> None:
        """Starts polling and listening on the running loop. Waits work only after this."""

        if self._tasks:
            return
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._watch(), name="head watcher"))
        if self._listen is not None:
            self._tasks.append(loop.create_task(self._hear(self._listen), name="head listener"))

    async def stop(self) -> None:
        """Ends the background tasks; who still waits gets Unavailable."""

        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reads.close()
        self._room.wake_all(Unavailable("this server is stopping; ask another one"))

    async def fresh_head(self) -> Head:
        """A head at least as new as the newest snapshot committed before this call (D2).

        Raises Unavailable when the catalog cannot say, HistoryRewound when it went back in time.
        """

        self._note_asked()
        return await self._reads.fresh()

    async def wait_until_covered(self, token: VisibilityToken, *, deadline_s: float) -> Head:
        """The first head seen that covers `token`, which is of the current history.

        `deadline_s` is on the clock's monotonic scale. Raises VisibilityTimeout at the deadline,
        HistoryChanged when a new line of history has begun or begins meanwhile.
        """

        head = self._head
        if head is None:
            head = await self.fresh_head()
        if head.history != token.history:
            # Its numbers go on above the lost ones, so it would seem to cover everything.
            raise HistoryChanged()
        loop = asyncio.get_running_loop()
        waiter = Waiter(token, loop.create_future())
        if not self._room.enter(waiter, head):
            return head
        started_s = self._clock.monotonic_s()
        self._note_asked()
        polling = self._begin_polling() if len(self._room) == 1 else None
        timer = loop.call_later(max(0.0, deadline_s - started_s), self._give_up, waiter, started_s)
        try:
            return await waiter.future
        finally:
            timer.cancel()
            self._room.leave(waiter)
            if polling is not None and not len(self._room):
                polling.cancel()

    def _give_up(self, waiter: Waiter, started_s: float) -> None:
        if waiter.future.done():
            return
        waited_ms = (self._clock.monotonic_s() - started_s) * 1000
        waiter.future.set_exception(visibility_timeout(waited_ms))

    async def _read_head(self) -> Head:
        before = self._head
        started_s = self._clock.monotonic_s()
        head = await self._catalog.head()
        if before is not None and head.snapshot_id < before.snapshot_id:
            raise HistoryRewound(
                f"the catalog shows snapshot {head.snapshot_id} as its newest and has shown "
                f"{before.snapshot_id} before; an operator must look at the database"
            )
        return self._accept(head, started_s)

    def _accept(self, head: Head, started_s: float) -> Head:
        self._read_started_s = max(self._read_started_s, started_s)
        known = self._head
        if known is not None and (head.snapshot_id, head.now) <= (known.snapshot_id, known.now):
            return known
        self._head, self._head_read_s = head, self._clock.monotonic_s()
        if known is not None and known.history != head.history:
            self._room.wake_all(HistoryChanged())
        if known is None or known.snapshot_id != head.snapshot_id:
            self._room.advance(head)
            if self._on_head is not None:
                self._on_head(head)
        return head

    def _begin_polling(self) -> asyncio.TimerHandle | None:
        """Wakes the watcher out of its idle state, in which it does not poll: at once when it hears
        of nothing, and else when a wake-up would have come by now."""

        if self._listen is None:
            self._look.set()
            return None
        return asyncio.get_running_loop().call_later(self._poll_s, self._look.set)

    def _note_asked(self) -> None:
        self._asked_s = self._clock.monotonic_s()
        self._asked.set()

    async def _rest(self) -> None:
        """Lets wake-ups gather while nobody asks and nobody waits."""

        now_s = self._clock.monotonic_s()
        if len(self._room) or now_s - self._asked_s < _ACTIVE_S:
            return
        rest_s = min(self._read_started_s + self._idle_s - now_s, self._idle_s)
        if rest_s > 0:
            self._asked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._asked.wait()

    async def _watch(self) -> None:
        while True:
            try:
                # With nobody waiting there is nothing to poll for: requests read for themselves.
                async with asyncio.timeout(self._poll_s if len(self._room) else None):
                    await self._look.wait()
            except TimeoutError:
                pass
            await self._rest()
            self._look.clear()
            try:
                await self._reads.fresh()
            except HistoryRewound as error:
                # Nothing will be covered before an operator has decided.
                self._room.wake_all(error)
                await self._pause()
            except LakebusError as error:
                _log.warning("the head cannot be read: %s", error)
                await self._pause()
            except Exception:  # noqa: BLE001 (a bug of a backend must not end every later wait)
                _log.exception("reading the head failed")
                await self._pause()

    async def _pause(self) -> None:
        # The waiters keep their deadlines; jitter keeps many replicas apart.
        await asyncio.sleep(self._poll_s * (0.5 + self._chance.jitter() / 2))
        if len(self._room):
            self._look.set()

    async def _hear(self, listen: WakeUps) -> None:
        async for _ in listen():
            self._look.set()
