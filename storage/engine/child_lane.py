"""A lane: one thread, one socket, one query after the other.

The control thread interrupts a lane by (lane, sequence). DuckDB forgets an interrupt that comes
while no statement runs, so the wish is also kept as a flag that the lane looks at between steps,
and the parent repeats the interrupt until the lane answers or is given up.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import duckdb
import msgspec

from storage.engine.child_faults import Interrupted, failure_of, is_fatal
from storage.engine.child_frames import read_frame
from storage.engine.child_guard import GuardedStatement
from storage.engine.child_query import (
    bind,
    check_parameters,
    check_sources,
    execute_small,
    pin_clock,
    rewritten,
    stream,
)
from storage.engine.child_sandbox import quote_text
from storage.engine.child_scopes import ScopeCache
from storage.engine.child_sink import FrameSink
from storage.engine.child_small import SmallAnswers, shape_of
from storage.engine.wire import RUN, Failure, RunRequest


@dataclass(frozen=True, slots=True)
class Database:
    """One DuckDB with its scopes; `parallel` or the one-thread one of `deterministic`."""

    connection: duckdb.DuckDBPyConnection
    scopes: ScopeCache
    small: SmallAnswers


@dataclass(slots=True)
class _Session:
    """A lane's own connection to a database, and the search path that it has now."""

    database: Database
    cursor: duckdb.DuckDBPyConnection
    path: str = ""

    def enter(self, path: str) -> None:
        if path != self.path:
            self.path = ""
            self.cursor.execute("SET search_path = " + quote_text(path))
            self.path = path

    def let_go(self) -> None:
        """Frees what a half-read answer still holds."""

        self.cursor.abort()


class Lane:
    """Runs the queries that arrive on `channel`."""

    def __init__(
        self,
        channel: socket.socket,
        *,
        parallel: Database,
        ordered: Database,
        check: Callable[[str], GuardedStatement],
    ) -> None:
        self._channel = channel
        self._parallel = _Session(parallel, parallel.connection.cursor())
        self._ordered = _Session(ordered, ordered.connection.cursor())
        self._check = check
        self._decode = msgspec.msgpack.Decoder(RunRequest).decode
        self._lock = threading.Lock()
        self._running: tuple[int, duckdb.DuckDBPyConnection] | None = None
        self._unwanted = -1
        self._wrapped = False

    def serve(self) -> None:
        """Until the parent closes the socket. Raises when the database is lost."""

        while (found := read_frame(self._channel)) is not None:
            kind, payload = found
            if kind != RUN:
                raise ValueError(f"a lane takes no frame of kind {kind}")
            self._run(self._decode(payload))

    def interrupt(self, sequence: int) -> None:
        """Called by the control thread."""

        with self._lock:
            self._unwanted = max(self._unwanted, sequence)
            if self._running is not None and self._running[0] == sequence:
                self._running[1].interrupt()

    def _run(self, request: RunRequest) -> None:
        session = self._ordered if request.deterministic else self._parallel
        sink = FrameSink(self._channel, bytes_max=request.bytes_max)
        with self._lock:
            self._running = (request.sequence, session.cursor)
        failure: Failure | None = None
        fatal = False
        try:
            self._answer(request, session, sink)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a frame
            failure = failure_of(error, request.sql, positions_hold=not self._wrapped)
            fatal = is_fatal(error)
        finally:
            with self._lock:
                self._running = None
        session.let_go()
        if failure is not None:
            sink.fail(failure)
        if fatal:
            raise SystemError("the database is lost; the process must be replaced")

    def _answer(self, request: RunRequest, session: _Session, sink: FrameSink) -> None:
        def check() -> None:
            if self._unwanted >= request.sequence:
                raise Interrupted

        self._wrapped = False
        guarded = self._check(request.sql)
        check_sources(guarded, request)
        parameters = check_parameters(guarded, _decoded(request.parameters))
        small = session.database.small
        with session.database.scopes.use(request.sources) as scope:
            check()
            session.enter(scope.path)
            pin_clock(session.cursor, guarded, request.started_at)
            self._wrapped = guarded.rewriting is not None
            run, bound = rewritten(guarded, request, parameters, scope.catalog)
            shape = shape_of(request.sql, request.sources)
            binding, began_s = None, time.perf_counter()
            if request.result_format == "json" and small.expects(shape):
                binding = execute_small(session.cursor, run, bound)
                if binding is None:
                    small.disappointed(shape)
            if binding is None:
                binding = bind(session.cursor, run, bound)
            self._wrapped = self._wrapped or binding.wrapped
            check()
            rows = stream(binding, request, sink, check)
            if binding.relation is not None:
                small.learn(shape, binding.types, rows, time.perf_counter() - began_s)


def _decoded(parameters: str) -> Any:
    return json.loads(parameters) if parameters else None
