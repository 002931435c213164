"""The clients of the workload: writers, readers, and the probe that measures recovery.

Each works through a random sequence of its own, drawn from (seed, process, client). What it sends
does not depend on what it was told, but for retries: a write with a key is sent again until its
outcome is known, a write without a key is never sent again once it may have been stored.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lakebus.clock import format_time, parse_time
from tests.chaos import source
from tests.chaos.answers import Says
from tests.chaos.session import Outcome, Session
from tests.history.record import Ingest, Read, Status, Token, Wait

_PATIENCE_S = 150.0
_RETRY_S = (0.03, 0.1, 0.2, 0.4)
#: What is worth another attempt; everything else is a verdict about the request.
AGAIN = frozenset(
    {"unavailable", "backpressure", "rate_limited", "visibility_timeout", "outcome_unknown"}
)
_KNOWN_MAX = 256
_WINDOW = 200


@dataclass(frozen=True, slots=True)
class Written:
    """A logical request with a key that has its receipt."""

    operation: Ingest
    token: str


@dataclass(slots=True)
class Known:
    """What the clients of one process tell each other."""

    numbers: Callable[[], int]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    written: deque[Written] = field(default_factory=lambda: deque(maxlen=_KNOWN_MAX))
    tokens: deque[str] = field(default_factory=lambda: deque(maxlen=_KNOWN_MAX))
    snapshots: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_KNOWN_MAX))
    batches: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=_KNOWN_MAX))
    newest: int = 0

    def number(self) -> int:
        """The number of a new request, unique over all processes."""
        self.newest = self.numbers()
        return self.newest

    async def pause(self, seconds: float) -> None:
        """Sleeps, but not beyond the end of the run."""
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return


@dataclass(frozen=True, slots=True)
class Pace:
    """Pause between the operations of one client."""

    low_s: float = 0.02
    high_s: float = 0.12


class Writer:
    """Sends rows: one table or several, with a key or without, in every encoding; replays, and
    other rows under a used key."""

    def __init__(
        self,
        session: Session,
        known: Known,
        *,
        randomness: random.Random,
        pace: Pace,
        clock_skew_s: float,
    ) -> None:
        self._session = session
        self._known = known
        self._random = randomness
        self._pace = pace
        self._skew = dt.timedelta(seconds=clock_skew_s)

    async def run(self) -> None:
        while not self._known.stopping.is_set():
            chance = self._random.random()
            earlier = self._earlier() if chance < 0.19 else None
            if earlier is None:
                await self._write(self._new_request())
            elif chance < 0.14:
                await self._replay(earlier)
            else:
                await self._conflict(earlier)
            await self._known.pause(self._random.uniform(self._pace.low_s, self._pace.high_s))
        self._session.close()

    def _earlier(self) -> Written | None:
        """A request of our own principal that has its receipt: keys are a principal's own."""
        mine = self._session.place.principal
        own = [one for one in self._known.written if one.operation.principal == mine]
        return self._random.choice(own) if own else None

    def _new_request(self) -> Ingest:
        draw, number = self._random, self._known.number()
        several = draw.random() < 0.25
        tables = draw.sample(source.TABLES, draw.choice((2, 3)) if several else 1)
        large = draw.random() < 0.03
        counts = {
            table: draw.randint(400, 900) if large else draw.randint(1, 12) for table in tables
        }
        return Ingest(
            request=number,
            principal=self._session.place.principal,
            target="*" if several else tables[0],
            tables=counts,
            key=None if draw.random() < 0.15 else f"key-{number}",
            ordering_key=self._session.name if draw.random() < 0.5 else None,
            bad_rows=draw.randint(1, 2) if draw.random() < 0.03 and not several else 0,
            wait="visible" if draw.random() < 0.12 else "durable",
        )

    async def _write(self, first: Ingest) -> None:
        began = format_time(dt.datetime.now(dt.UTC) + self._skew)
        stated = self._random.random() < 0.5
        deadline_s = time.monotonic() + _PATIENCE_S
        attempt = 1
        while True:
            headers, body = self._encoded(first, variant=0)
            if stated:
                headers = {**headers, "Idempotency-Not-Before": began}
            operation = _attempt(first, attempt)
            outcome = await self._session.ingest(operation, headers=headers, body=body)
            if outcome.ok:
                self._remember(first, outcome)
                return
            if not _may_repeat(first, outcome) or time.monotonic() > deadline_s:
                return
            if self._known.stopping.is_set() and attempt > 40:
                return
            await asyncio.sleep(_RETRY_S[min(attempt - 1, len(_RETRY_S) - 1)])
            attempt += 1

    async def _replay(self, earlier: Written) -> None:
        """The same request again, in another encoding: the same receipt."""
        headers, body = self._encoded(earlier.operation, variant=0)
        await self._session.ingest(_attempt(earlier.operation, 100), headers=headers, body=body)

    async def _conflict(self, earlier: Written) -> None:
        """Other rows under the same key: a conflict, and nothing stored."""
        headers, body = self._encoded(earlier.operation, variant=1)
        operation = _attempt(earlier.operation, 100, variant=1)
        await self._session.ingest(operation, headers=headers, body=body)

    def _encoded(self, operation: Ingest, *, variant: int) -> source.Encoded:
        rows = {
            table: source.full_rows(operation.request, table, count, variant=variant)
            for table, count in operation.tables.items()
        }
        if operation.target == "*":
            return source.several_tables(rows)
        (only,) = rows.values()
        if operation.bad_rows:
            return source.as_json(
                [*only, *[source.bad_row(operation.request)] * operation.bad_rows]
            )
        return self._random.choice(source.ENCODINGS)(only)

    def _remember(self, operation: Ingest, outcome: Outcome) -> None:
        receipt = outcome.answer["receipt"]
        known = self._known
        known.tokens.append(receipt["visibility_token"])
        known.batches.append((operation.principal, receipt["batch_id"]))
        if operation.key is not None:
            known.written.append(Written(operation, receipt["visibility_token"]))


