"""The `Recorder`: writes a record so that the order of logging cannot be got wrong.

::

    recorder = Recorder.to_file(folder / "client-3.jsonl", process="client-3")
    with recorder.begin("c3", Ingest(request=17, principal="p", target="t", tables={"t": 2})) as op:
        answer = send(...)                     # the invoke is already on its way to disk
        op.ok(Receipted(Receipt.of(answer["receipt"], codec.decode(...))))

Leaving the block by an exception logs the end that the exception proves: a typed error with no
effect is `fail`, everything else (also cancellation) is `unknown`; the exception goes on. Leaving
it quietly without an end logs `unknown` and raises `RecordMisused`.

Why it is safe: each event is one write to a file opened for appending, so a killed process loses
at most the event that it had not handed to the kernel, and the reader skips a cut last line. There
is no fsync: the record has to survive its process, not its machine. Usable from several threads
and tasks; times are made strictly increasing under a lock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from lakebus.errors import LakebusError
from tests.history.record import (
    RESULT_OF,
    Event,
    Fail,
    Header,
    History,
    Invoke,
    Line,
    Note,
    Ok,
    Operation,
    Result,
    Unknown,
    assemble,
    encode_line,
)

#: Typed answers that do not say whether the write happened.
UNKNOWN_CODES = frozenset({"outcome_unknown", "internal_error", "corrupt", "cancelled"})

__all__ = ["UNKNOWN_CODES", "Open", "RecordMisused", "Recorder"]


class RecordMisused(Exception):
    """The workload logs in a way that would make the record worthless."""


def monotonic_clock_name() -> str:
    """`time.monotonic_ns` counts from boot: times compare only within one boot of one machine."""

    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"process-{os.getpid()}"
    return f"monotonic:{boot}"


class Open:
    """An operation under way. Give it exactly one end."""

    def __init__(self, recorder: Recorder, client: str, operation: Operation) -> None:
        self._recorder = recorder
        self._client = client
        self.operation = operation
        self.id = ""
        self.ended = False

    def ok(self, result: Result) -> None:
        if type(result) is not RESULT_OF[type(self.operation)]:
            raise RecordMisused(
                f"{type(result).__name__} does not answer {type(self.operation).__name__}"
            )
        self._end(lambda at: Ok(self.id, at, result))

    def fail(self, code: str, detail: str = "", *, batch_id: str | None = None) -> None:
        """A typed answer. A code that does not exclude an effect is logged as unknown."""

        if code in UNKNOWN_CODES:
            self.unknown(code)
        else:
            self._end(lambda at: Fail(self.id, at, code, detail[:200], batch_id))

    def unknown(self, reason: str) -> None:
        self._end(lambda at: Unknown(self.id, at, reason[:200]))

    def error(self, error: LakebusError) -> None:
        """The end that one of our typed errors proves."""

        batch_id = error.members.get("batch_id")
        self.fail(
            error.code, error.detail, batch_id=batch_id if isinstance(batch_id, str) else None
        )

    def _end(self, make: Callable[[int], Event]) -> None:
        if not self.id:
            raise RecordMisused("an operation ends inside its `with` block")
        if self.ended:
            raise RecordMisused(f"operation {self.id} has ended already")
        self.ended = True
        self._recorder.write(make)

    def __enter__(self) -> Self:
        if self.id:
            raise RecordMisused(f"operation {self.id} was begun already; begin another")
        self.id = identity = self._recorder.next_id()
        self._recorder.write(lambda at: Invoke(identity, at, self._client, self.operation))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ended:
            return
        if isinstance(error, LakebusError):
            self.error(error)
        elif error is not None:
            self.unknown(f"{type(error).__name__}: {error}")
        else:
            self.unknown("the workload logged no end")
            raise RecordMisused(f"operation {self.id} was left without ok, fail or unknown")


class Recorder:
    """Writes events to a file, or keeps them (`in_memory`). One for each process and start."""

    def __init__(
        self, header: Header, *, now_ns: Callable[[], int], descriptor: int | None = None
    ) -> None:
        self.header = header
        self._now_ns = now_ns
        self._descriptor = descriptor
        self._in_memory = descriptor is None
        self._kept: list[Line] = []
        self._lock = threading.Lock()
        self._last = -1
        self._count = 0
        self._put(header)

    @staticmethod
    def to_file(
        path: Path,
        *,
        process: str,
        seed: int | None = None,
        base: dict[int, int] | None = None,
        closed: bool = True,
    ) -> Recorder:
        """Raises FileExistsError: a process that starts again takes a new file and name."""

        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        header = Header(process, monotonic_clock_name(), seed, base or {}, closed)
        return Recorder(header, now_ns=time.monotonic_ns, descriptor=descriptor)

    @staticmethod
    def in_memory(
        *,
        process: str = "memory",
        now_ns: Callable[[], int] = time.monotonic_ns,
        seed: int | None = None,
        base: dict[int, int] | None = None,
        closed: bool = True,
    ) -> Recorder:
        """For simulations: `now_ns` may stand still, events are ordered by being logged."""

        clock = monotonic_clock_name() if now_ns is time.monotonic_ns else "virtual"
        return Recorder(Header(process, clock, seed, base or {}, closed), now_ns=now_ns)

    def begin(self, client: str, operation: Operation) -> Open:
        """Use as `with recorder.begin(...) as op:`; nothing is logged before the block."""

        return Open(self, client, operation)

    def note(self, text: str) -> None:
        self.write(lambda at: Note(at, text))

    @property
    def lines(self) -> tuple[Line, ...]:
        """What was kept; only of a recorder in memory."""

        return tuple(self._kept)

    def history(self) -> History:
        """The record of this recorder alone; only in memory."""

        if not self._in_memory:
            raise RecordMisused("load the files with tests.history.record.load")
        return assemble([self._kept])

    def next_id(self) -> str:
        with self._lock:
            self._count += 1
            return f"{self.header.process}.{self._count}"

    def write(self, make: Callable[[int], Event]) -> None:
        """Stamps and writes one event; later than every earlier one of this recorder."""

        with self._lock:
            self._last = at = max(self._now_ns(), self._last + 1)
            self._put(make(at))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _put(self, line: Line) -> None:
        if self._in_memory:
            self._kept.append(line)
            return
        if self._descriptor is None:
            raise RecordMisused("the record was closed")
        data = encode_line(line)
        if os.write(self._descriptor, data) != len(data):
            raise OSError("the record's disk is full: its last line was cut")
