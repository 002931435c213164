"""The query: one time budget from arrival to the last byte, one snapshot, one answer (D1-D11).

The order: parse while the head is read, wait for the tokens, resolve the snapshot (and those that
an AT names), hold their files, find the tables in them, prune, run. What a query reads is fixed
before the engine hears of it: the engine gets files, never names it could look up again, so nothing
that is published meanwhile can reach it (D1), and what is held is deleted by nobody before the
answer's last byte (E3).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from lakebus.clock import Clock, SystemClock
from lakebus.errors import LakebusError, MalformedRequest, QueryTimeout, VisibilityTimeout
from lakebus.schemas import TableSchema
from lakebus.snapshots import Snapshot
from lakebus.tokens import TokenCodec
from storage.engine.plans import Integers, Parameters, ParsedStatement, QueryPlan, ResultFormat
from storage.reading.barrier import AnyToken
from storage.reading.holds import Pins, Unpinned
from storage.reading.listings import Listings
from storage.reading.manifest import Manifest, SnapshotView
from storage.reading.planning import Planner, ScanPlan, Visible, find_table
from storage.reading.references import erasures_of, plan_statement
from storage.reading.resolve import LATEST, Resolved, Resolver, SnapshotChoice
from storage.reading.travel import Held, choice_of, hold_all
from storage.turns import OURSELVES, Party

_Value = TypeVar("_Value")

TIMEOUT_MS_MAX = 100_000


class Answering(Protocol):
    """What a result of the engine offers: chunks, then the count."""

    columns: list[dict[str, str]]
    row_count: int | None
    statistics: dict[str, float]

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def __anext__(self) -> bytes: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """What reading needs of the SQL engine."""

    async def parse(self, sql: str) -> ParsedStatement: ...

    async def execute(self, plan: QueryPlan) -> Answering: ...


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """Limits of every answer; a request may ask for less."""

    rows_max: int = 1_000_000
    bytes_max: int = 1 << 30
    timeout_ms: int = 30_000


@dataclass(frozen=True, slots=True)
class QueryRequest:
    """`arrived_s`: when the request came, on the service's monotonic clock (default: now).
    `party`: who asks, for the engine's queue.
    `pruning` exists so that tests can show that it is never visible (D11)."""

    sql: str
    parameters: Parameters = None
    snapshot: SnapshotChoice = LATEST
    min_visibility_tokens: Sequence[AnyToken] = ()
    timeout_ms: int | None = None
    max_rows: int | None = None
    max_staleness_ms: int = 0
    deterministic: bool = False
    result_format: ResultFormat = "json"
    integers: Integers = "string"
    query_id: str = ""
    arrived_s: float | None = None
    pruning: bool = True
    party: Party = OURSELVES


@dataclass(slots=True)
class QueryAnswer:
    """An answer on its way: iterate for its chunks, then read `row_count` and `statistics()`.
    Leave with `aclose`, which stops the work."""

    query_id: str
    kind: str
    columns: list[dict[str, str]]
    snapshot_id: int
    snapshot_time: dt.datetime
    visibility_token: str
    wait_ms: float
    plan_ms: float
    files_scanned: int
    files_pruned: int
    bytes_scanned: int
    snapshots: tuple[int, ...]
    result: Answering = field(repr=False)
    hold: Held = field(repr=False)
    clock: Clock = field(repr=False)
    began_s: float = field(repr=False)
    erasures: tuple[str, ...] = ()
    ended_s: float | None = field(default=None, repr=False)
    _stopping: asyncio.Future[None] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.hold.when_broken(self._stop)

    @property
    def row_count(self) -> int | None:
        """None until the last chunk was read."""

        return self.result.row_count

    def __aiter__(self) -> QueryAnswer:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self.result.__anext__()
        except StopAsyncIteration:
            self.hold.check()
            self.hold.release()
            self.ended_s = self.ended_s or self.clock.monotonic_s()
            raise
        except LakebusError:
            self.hold.check()  # files that are gone, or a stop, because the hold broke
            raise
        self.hold.check()
        return chunk

    async def read_all(self) -> bytes:
        return b"".join([chunk async for chunk in self])

    async def aclose(self) -> None:
        try:
            await self.result.aclose()
        finally:
            self.hold.release()

    def _stop(self) -> None:
        self._stopping = asyncio.ensure_future(self.result.aclose())

    def statistics(self) -> dict[str, object]:
        """The member `statistics` of an answer; `execute_ms` is until the last byte, or now."""

        until_s = self.ended_s or self.clock.monotonic_s()
        return {
            "wait_ms": round(self.wait_ms, 3),
            "plan_ms": round(self.plan_ms, 3),
            "execute_ms": round((until_s - self.began_s) * 1000, 3),
            "files_scanned": self.files_scanned,
            "files_pruned": self.files_pruned,
            "bytes_scanned": self.bytes_scanned,
            "snapshots": list(self.snapshots),
            **({"erasures": list(self.erasures)} if self.erasures else {}),
        }


@dataclass(frozen=True, slots=True)
class TableDescription:
    """A table at a snapshot. `last_snapshot`: the last one at or before it that changed the table's
    rows or shape."""

    schema: TableSchema
    rows: int
    size_bytes: int
    files: int
    last_snapshot: int


class QueryService:
    """One per process, over its resolver, manifest, planner and engine. Without `pins` nothing may
    ever be deleted from the lake."""

    def __init__(
        self,
        *,
        resolver: Resolver,
        manifest: Manifest,
        planner: Planner,
        engine: Engine,
        codec: TokenCodec,
        pins: Pins | None = None,
        limits: QueryLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._resolver = resolver
        self._pins = pins or Unpinned()
        self._manifest = manifest
        self._planner = planner
        self._listings = Listings()
        self._engine = engine
        self._codec = codec
        self._limits = limits or QueryLimits()
        self._clock = clock or SystemClock()

    async def query(self, request: QueryRequest, visible: Visible) -> QueryAnswer:
        """Runs one statement; returns when the first part of the answer is there.

        `visible` says which tables the caller may see. Raises what the parts raise; QueryTimeout
        names the `phase` in which the budget ran out (`wait`, `plan`, `fetch`, `queue`, `execute`),
        and a token that was not covered in time is VisibilityTimeout.
        """

        now_s = self._clock.monotonic_s()
        arrived_s = now_s if request.arrived_s is None else request.arrived_s
        deadline_s = arrived_s + self._timeout_ms(request) / 1000
        resolving = asyncio.ensure_future(self._resolve(request, deadline_s))
        try:
            parsed = await self._within(self._engine.parse(request.sql), deadline_s, arrived_s)
            resolved = await resolving
        finally:
            await _ended(resolving)
        stops = await self._stops(request, parsed, resolved, deadline_s)
        read = (resolved.snapshot_id, *(stop.snapshot_id for stop in stops))
        hold = await self._within(hold_all(self._pins, read), deadline_s, arrived_s)
        answer: QueryAnswer | None = None
        try:
            async with hold.guarded():
                views = [
                    await self._within(self._manifest.at(one, resolved.head), deadline_s, arrived_s)
                    for one in read
                ]
                scan = plan_statement(
                    self._planner,
                    self._listings,
                    parsed,
                    request.parameters,
                    views,
                    visible=visible,
                    ordered=request.deterministic,
                    pruning=request.pruning,
                )
                if scan.remote:
                    bringing = self._planner.bring(scan.remote, hold)
                    await self._within(bringing, deadline_s, arrived_s, phase="fetch")
                answer = await self._execute(
                    request, parsed, resolved, scan, hold, arrived_s, deadline_s
                )
                answer.snapshots = tuple(dict.fromkeys(read))
                answer.erasures = erasures_of(parsed, views)
        except BaseException:
            hold.release()
            if answer is not None:
                await answer.aclose()
            raise
        return answer

    async def view(
        self,
        choice: SnapshotChoice = LATEST,
        *,
        tokens: Sequence[AnyToken] = (),
        timeout_ms: int | None = None,
    ) -> tuple[Resolved, SnapshotView]:
        """The snapshot a request reads, for callers that ask about tables and not for rows."""

        budget_ms = self._limits.timeout_ms if timeout_ms is None else timeout_ms
        started_s = self._clock.monotonic_s()
        deadline_s = started_s + budget_ms / 1000
        resolved = await self._resolver.resolve(choice, tokens=tokens, deadline_s=deadline_s)
        manifest = self._manifest.at(resolved.snapshot_id, resolved.head)
        return resolved, await self._within(manifest, deadline_s, started_s)

    @staticmethod
    def describe(view: SnapshotView, name: str, visible: Visible) -> TableDescription:
        """One table at a snapshot. Raises TableNotFound."""

        return _description(view, find_table(view, name, visible=visible))

    @staticmethod
    def describe_all(view: SnapshotView, visible: Visible) -> list[TableDescription]:
        """All tables of a snapshot that the caller may see, in order of names."""

        return [_description(view, s) for n, s in view.schemas().items() if visible(n)]

    def _timeout_ms(self, request: QueryRequest) -> int:
        timeout_ms = self._limits.timeout_ms if request.timeout_ms is None else request.timeout_ms
        if not 1 <= timeout_ms <= TIMEOUT_MS_MAX:
            raise MalformedRequest(f"timeout_ms must be between 1 and {TIMEOUT_MS_MAX}")
        if request.max_rows is not None and request.max_rows < 1:
            raise MalformedRequest("max_rows must be at least 1")
        if request.max_staleness_ms < 0:
            raise MalformedRequest("max_staleness_ms must not be negative")
        return timeout_ms

    async def _resolve(self, request: QueryRequest, deadline_s: float) -> Resolved:
        try:
            return await self._resolver.resolve(
                request.snapshot,
                tokens=request.min_visibility_tokens,
                deadline_s=deadline_s,
                staleness_s=request.max_staleness_ms / 1000,
            )
        except VisibilityTimeout as error:
            if request.min_visibility_tokens:
                raise
            raise _timeout("wait", error.members.get("waited_ms", 0)) from error

    async def _stops(
        self,
        request: QueryRequest,
        parsed: ParsedStatement,
        resolved: Resolved,
        deadline_s: float,
    ) -> list[Snapshot]:
        """The snapshot of each AT. Tokens bind only references without it (D1)."""

        try:
            return [
                await self._resolver.elsewhere(
                    choice_of(travel.at, request.parameters),
                    head=resolved.head,
                    deadline_s=deadline_s,
                )
                for travel in parsed.travels
            ]
        except VisibilityTimeout as error:
            raise _timeout("wait", error.members.get("waited_ms", 0)) from error

    async def _within(
        self,
        work: Awaitable[_Value],
        deadline_s: float,
        arrived_s: float,
        phase: str = "plan",
    ) -> _Value:
        now_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(max(0.0, deadline_s - now_s)):
                return await work
        except TimeoutError as error:
            raise _timeout(phase, (self._clock.monotonic_s() - arrived_s) * 1000) from error

    async def _execute(
        self,
        request: QueryRequest,
        parsed: ParsedStatement,
        resolved: Resolved,
        scan: ScanPlan,
        hold: Held,
        arrived_s: float,
        deadline_s: float,
    ) -> QueryAnswer:
        limits = self._limits
        began_s = self._clock.monotonic_s()
        if began_s >= deadline_s:
            raise _timeout("plan", (began_s - arrived_s) * 1000)
        query_id = request.query_id or uuid.uuid4().hex
        result = await self._engine.execute(
            QueryPlan(
                sql=request.sql,
                sources=scan.sources,
                started_at=resolved.started_at,
                query_id=query_id,
                deadline_s=deadline_s - began_s,
                parameters=request.parameters,
                result_format=request.result_format,
                integers=request.integers,
                rows_max=min(request.max_rows or limits.rows_max, limits.rows_max),
                bytes_max=limits.bytes_max,
                deterministic=request.deterministic,
                party=request.party,
            )
        )
        return QueryAnswer(
            query_id=query_id,
            kind=parsed.kind,
            columns=result.columns,
            snapshot_id=resolved.snapshot_id,
            snapshot_time=resolved.published_at,
            visibility_token=self._codec.encode(resolved.token),
            wait_ms=resolved.waited_ms,
            plan_ms=(began_s - arrived_s) * 1000 - resolved.waited_ms,
            files_scanned=scan.files_scanned,
            files_pruned=scan.files_pruned,
            bytes_scanned=scan.bytes_scanned,
            snapshots=(resolved.snapshot_id,),
            result=result,
            hold=hold,
            clock=self._clock,
            began_s=began_s,
        )


def _description(view: SnapshotView, schema: TableSchema) -> TableDescription:
    files = view.files(schema.table_id)
    return TableDescription(
        schema,
        files.rows,
        files.size_bytes,
        len(files.files),
        max(files.epoch, view.first_snapshot(schema)),
    )


def _timeout(phase: str, waited_ms: object) -> QueryTimeout:
    waited = round(float(str(waited_ms)))
    return QueryTimeout(
        f"the time ran out in the phase {phase!r}: raise timeout_ms, or try again later",
        waited_ms=waited,
        phase=phase,
    )


async def _ended(work: asyncio.Future[Resolved]) -> None:
    if not work.done():
        work.cancel()
        await asyncio.wait((work,))
    if not work.cancelled():
        work.exception()  # seen: another failure is on its way to the caller
