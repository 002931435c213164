"""What a query costs, counted: files that are opened, and statements that DuckDB is given.

No seconds, so every machine agrees. A table of many small files is what a lake is between two
compactions; a query that opens them all is slow however fast the rest is (goal P12).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.bus.settings import BusSettings
from storage.engine import child_main
from storage.engine.child_frames import read_frame
from storage.engine.child_functions import read_rules
from storage.engine.child_lane import Database, Lane
from storage.engine.child_sandbox import open_database
from storage.engine.child_scopes import ScopeCache
from storage.engine.child_small import SmallAnswers
from storage.engine.settings import EngineSettings
from storage.engine.wire import END, RUN, RunRequest, WireSource, encode, frame
from tests.conformance.harness import entry_of
from tests.conformance.memory import MemoryHarness
from tests.conformance.sql import SqlStack, sql_stack

FILES = 40
_IN_OPEN, _IN_NONBLOCK = 0x20, 0x800
_EVENT = struct.Struct("iIII")


class Opened:
    """Counts how often the files of a folder are opened, by whatever process (inotify)."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(_IN_NONBLOCK)
        if self.descriptor < 0:
            pytest.skip("the kernel gives no more inotify instances")
        assert libc.inotify_add_watch(self.descriptor, os.fsencode(folder), _IN_OPEN) >= 0

    def take(self) -> Counter[str]:
        """Since the last call; everything that came before it is there already."""

        found: Counter[str] = Counter()
        while True:
            try:
                events = os.read(self.descriptor, 1 << 16)
            except BlockingIOError:
                return found
            at = 0
            while at < len(events):
                *_, length = _EVENT.unpack_from(events, at)
                name = events[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
                if name.endswith(b".parquet"):
                    found[name.decode()] += 1
                at += _EVENT.size + length


@contextmanager
def opened(folder: Path) -> Iterator[Opened]:
    watch = Opened(folder)
    try:
        yield watch
    finally:
        os.close(watch.descriptor)


async def test_files_that_a_query_opens(tmp_path: Path) -> None:
    lake = MemoryHarness(BusSettings(shards=1, claim_entries_max=1), live=True)
    async with sql_stack(lake, tmp_path) as stack:
        table = await lake.create()

        async def write(number: int) -> None:
            await lake.accept(
                entry_of(table, [number * 10 + k for k in range(10)], note=f"{number}")
            )
            await stack.writer.publish_one()

        for number in range(FILES):
            await write(number)
        with opened(tmp_path / "objects" / "data") as watch:
            assert await _opens(stack, watch, "SELECT note FROM t WHERE id = 123") <= 1
            assert await _opens(stack, watch, "SELECT note FROM t WHERE id IN (7, 399)") <= 2
            assert await _opens(stack, watch, "SELECT note FROM t ORDER BY id DESC LIMIT 10") <= 1
            assert await _opens(stack, watch, "SELECT count(*) FROM t WHERE id < 0") == 0
            # Counts come from footers, which are read once; the first file's is looked at again.
            assert await _opens(stack, watch, "SELECT count(*) FROM t") == FILES
            assert await _opens(stack, watch, "SELECT count(*) FROM t") <= 1
            await write(FILES)
            fresh = f"SELECT count(*), max(id) FROM t WHERE id >= {10 * FILES}"
            assert await _opens(stack, watch, fresh) == 1


async def _opens(stack: SqlStack, watch: Opened, sql: str) -> int:
    """How many files the statement opens; asked a second time, no more of them."""

    watch.take()
    found = []
    for _ in range(2):
        answer = await stack.rows(sql)
        names = watch.take()
        found.append((answer, len(names)))
    (first, files), (second, again) = found
    assert first == second
    assert again <= files
    return files


def test_a_query_reads_its_files_in_its_own_threads(tmp_path: Path) -> None:
    """Threads that only read would be woken and waited for at each column of each file."""

    for number in range(FILES):
        rows = pa.table({"id": pa.array(range(number * 10, number * 10 + 10), pa.int64())})
        pq.write_table(rows, tmp_path / f"{number}.parquet")
    settings = EngineSettings(
        allowed_directory=str(tmp_path), temp_directory=str(tmp_path / "spill"), threads=2
    )
    before = len(os.listdir("/proc/self/task"))
    connection = open_database(settings, threads=2)
    try:
        sql = f"SELECT count(*), sum(id) FROM read_parquet('{tmp_path}/*.parquet')"
        total = 10 * FILES
        assert connection.execute(sql).fetchone() == (total, total * (total - 1) // 2)
        assert len(os.listdir("/proc/self/task")) <= before + 1  # the second worker
    finally:
        connection.close()


# --- statements ----------------------------------------------------------------------------------


class Counting:
    """A connection to DuckDB, whose statements are counted, and those of its cursors."""

    def __init__(self, inner: Any, counts: Counter[str]) -> None:
        self._inner = inner
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("execute", "sql", "extract_statements"):
            return found

        def counted(*given: Any, **named: Any) -> Any:
            self._counts[name] += 1
            return found(*given, **named)

        return counted

    def cursor(self) -> Counting:
        return Counting(self._inner.cursor(), self._counts)


def test_statements_that_duckdb_is_given(tmp_path: Path) -> None:
    """A lane's whole work for one query, in this process."""

    settings = EngineSettings(
        allowed_directory=str(tmp_path), temp_directory=str(tmp_path / "spill"), threads=1
    )
    counts: Counter[str] = Counter()
    opened_database = child_main._open(settings, "counted", threads=1)
    connection: Any = Counting(opened_database.connection, counts)
    database = Database(
        connection, ScopeCache(connection, entries_max=64), SmallAnswers(entries_max=64)
    )
    guard = child_main._SharedGuard(database, read_rules(connection), settings)
    ours, theirs = socket.socketpair()
    lane = Lane(theirs, parallel=database, ordered=database, check=guard.judge)
    thread = threading.Thread(target=lane.serve)
    thread.start()

    def ask(least: int, file: int) -> dict[str, int]:
        path = tmp_path / f"{file}.parquet"
        if not path.exists():
            pq.write_table(pa.table({"id": pa.array(range(10), pa.int64())}), path)
        source = WireSource("t", ("id",), f"(SELECT id FROM read_parquet(['{path}']))")
        counts.clear()
        sql = f"SELECT count(*), max(id) FROM t WHERE id >= {least}"
        request = RunRequest(
            1, sql, "", (source,), "json", "string", 10, 1 << 20, False, "2026-01-01T00:00:00+00:00"
        )
        ours.sendall(frame(RUN, encode(request)))
        while (found := read_frame(ours)) is not None and found[0] != END:
            pass
        return dict(counts)

    try:
        for number in range(12):  # a statement like it is known, and scopes can be taken over
            ask(number % 5, number)
        assert ask(1, 11) == {"execute": 1}
        # The guard reads a new text twice; a new snapshot is a view and a search path.
        assert ask(7, 11) == {"extract_statements": 1, "execute": 2}
        assert ask(8, 12) == {"extract_statements": 1, "execute": 4}
    finally:
        ours.close()
        thread.join()
        theirs.close()
        opened_database.connection.close()