class Reader:
    """Asks: newest, with tokens of whoever wrote, at old snapshots again and again, at old times,
    relaxed; waits for tokens; asks what became of batches."""

    def __init__(
        self,
        session: Session,
        known: Known,
        *,
        randomness: random.Random,
        pace: Pace,
        whole_every_s: float = 20.0,
    ) -> None:
        self._session = session
        self._known = known
        self._random = randomness
        self._pace = pace
        self._whole_every_s = whole_every_s
        self._whole_s = time.monotonic()

    async def run(self) -> None:
        kinds: tuple[Callable[[], Awaitable[Outcome | None]], ...] = (
            self._latest, self._with_tokens, self._with_tokens, self._at_snapshot,
            self._at_snapshot, self._at_time, self._relaxed, self._wait, self._status,
        )  # fmt: skip
        while not self._known.stopping.is_set():
            outcome = await self._random.choice(kinds)()
            if outcome is not None and outcome.says in (Says.FRONT, Says.UNTYPED):
                await self._known.pause(0.2)
            await self._known.pause(self._random.uniform(self._pace.low_s, self._pace.high_s))
        self._session.close()

    async def _latest(self) -> Outcome:
        now_s = time.monotonic()
        if now_s - self._whole_s > self._whole_every_s:
            self._whole_s = now_s
            return await self._read(Read(source.TABLES))
        return await self._read(Read(self._tables(), window=self._window()))

    async def _with_tokens(self) -> Outcome | None:
        if not self._known.tokens:
            return None
        recent = list(self._known.tokens)[-20:]
        texts = self._random.sample(recent, min(len(recent), self._random.choice((1, 1, 2, 3))))
        return await self._read(
            Read(self._tables(), tokens=self._decoded(texts), window=self._window()), texts
        )

    async def _at_snapshot(self) -> Outcome | None:
        if not self._known.snapshots:
            return None
        # A few are asked again and again, others once.
        kept = list(self._known.snapshots)
        snapshot_id, _ = self._random.choice(kept[:: max(1, len(kept) // 8)])
        return await self._read(
            Read(self._tables(), snapshot_id=snapshot_id, window=self._window())
        )

    async def _at_time(self) -> Outcome | None:
        if not self._known.snapshots:
            return None
        _, at = self._random.choice(self._known.snapshots)
        moved = parse_time(at) + dt.timedelta(milliseconds=self._random.choice((0, 1, -1, 40)))
        return await self._read(
            Read(self._tables(), time=format_time(moved), window=self._window())
        )

    async def _relaxed(self) -> Outcome:
        return await self._read(Read(self._tables(), window=self._window(), max_staleness_ms=2000))

    async def _wait(self) -> Outcome | None:
        if not self._known.tokens:
            return None
        texts = [self._random.choice(self._known.tokens)]
        timeout_ms = self._random.choice((0, 500, 5000))
        return await self._session.wait(Wait(self._decoded(texts), timeout_ms), tokens=texts)

    async def _status(self) -> Outcome | None:
        mine = self._session.place.principal
        own = [batch for principal, batch in self._known.batches if principal == mine]
        if not own:
            return None
        return await self._session.status(
            Status(self._random.choice(own)), timeout_ms=self._random.choice((0, 0, 2000))
        )

    async def _read(self, operation: Read, texts: list[str] | None = None) -> Outcome:
        outcome = await self._session.read(operation, tokens=texts or ())
        if outcome.ok:
            self._known.snapshots.append(
                (outcome.answer["snapshot_id"], outcome.answer["snapshot_time"])
            )
            if self._random.random() < 0.3:
                self._known.tokens.append(outcome.answer["visibility_token"])
        return outcome

    def _tables(self) -> tuple[str, ...]:
        return tuple(self._random.sample(source.TABLES, self._random.choice((1, 2, 3))))

    def _window(self) -> tuple[int, int]:
        """Mostly the newest requests, sometimes older ones."""
        newest = self._known.newest
        if self._random.random() < 0.3:
            low = self._random.randrange(max(1, newest))
            return low, low + _WINDOW
        return max(0, newest - _WINDOW), newest + _WINDOW

    def _decoded(self, texts: list[str]) -> tuple[Token, ...]:
        return tuple(self._session.decoded(text) for text in texts)


class Probe:
    """One row in, read back by its token, without rest: when did the stack serve again?"""

    def __init__(self, session: Session, known: Known) -> None:
        self._session = session
        self._known = known

    async def run(self) -> None:
        while not self._known.stopping.is_set():
            await self._cycle()
            await self._known.pause(0.1)
        self._session.close()

    async def _cycle(self) -> None:
        number, table = self._known.number(), source.PROBE_TABLE
        first = Ingest(
            request=number,
            principal=self._session.place.principal,
            target=table,
            tables={table: 1},
            key=f"key-{number}",
        )
        headers, body = source.as_json(source.full_rows(number, table, 1))
        written = await self._until_ok(
            lambda attempt: self._session.ingest(
                _attempt(first, attempt), headers=headers, body=body, timeout_ms=4000
            )
        )
        if written is None:
            return
        text = written.answer["receipt"]["visibility_token"]
        read = Read((table,), (self._session.decoded(text),), window=(number, number + 1))
        await self._until_ok(lambda _: self._session.read(read, tokens=(text,), timeout_ms=4000))

    async def _until_ok(self, send: Callable[[int], Awaitable[Outcome]]) -> Outcome | None:
        deadline_s = time.monotonic() + _PATIENCE_S
        attempt = 1
        while True:
            outcome = await send(attempt)
            if outcome.ok:
                return outcome
            if time.monotonic() > deadline_s or (self._known.stopping.is_set() and attempt > 40):
                return None
            attempt += 1
            await asyncio.sleep(0.05 if outcome.says is Says.CODE else 0.2)


def _attempt(operation: Ingest, attempt: int, *, variant: int = 0) -> Ingest:
    return Ingest(
        request=operation.request,
        principal=operation.principal,
        target=operation.target,
        tables=operation.tables,
        key=operation.key,
        attempt=attempt,
        variant=variant,
        ordering_key=operation.ordering_key,
        bad_rows=operation.bad_rows,
        wait=operation.wait,
    )


def _may_repeat(operation: Ingest, outcome: Outcome) -> bool:
    """Only with a key, and as long as it is not known; without one each sending is a request of its
    own, because it may be stored again."""
    if operation.key is None:
        return False
    if outcome.says is Says.CODE:
        return outcome.code in AGAIN
    return True
