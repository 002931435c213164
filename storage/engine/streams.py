"""An answer on its way: columns at once, then chunks, then the count.

Life of an answer: it holds a slot (one of the queries that may run) and a lane of a child. It ends
by END or ERROR of the child, by its deadline, by `aclose`, or by the child's death. If the child
dies before a chunk was handed out, the query is run once more on the next child (contract D9): it
reads one fixed snapshot, so running it again gives the same answer.

When nobody knows why a child died, each query that ran in it may have been the reason. Such queries
are run again one after the other: the one that kills the next child, too, takes none of the others
with it a second time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import msgspec
from msgspec import structs

from lakebus import errors
from storage.engine.channels import Channel, ChildDied
from storage.engine.plans import QueryPlan
from storage.engine.process import ChildProcess
from storage.engine.wire import (
    DATA,
    ERROR,
    HEADER,
    RUN,
    End,
    Failure,
    Header,
    RunRequest,
    WireSource,
    encode,
    frame,
)

logger = logging.getLogger(__name__)

_INTERRUPT_EVERY_S = 0.02
_KINDS: dict[str, type[errors.LakebusError]] = {
    kind.code: kind
    for kind in (
        errors.SqlError,
        errors.StatementNotAllowed,
        errors.ResultTooLarge,
        errors.TableNotFound,
        errors.Cancelled,
        errors.Unavailable,
        errors.Fault,
    )
}


class Host(Protocol):
    """What an answer needs of the engine."""

    suspects: asyncio.Lock

    async def live_child(self) -> ChildProcess: ...

    def release_slot(self, plan: QueryPlan) -> None: ...

    def in_background(self, work: Any) -> asyncio.Task[None]: ...


def error_of(payload: bytes, query_id: str) -> errors.LakebusError:
    """The typed error of a child's failure; what is internal goes to the log only."""

    failure = msgspec.msgpack.decode(payload, type=Failure)
    if failure.internal:
        logger.warning("query %s: %s: %s", query_id, failure.code, failure.internal)
    kind = _KINDS.get(failure.code, errors.Fault)
    return kind(failure.detail, **failure.members)


