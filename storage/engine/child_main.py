"""The child process: start, threads, end.

Threads: one per lane (runs queries), one for parsing, one for control (interrupts, pings). Any
thread that ends, ends the process: a child is replaced as a whole, never repaired.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import duckdb
import msgspec
import pyarrow as pa

from storage.engine.child_faults import failure_of
from storage.engine.child_frames import read_frame
from storage.engine.child_functions import FunctionRules, read_rules
from storage.engine.child_guard import Guard, GuardedStatement
from storage.engine.child_lane import Database, Lane
from storage.engine.child_rows import encode_rows
from storage.engine.child_sandbox import bound_address_space, lock_process, open_database
from storage.engine.child_scopes import ScopeCache
from storage.engine.child_small import SmallAnswers
from storage.engine.child_types import Form
from storage.engine.settings import EngineSettings
from storage.engine.wire import (
    ERROR,
    INTERRUPT,
    PARSE,
    PARSED,
    PING,
    READY,
    InterruptRequest,
    ParsedReply,
    ParseRequest,
    Ready,
    WireTravel,
    encode,
    frame,
)


def main(
    settings: EngineSettings, parent_pid: int, control: int, parsing: int, lanes: list[int]
) -> None:
    """Runs until the parent closes the control socket or dies."""

    lock_process(parent_pid)
    os.environ.clear()
    parallel = _open(settings, "parallel", threads=settings.threads)
    ordered = _open(settings, "ordered", threads=1)
    rules = read_rules(parallel.connection)
    guard = _SharedGuard(parallel, rules, settings)
    _warm(parallel)
    served = [
        Lane(_channel(number), parallel=parallel, ordered=ordered, check=guard.judge)
        for number in lanes
    ]
    for lane in served:
        _start(lane.serve)
    parser, controller = _channel(parsing), _channel(control)
    _start(lambda: _serve_parsing(parser, guard.check))
    bound_address_space(settings.address_space_bytes)
    controller.sendall(frame(READY, encode(Ready(duckdb.__version__, len(rules.allowed)))))
    _guarded(lambda: _serve_control(controller, served))


def _channel(number: int) -> socket.socket:
    return socket.socket(fileno=number)


def _open(settings: EngineSettings, name: str, *, threads: int) -> Database:
    # Two databases must not share a spill folder: each empties its own when it closes.
    folder = f"{settings.temp_directory}/{name}"
    connection = open_database(replace(settings, temp_directory=folder), threads=threads)
    return Database(
        connection,
        ScopeCache(connection, entries_max=settings.scope_cache_entries),
        SmallAnswers(entries_max=settings.parse_cache_entries),
    )


class _SharedGuard:
    """One guard for all threads; checks are short, so a lock is enough."""

    def __init__(self, database: Database, rules: FunctionRules, settings: EngineSettings) -> None:
        self._guard = Guard(
            database.connection.cursor(),
            rules,
            sql_bytes_max=settings.sql_bytes_max,
            cache_entries=settings.parse_cache_entries,
        )
        self._lock = threading.Lock()

    def check(self, sql: str) -> GuardedStatement:
        with self._lock:
            return self._guard.check(sql)

    def judge(self, sql: str) -> GuardedStatement:
        with self._lock:
            return self._guard.judge(sql)


def _warm(database: Database) -> None:
    """First uses load code lazily; do them before a query pays for it."""

    cursor = database.connection.cursor()
    for batch in cursor.sql("SELECT 1 AS a, 'x' AS b, now() AS c").to_arrow_reader(10):
        encode_rows(
            batch.cast(pa.schema([("a", pa.int32()), ("b", pa.string()),
                                  ("c", pa.timestamp("us", "UTC"))])),
            (Form("plain"), Form("text"), Form("timestamptz")),
        )  # fmt: skip
        batch.serialize()
    cursor.close()


def _start(work: Callable[[], None]) -> None:
    threading.Thread(target=_guarded, args=(work,), daemon=True).start()


def _guarded(work: Callable[[], None]) -> None:
    """A thread of this process ends only with the process."""

    try:
        work()
    except BaseException:  # noqa: BLE001 - whatever it is, the parent starts another child
        os._exit(70)
    os._exit(0)


def _serve_parsing(channel: socket.socket, check: Callable[[str], GuardedStatement]) -> None:
    decode = msgspec.msgpack.Decoder(ParseRequest).decode
    while (found := read_frame(channel)) is not None:
        kind, payload = found
        if kind != PARSE:
            raise ValueError(f"the parser takes no frame of kind {kind}")
        sql = decode(payload).sql
        try:
            guarded = check(sql)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a frame
            failure = failure_of(error, sql, positions_hold=True)
            channel.sendall(frame(ERROR, encode(failure)))
            continue
        reply = ParsedReply(
            guarded.kind,
            guarded.tables,
            guarded.parameters,
            guarded.positional,
            guarded.reads_clock,
            guarded.tree,
            guarded.described,
            guarded.listings,
            tuple(
                WireTravel(at.unit, at.literal, at.parameter, tables, tree)
                for at, tables, tree in guarded.travels
            ),
        )
        channel.sendall(frame(PARSED, encode(reply)))


def _serve_control(channel: socket.socket, lanes: list[Lane]) -> None:
    decode = msgspec.msgpack.Decoder(InterruptRequest).decode
    while (found := read_frame(channel)) is not None:
        kind, payload = found
        if kind == INTERRUPT:
            request = decode(payload)
            lanes[request.lane].interrupt(request.sequence)
        elif kind == PING:
            channel.sendall(frame(PING, payload))
        else:
            raise ValueError(f"control takes no frame of kind {kind}")
