"""The wait for a token: coverage, or one of four named ends, never a hang (contract D4-D6).

The order of the questions is what makes the answers right:

1. decode and map every token to the current history, then merge them;
2. read the head (a read that starts after the request came, D2);
3. only what the head does not cover can be ahead of everything: a floor above that head is unknown;
   a position is compared with the authoritative ends, read in this request (D5), unless ends read
   before already reach it (ends never go back within a history). The wait starts at the same time,
   because the usual token is a fresh receipt that will be covered soon;
4. when a head covers the token, and not before, ask whether one of its own entries was quarantined:
   the verdict commits together with the coverage (C1).

An already covered token costs the head read, and nothing more once its own entries are known to be
clean; the first time, their check runs beside the head read when an older head covers them already.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lakebus.clock import Clock, SystemClock
from lakebus.errors import TokenUnknown, Unavailable
from lakebus.tokens import TokenCodec, VisibilityToken, merge_all
from storage.bus.interface import IngestBus
from storage.catalog.interface import Catalog, Head, LakeIdentity
from storage.reading.history import map_token
from storage.reading.own_entries import OwnEntries
from storage.reading.shared_read import SharedRead
from storage.reading.watcher import HeadWatcher, HistoryChanged, visibility_timeout

_Result = TypeVar("_Result")

#: The longest that a silent bus delays a wait that does not need its answer.
_ENDS_S = 1.0

AnyToken = str | VisibilityToken


@dataclass(frozen=True, slots=True)
class Covered:
    """`head` covers `token`, the merged and mapped demand (None when none was made). `now` is the
    database's clock during the request, also when `head` was read before it."""

    head: Head
    token: VisibilityToken | None
    waited_ms: float
    now: dt.datetime


