"""The SQL engine of one replica: a child process that runs queries, and a warm spare beside it.

Untrusted SQL runs in the child (architecture, decision 12). This side never imports DuckDB, never
waits for anything but sockets, and believes nothing the child says beyond its declared frames.

* At most `concurrent_queries` run; others wait for their turn, fairly over principals and in order
  of arrival within one (`storage.turns`), within their own deadline.
* A query that does not obey its interrupt costs the child its life. The spare takes over at once,
  neighbours that have sent nothing are run once more, and a new spare warms up behind.
* Parsing and guarding happen in the child too, because the parser is native code that strangers
  feed; answers are kept here by text.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from lakebus.errors import (
    ConfigurationError,
    Fault,
    MalformedRequest,
    QueryTimeout,
    StartRefused,
    Unavailable,
)
from storage.engine.caches import BoundedCache
from storage.engine.channels import ChildDied
from storage.engine.plans import At, ParsedStatement, QueryPlan, Travel
from storage.engine.process import ChildProcess, remove_stale_folders
from storage.engine.settings import EngineSettings
from storage.engine.streams import ResultStream, error_of
from storage.engine.wire import ERROR, PARSE, PARSED, ParsedReply, ParseRequest, encode, frame
from storage.turns import Turns

logger = logging.getLogger(__name__)

_LARGE_TREE_BYTES = 256 * 1024
#: Counted as JSON; as Python objects trees take about eight times as much.
_PARSED_BYTES = 8 << 20
_SPAWN_PAUSE_S = (0.1, 5.0)
_INTEGER_MAX = 1 << 127


class QueryEngine:
    """Start it on a running event loop, use it there, stop it there."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        #: Held by who runs again after a death that nobody can explain (streams).
        self.suspects = asyncio.Lock()
        self._current: ChildProcess | None = None
        self._spare: ChildProcess | None = None
        self._available = asyncio.Event()
        self._wake = asyncio.Event()
        self._turns = Turns(
            "queries",
            # What several principals share is the threads: more queries only wait for them.
            places=min(settings.concurrent_queries, settings.threads),
            alone=settings.concurrent_queries,
            waiting_max=settings.queue_length_max,
            memory_s=settings.presence_s,
        )
        self._stopped = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._parsed: BoundedCache[ParsedStatement] = BoundedCache(
            entries_max=settings.parse_cache_entries, bytes_max=_PARSED_BYTES
        )
        self._counts = {"queries": 0, "replacements": 0, "kills": 0, "start_failures": 0}

    # --- life ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the first child is ready; the spare warms up behind. Raises StartRefused."""

        if not os.path.isdir(self._settings.allowed_directory):
            raise ConfigurationError(
                "engine setting allowed_directory names no folder; create it first"
            )
        os.makedirs(self._settings.temp_directory, mode=0o700, exist_ok=True)
        remove_stale_folders(self._settings.temp_directory)
        self._stopped = False
        first = ChildProcess(self._settings, self._on_death)
        try:
            await first.start()
        except BaseException:
            self._stopped = True
            await first.gone()
            raise
        self._install(first)
        loop = asyncio.get_running_loop()
        self._keepers = [
            loop.create_task(self._keep_children()),
            loop.create_task(self._keep_watch()),
        ]

    async def stop(self) -> None:
        """Ends both children and everything that runs in them. May be called twice."""

        self._stopped = True
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers = []
        children = [child for child in (self._current, self._spare) if child is not None]
        for child in children:
            child.kill("the engine stops")
        self._available.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in children:
            await child.gone()

    async def ping(self) -> float:
        """Round trip to the child in milliseconds. Raises Unavailable."""

        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._settings.ping_deadline_s):
                await (await self.live_child()).ping()
        except (ChildDied, TimeoutError) as error:
            raise Unavailable("the SQL engine does not answer", retry_after_s=1.0) from error
        return (loop.time() - began) * 1000

    def status(self) -> dict[str, Any]:
        current, spare = self._current, self._spare
        return {
            "running": self._turns.held,
            "queued": self._turns.waiting,
            "child_pid": current.pid if current else None,
            "spare_pid": spare.pid if spare else None,
            "ready": current is not None and current.alive,
            "spare_ready": spare is not None and spare.alive,
            "duckdb_version": current.ready.duckdb_version if current else None,
            **self._counts,
        }

    # --- statements ----------------------------------------------------------------------

    async def parse(self, sql: str) -> ParsedStatement:
        """What the statement reads. Raises SqlError, StatementNotAllowed, Unavailable."""

        known = self._parsed.get(sql)
        if known is not None:
            return known
        try:
            sql.encode()
        except UnicodeEncodeError as error:
            raise MalformedRequest("the statement is not valid text") from error
        reply = await self._ask_parser(sql)
        size = len(reply.tree) + sum(len(travel.tree) for travel in reply.travels)
        if size > _LARGE_TREE_BYTES:
            parsed = await asyncio.to_thread(_parsed, sql, reply)
        else:
            parsed = _parsed(sql, reply)
        self._parsed.put(sql, parsed, size)
        return parsed

    async def _ask_parser(self, sql: str) -> ParsedReply:
        child = await self.live_child()
        try:
            async with child.parse_lock:
                kind, payload = await self._parse_in(child, sql)
        except ChildDied:
            # It may be this text that killed it, so it does not meet others that run again.
            async with self.suspects:
                kind, payload = await self._ask_again(sql)
        if kind == ERROR:
            raise error_of(payload, "parse")
        if kind != PARSED:
            raise Fault("the engine answered out of order")
        return msgspec.msgpack.decode(payload, type=ParsedReply)

    async def _ask_again(self, sql: str) -> tuple[int, bytes]:
        child = await self.live_child()
        try:
            async with child.parse_lock:
                return await self._parse_in(child, sql)
        except ChildDied as died:
            raise Unavailable(
                "the SQL engine was restarted; send the query again", retry_after_s=1.0
            ) from died

    async def _parse_in(self, child: ChildProcess, sql: str) -> tuple[int, bytes]:
        child.parsing.send(frame(PARSE, encode(ParseRequest(sql))))
        # The answer must be read even when the asker leaves, or the next asker would get it.
        answer = asyncio.ensure_future(child.parsing.next_frame())
        try:
            async with asyncio.timeout(self._settings.parse_deadline_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            child.kill("a statement took too long to parse")
            answer.cancel()
            raise QueryTimeout(
                "the statement took too long to parse; make it simpler", phase="parse"
            ) from None
        except asyncio.CancelledError:
            await self._settle(child, answer)
            raise

    async def _settle(self, child: ChildProcess, answer: asyncio.Future[tuple[int, bytes]]) -> None:
        done, _ = await asyncio.wait({answer}, timeout=self._settings.interrupt_grace_s)
        if not done:
            child.kill("an abandoned statement took too long to parse")
            answer.cancel()

    async def execute(self, plan: QueryPlan) -> ResultStream:
        """Runs a query; returns when its first part is there.

        Raises SqlError, StatementNotAllowed, TableNotFound, ResultTooLarge, QueryTimeout (member
        `phase`: `queue` or `execute`), RateLimited (too many of one principal wait), Unavailable;
        after the first byte the stream raises them.
        """

        _check_parameters(plan)
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        deadline = arrived + plan.deadline_s
        await self._take_slot(plan, deadline, arrived)
        self._counts["queries"] += 1
        try:
            stream = ResultStream(
                self,
                plan,
                deadline=deadline,
                arrived=arrived,
                grace_s=self._settings.interrupt_grace_s,
            )
        except BaseException:
            self.release_slot(plan)
            raise
        await stream.begin()
        return stream

    async def _take_slot(self, plan: QueryPlan, deadline: float, arrived: float) -> None:
        if self._stopped:
            raise Unavailable("the SQL engine is stopped", retry_after_s=1.0)
        try:
            await self._turns.take(plan.party, time.monotonic() + deadline - arrived)
        except TimeoutError:
            waited_ms = round((asyncio.get_running_loop().time() - arrived) * 1000)
            raise QueryTimeout(
                "the query waited for others and had no time left; raise timeout_ms or try later",
                waited_ms=waited_ms,
                phase="queue",
            ) from None

    # --- what an answer needs ------------------------------------------------------------

    async def live_child(self) -> ChildProcess:
        while True:
            if self._stopped:
                raise Unavailable("the SQL engine is stopped", retry_after_s=1.0)
            if self._current is not None and self._current.alive:
                return self._current
            self._available.clear()
            await self._available.wait()

    def release_slot(self, plan: QueryPlan) -> None:
        self._turns.give(plan.party)

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- children ------------------------------------------------------------------------

    def _install(self, child: ChildProcess) -> None:
        self._current = child
        self._available.set()
        self._wake.set()

    def _on_death(self, child: ChildProcess) -> None:
        self.in_background(child.gone())
        if child.kill_reason:
            self._counts["kills"] += 1
        if child is self._spare:
            self._spare = None
        elif child is self._current:
            self._current = None
            if not self._stopped:
                self._counts["replacements"] += 1
                logger.warning(
                    "the engine's child %d ended: %s", child.pid, child.kill_reason or "it died"
                )
            spare, self._spare = self._spare, None
            if spare is not None and spare.alive and not self._stopped:
                self._install(spare)
        self._wake.set()

    async def _keep_children(self) -> None:
        """Starts what is missing: first the child that serves, then the spare."""

        pause_s = _SPAWN_PAUSE_S[0]
        while True:
            self._wake.clear()
            if self._current is not None and (self._spare is not None or not self._settings.spare):
                await self._wake.wait()
                continue
            child = ChildProcess(self._settings, self._on_death)
            try:
                await child.start()
            except StartRefused as error:
                self._counts["start_failures"] += 1
                logger.error("%s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _SPAWN_PAUSE_S[1])
                continue
            except asyncio.CancelledError:
                await child.gone()
                raise
            pause_s = _SPAWN_PAUSE_S[0]
            if self._current is None:
                self._install(child)
            else:
                self._spare = child

    async def _keep_watch(self) -> None:
        """A child whose control thread is silent for long is replaced."""

        while True:
            await asyncio.sleep(self._settings.ping_interval_s)
            child = self._current
            if child is None:
                continue
            try:
                async with asyncio.timeout(self._settings.ping_deadline_s):
                    await child.ping()
            except TimeoutError:
                child.kill("it did not answer")
            except ChildDied:
                continue


def _parsed(sql: str, reply: ParsedReply) -> ParsedStatement:
    travels = tuple(
        Travel(
            At(travel.unit, travel.literal, travel.parameter),
            travel.tables,
            msgspec.json.decode(travel.tree),
        )
        for travel in reply.travels
    )
    return ParsedStatement(
        sql,
        reply.kind,
        reply.tables,
        reply.parameters,
        reply.positional,
        reply.reads_clock,
        msgspec.json.decode(reply.tree),
        reply.described,
        reply.listings,
        travels,
    )


def _check_parameters(plan: QueryPlan) -> None:
    """Parameters are JSON scalars. Raises MalformedRequest."""

    given = plan.parameters
    values: list[Any] = []
    if given is not None:
        values = list(given.values()) if hasattr(given, "values") else list(given)
    for value in values:
        if value is not None and not isinstance(value, bool | int | float | str):
            raise MalformedRequest("parameters must be null, true, false, numbers or strings")
        if isinstance(value, int) and not -_INTEGER_MAX <= value < _INTEGER_MAX:
            raise MalformedRequest("a parameter is an integer beyond 128 bits; send it as a string")