class ResultStream:
    """Iterate for chunks of bytes; after the last one `row_count` and `statistics` are set.

    `columns`: `[{"name", "type"}]`. Leave with `aclose` (or `async with`), which stops the work.
    """

    def __init__(
        self, host: Host, plan: QueryPlan, *, deadline: float, arrived: float, grace_s: float
    ) -> None:
        self.columns: list[dict[str, str]] = []
        self.row_count: int | None = None
        self.statistics: dict[str, float] = {}
        self.reruns = 0
        self._host = host
        self._plan = plan
        self._request = _request(plan)
        self._arrived = arrived
        self._deadline = deadline
        self._grace_s = grace_s
        self._child: ChildProcess | None = None
        self._lane: tuple[int, Channel] | None = None
        self._sent = False
        self._suspect = False
        self._ended = False
        self._failure: errors.LakebusError | None = None
        self._stopping: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(deadline, self._expire)

    async def begin(self) -> None:
        """Runs until the header. Raises the typed error of anything that fails before it."""

        try:
            await self._attempt()
        except BaseException:
            await self.aclose()
            raise

    def __aiter__(self) -> ResultStream:
        return self

    async def __anext__(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise StopAsyncIteration
        try:
            kind, payload = await self._next()
        except BaseException:
            await self.aclose()
            raise
        if kind == DATA:
            self._sent = True
            return payload
        self._take_end(payload)
        raise StopAsyncIteration

    async def read_all(self) -> bytes:
        """The whole answer at once, for callers that want it small."""

        return b"".join([chunk async for chunk in self])

    async def aclose(self) -> None:
        """Ends the query; returns when its work has stopped."""

        if self._ended:
            return
        if self._stopping is None:
            self._stopping = self._host.in_background(self._stop())
        await asyncio.shield(self._stopping)

    async def __aenter__(self) -> ResultStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    # --- work ----------------------------------------------------------------------------

    async def _attempt(self) -> None:
        while True:
            try:
                kind, payload = await (self._alone() if self._suspect else self._begun())
                break
            except ChildDied as died:
                self._may_rerun(died)
        if kind != HEADER:
            raise errors.Fault("the engine answered out of order")
        header = msgspec.msgpack.decode(payload, type=Header)
        columns = [{"name": name, "type": kind} for name, kind in header.columns]
        if self.columns and self.columns != columns:
            raise errors.Unavailable("the engine was restarted during the query; send it again")
        self.columns = columns

    async def _begun(self) -> tuple[int, bytes]:
        await self._send()
        return await self._frame()

    async def _alone(self) -> tuple[int, bytes]:
        """When no other suspect runs; until the first part is there."""

        suspects = self._host.suspects
        try:
            async with asyncio.timeout_at(self._deadline):
                await suspects.acquire()
        except TimeoutError:
            raise self._failure or self._timeout() from None
        try:
            return await self._begun()
        finally:
            suspects.release()

    async def _send(self) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            async with asyncio.timeout_at(self._deadline):
                child = await self._host.live_child()
        except TimeoutError:
            raise self._failure or self._timeout() from None
        if self._failure is not None:
            raise self._failure
        index, lane = child.take_lane()
        lane.sequence += 1
        self._child, self._lane = child, (index, lane)
        lane.begin(frame(RUN, encode(structs.replace(self._request, sequence=lane.sequence))))

    async def _next(self) -> tuple[int, bytes]:
        while True:
            try:
                return await self._frame()
            except ChildDied as died:
                self._may_rerun(died)
                await self._attempt()

    async def _frame(self) -> tuple[int, bytes]:
        assert self._lane is not None
        kind, payload = await self._lane[1].next_frame()
        if self._failure is not None:
            raise self._failure
        if kind == ERROR:
            self._release()
            self._failure = error_of(payload, self._plan.query_id)
            raise self._failure
        return kind, payload

    def _may_rerun(self, died: ChildDied) -> None:
        self._lane = None
        if self._failure is not None:
            raise self._failure from died
        if self._sent or self.reruns:
            self._failure = errors.Unavailable(
                "the engine was restarted during the query; send it again", retry_after_s=1.0
            )
            raise self._failure from died
        self.reruns += 1
        self._suspect = self._child is not None and not self._child.kill_reason
        logger.info("query %s runs once more on a new child", self._plan.query_id)

    def _take_end(self, payload: bytes) -> None:
        end = msgspec.msgpack.decode(payload, type=End)
        self.row_count = end.row_count
        self.statistics = {"execute_ms": end.execute_ms}
        self._release()

    def _timeout(self) -> errors.QueryTimeout:
        waited_ms = (asyncio.get_running_loop().time() - self._arrived) * 1000
        return errors.QueryTimeout(
            "the query did not end in its time; raise timeout_ms or ask for less",
            waited_ms=round(waited_ms),
            phase="execute",
        )

    def _expire(self) -> None:
        if self._ended or self._stopping is not None:
            return
        self._failure = self._timeout()
        if self._lane is not None:
            self._lane[1].fail_reader(self._failure)
        self._stopping = self._host.in_background(self._stop())

    async def _stop(self) -> None:
        """Interrupts until the lane answers; a child that does not obey is killed (D9: 250 ms)."""

        if self._ended:
            return
        self._failure = self._failure or errors.Cancelled("the query was cancelled")
        if self._lane is None or self._child is None:
            self._release()
            return
        (index, lane), child = self._lane, self._child
        lane.discard()
        lane.fail_reader(self._failure)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._grace_s
        while child.alive and not lane.idle.is_set():
            if loop.time() >= give_up:
                child.kill(f"query {self._plan.query_id} did not obey its interrupt")
                break
            child.interrupt(index, lane.sequence)
            await _wait_for(lane.idle, _INTERRUPT_EVERY_S)
        self._release()

    def _release(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._timer.cancel()
        if self._lane is not None and self._child is not None and self._child.alive:
            self._child.give_back(*self._lane)
        self._lane = None
        self._host.release_slot(self._plan)


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _request(plan: QueryPlan) -> RunRequest:
    given: Any = plan.parameters
    if given is not None:
        given = dict(given) if isinstance(given, Mapping) else list(given)
    return RunRequest(
        0,
        plan.sql,
        "" if given is None else json.dumps(given),
        tuple(
            WireSource(name, tuple(column[0] for column in source.columns), source.relation_sql)
            for name, source in sorted(plan.sources.items())
        ),
        plan.result_format,
        plan.integers,
        plan.rows_max,
        plan.bytes_max,
        plan.deterministic,
        plan.started_at.isoformat(),
    )