class Barrier:
    """One per process. `codec` and the identity are the lake's; deadlines are monotonic seconds of
    `clock`, which must be the watcher's."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        bus: IngestBus,
        watcher: HeadWatcher,
        codec: TokenCodec,
        clock: Clock | None = None,
    ) -> None:
        self._watcher = watcher
        self._codec = codec
        self._clock = clock or SystemClock()
        self._own = OwnEntries(bus)
        self._ends: SharedRead[Mapping[int, int]] = SharedRead(
            bus.ends, read_s=_ENDS_S, what="the bus"
        )
        self._known_ends: dict[int, int] = {}
        self._line: uuid.UUID | None = None
        self._identity: LakeIdentity | None = None
        self._identities: SharedRead[LakeIdentity] = SharedRead(catalog.identity)

    async def close(self) -> None:
        await self._own.close()
        await self._ends.close()
        await self._identities.close()

    def decode(self, tokens: Sequence[AnyToken]) -> list[VisibilityToken]:
        """Raises MalformedToken for text that this lake did not sign."""

        return [self._codec.decode(t) if isinstance(t, str) else t for t in tokens]

    async def wait_for(
        self,
        tokens: Sequence[AnyToken] = (),
        *,
        deadline_s: float,
        staleness_s: float = 0.0,
    ) -> Covered:
        """Waits until a snapshot covers all tokens and returns the head that does.

        Without tokens: the newest snapshot. `staleness_s` allows a head whose read started at most
        so long ago, if it covers the tokens. Raises MalformedToken, TokenUnknown, TokenHistoryLost,
        Quarantined, VisibilityTimeout (`waited_ms`), Unavailable, HistoryRewound.
        """

        started_s = self._clock.monotonic_s()
        decoded = self.decode(tokens)
        recent = self._watcher.head_within(staleness_s) if staleness_s > 0 else None
        async with self.ends_by(deadline_s):
            if not decoded:
                head = recent or await self._watcher.fresh_head()
                return self._covered(head, None, started_s)
            while True:
                try:
                    head, token = await self._cover(decoded, deadline_s, recent)
                except HistoryChanged:
                    recent = None  # a new line began meanwhile: map and judge the tokens again
                    continue
                return self._covered(head, token, started_s)

    async def head_and_demand(
        self, tokens: Sequence[AnyToken]
    ) -> tuple[Head, VisibilityToken | None]:
        """A fresh head, and the tokens mapped to its history and merged (D6), without a wait.

        Raises MalformedToken, TokenHistoryLost, Unavailable, HistoryRewound.
        """

        decoded = self.decode(tokens)
        while True:
            head = await self._watcher.fresh_head()
            if not decoded:
                return head, None
            with contextlib.suppress(HistoryChanged):
                return head, await self._merge(decoded, head)

    async def refuse_unknown(self, token: VisibilityToken, head: Head) -> None:
        """Raises TokenUnknown when the token asks for more than exists. `head` was read in this
        request; the ends are read now unless they are known to reach far enough (D5)."""

        if token.floor > head.snapshot_id:
            raise _unknown()
        if self._known_to_exist(token, head):
            return
        ends = await self._ends.fresh()
        for shard, end in ends.items():
            self._known_ends[shard] = max(end, self._known_ends.get(shard, 0))
        if any(
            position > max(ends.get(shard, 0), head.watermark.get(shard, 0))
            for shard, position in token.positions.items()
        ):
            raise _unknown()

    async def refuse_quarantined(self, token: VisibilityToken) -> None:
        """Raises Quarantined. A snapshot published before this call must cover the token."""

        await self._own.refuse_quarantined(token.own)

    @contextlib.asynccontextmanager
    async def ends_by(self, deadline_s: float) -> AsyncIterator[None]:
        """Ends what runs inside with VisibilityTimeout at the deadline, whatever it waits for."""

        started_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(max(0.0, deadline_s - started_s)):
                yield
        except TimeoutError as error:
            raise visibility_timeout(self._since_ms(started_s)) from error

    async def _cover(
        self, tokens: Sequence[VisibilityToken], deadline_s: float, recent: Head | None
    ) -> tuple[Head, VisibilityToken]:
        early = recent or self._watcher.current
        if early is not None and all(t.history == early.history for t in tokens):
            token = _merged(tokens)
            if token.covered_by(early.snapshot_id, early.watermark):
                head = await self._head_and_verdict(token, recent)
                if head.history == early.history:
                    return head, token
        head = await self._watcher.fresh_head()
        token = await self._merge(tokens, head)
        if not token.covered_by(head.snapshot_id, head.watermark):
            head = await self._wait(token, head, deadline_s)
        await self.refuse_quarantined(token)
        return head, token

    async def _head_and_verdict(self, token: VisibilityToken, recent: Head | None) -> Head:
        """A fresh head (or the recent one), the quarantine asked at the same time where needed."""

        if self._own.known_clean(token.own):
            return recent or await self._watcher.fresh_head()
        if recent is not None:
            await self.refuse_quarantined(token)
            return recent
        verdict = asyncio.ensure_future(self.refuse_quarantined(token))
        try:
            head = await self._watcher.fresh_head()
            await verdict
        finally:
            await _ended(verdict)
        return head

    async def _wait(self, token: VisibilityToken, head: Head, deadline_s: float) -> Head:
        """Waits for coverage, once it is known that there is something to wait for.

        A head that covers the token and comes during the question is not missed: the wait begins
        by looking at the newest one.
        """

        # With the bus out of reach, only coverage or the deadline can tell.
        with contextlib.suppress(Unavailable):
            await self.refuse_unknown(token, head)
        return await self._watcher.wait_until_covered(token, deadline_s=deadline_s)

    def _known_to_exist(self, token: VisibilityToken, head: Head) -> bool:
        known = self._known_ends
        return all(
            position <= head.watermark.get(shard, 0) or position <= known.get(shard, 0)
            for shard, position in token.positions.items()
        )

    async def _merge(self, tokens: Sequence[VisibilityToken], head: Head) -> VisibilityToken:
        if head.history != self._line:
            self._line = head.history
            self._known_ends.clear()
            self._own.forget()
        if any(token.history != head.history for token in tokens):
            if self._identity is None or self._identity.history != head.history:
                self._identity = await self._identities.fresh()
            if self._identity.history != head.history:
                raise HistoryChanged()
            path = self._identity.histories
            tokens = [map_token(t, path=path, shards=head.watermark) for t in tokens]
        return _merged(tokens)

    def _covered(self, head: Head, token: VisibilityToken | None, started_s: float) -> Covered:
        return Covered(head, token, self._since_ms(started_s), self._watcher.database_time(head))

    def _since_ms(self, started_s: float) -> float:
        return (self._clock.monotonic_s() - started_s) * 1000


def _merged(tokens: Sequence[VisibilityToken]) -> VisibilityToken:
    merged = merge_all(tokens)
    assert merged is not None, "there is at least one token"
    return merged


async def _ended(work: asyncio.Future[_Result]) -> None:
    """Cancels work that is not needed any more and waits until it has ended."""

    if not work.done():
        work.cancel()
        await asyncio.wait((work,))
    if not work.cancelled():
        work.exception()  # seen: the caller has its answer, or another failure, already


def _unknown() -> TokenUnknown:
    return TokenUnknown(
        "the token asks for more than was ever written here: it comes from another lake or from "
        "a server that lost data; ask the sender for a new one"
    )
