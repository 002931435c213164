"""Which snapshot a request reads: the newest that covers its tokens, or one fixed by id or time.

A fixed snapshot never waits for a token: it covers it or the request is a conflict at once (D7).
Every way of not finding a snapshot keeps its own error (D2): the catalog tells them apart. What is
remembered here cannot go wrong: a snapshot never changes, and a closed time means one snapshot for
ever (C4). Whether it may still be read is asked anew in each request: at or above the head's oldest
snapshot it is retained; below it only a tag can have kept it, and the catalog is asked.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lakebus.clock import Clock, SystemClock, parse_time
from lakebus.errors import MalformedRequest, SnapshotNotFound, TokenNotCovered
from lakebus.snapshots import Snapshot
from lakebus.tokens import VisibilityToken
from storage.catalog.interface import Catalog, Head
from storage.reading.barrier import AnyToken, Barrier

SNAPSHOT_ID_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SnapshotChoice:
    """At most one is set; neither: the newest."""

    snapshot_id: int | None = None
    time: dt.datetime | None = None

    @property
    def fixed(self) -> bool:
        return self.snapshot_id is not None or self.time is not None


LATEST = SnapshotChoice()


def parse_choice(value: object) -> SnapshotChoice:
    """Reads `"latest"`, `{"id": n}` or `{"timestamp": "…"}`. Raises MalformedRequest."""

    if value is None or value == "latest":
        return LATEST
    if isinstance(value, dict) and len(value) == 1:
        if "id" in value:
            return SnapshotChoice(snapshot_id=_snapshot_id(value["id"]))
        if "timestamp" in value:
            return SnapshotChoice(time=_time(value["timestamp"]))
    raise MalformedRequest(
        'snapshot must be "latest", {"id": 12} or {"timestamp": "2026-01-31T12:00:00Z"}'
    )


def _snapshot_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise MalformedRequest('the id of a snapshot is a whole number, like {"id": 12}')
    if not 0 <= value <= SNAPSHOT_ID_MAX:
        raise SnapshotNotFound(f"there is no snapshot {str(value)[:40]}")
    return value


def _time(value: object) -> dt.datetime:
    if not isinstance(value, str):
        raise MalformedRequest('the timestamp of a snapshot is text like "2026-01-31T12:00:00Z"')
    try:
        return parse_time(value)
    except (ValueError, OverflowError) as error:
        raise MalformedRequest(f"the timestamp {value[:60]!r} is not usable: {error}") from error


@dataclass(frozen=True, slots=True)
class Resolved:
    """The snapshot that a request reads.

    `head` was established in this request. `token` is what its answer carries: the snapshot as
    floor (D6), which says all that the demand said, because the snapshot covers it. `started_at` is
    the database's clock in this request.
    """

    snapshot_id: int
    published_at: dt.datetime
    history: uuid.UUID
    watermark: Mapping[int, int]
    head: Head
    token: VisibilityToken
    waited_ms: float
    started_at: dt.datetime


class Resolver:
    """One per process; remembers up to `remembered_max` snapshots by id and as many times."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        barrier: Barrier,
        clock: Clock | None = None,
        remembered_max: int = 10_000,
    ) -> None:
        self._catalog = catalog
        self._barrier = barrier
        self._clock = clock or SystemClock()
        self._remembered_max = remembered_max
        self._line: uuid.UUID | None = None
        self._by_id: OrderedDict[int, Snapshot] = OrderedDict()
        self._by_time: OrderedDict[dt.datetime, int] = OrderedDict()

    async def resolve(
        self,
        choice: SnapshotChoice = LATEST,
        *,
        tokens: Sequence[AnyToken] = (),
        deadline_s: float,
        staleness_s: float = 0.0,
    ) -> Resolved:
        """The snapshot to read. Raises what `Barrier.wait_for` raises, and for a fixed snapshot
        SnapshotNotFound, SnapshotExpired, HistoryLost, TimeInFuture, TokenNotCovered."""

        started_s = self._clock.monotonic_s()
        if not choice.fixed:
            covered = await self._barrier.wait_for(
                tokens, deadline_s=deadline_s, staleness_s=staleness_s
            )
            head = covered.head
            return Resolved(
                head.snapshot_id,
                head.published_at,
                head.history,
                head.watermark,
                head,
                VisibilityToken(head.history, head.snapshot_id),
                covered.waited_ms,
                covered.now,
            )
        async with self._barrier.ends_by(deadline_s):
            head, demand = await self._barrier.head_and_demand(tokens)
            snapshot = await self.fixed(choice, head=head)
            if demand is not None:
                await self._refuse_uncovered(demand, snapshot, head)
        return Resolved(
            snapshot.snapshot_id,
            snapshot.published_at,
            snapshot.history,
            snapshot.watermark,
            head,
            VisibilityToken(head.history, snapshot.snapshot_id),
            (self._clock.monotonic_s() - started_s) * 1000,
            head.now,
        )

    async def elsewhere(self, choice: SnapshotChoice, *, head: Head, deadline_s: float) -> Snapshot:
        """The snapshot of an AT, in a request that has established `head`. Raises as `resolve` does
        for a fixed one, and VisibilityTimeout while its time is not closed."""

        async with self._barrier.ends_by(deadline_s):
            return await self.fixed(choice, head=head)

    async def fixed(self, choice: SnapshotChoice, *, head: Head) -> Snapshot:
        """The snapshot of an id or a time, retained when `head` was read or later."""

        if head.history != self._line:
            self._line = head.history
            self._by_id.clear()
            self._by_time.clear()
        snapshot_id = choice.snapshot_id
        if choice.time is not None:
            snapshot_id = self._by_time.get(choice.time)
        if snapshot_id is not None and snapshot_id >= head.oldest_snapshot_id:
            known = self._by_id.get(snapshot_id)
            if known is not None:
                self._by_id.move_to_end(snapshot_id)
                return known
        if choice.time is not None:
            snapshot = await self._catalog.snapshot_at(choice.time)
            self._by_time[choice.time] = snapshot.snapshot_id
            if len(self._by_time) > self._remembered_max:
                self._by_time.popitem(last=False)
        else:
            assert snapshot_id is not None
            snapshot = await self._catalog.snapshot(snapshot_id)
        self._by_id[snapshot.snapshot_id] = snapshot
        if len(self._by_id) > self._remembered_max:
            self._by_id.popitem(last=False)
        return snapshot

    async def _refuse_uncovered(
        self, demand: VisibilityToken, snapshot: Snapshot, head: Head
    ) -> None:
        if demand.covered_by(snapshot.snapshot_id, snapshot.watermark):
            await self._barrier.refuse_quarantined(demand)
            return
        await self._barrier.refuse_unknown(demand, head)
        raise TokenNotCovered(
            f"snapshot {snapshot.snapshot_id} is older than what the token asks for: leave the "
            "token out, or read a later snapshot",
            snapshot_id=snapshot.snapshot_id,
        )
