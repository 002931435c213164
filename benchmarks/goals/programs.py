"""Programs that measure windows, seen from the harness: started, told to go, and always ended.

Each runs in a session of its own, so that a program and all it started can be ended together, and
nothing is waited for without a limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
_END_S = 2.0
#: For a program that has a stack of its own and takes it down when it is interrupted.
_DOWN_S = 60.0


class Failed(Exception):
    """A turn gave no figure; the text says why, for the report."""


class Program:
    """A running program that speaks the protocol of `benchmarks.windows`."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._name = process, name
        self._lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, timeout_s: float) -> dict[str, Any]:
        return self._answer(timeout_s, "get ready")

    def window(self, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self._write(arguments)
        return self._answer(timeout_s, "end a window")

    def _write(self, document: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(document) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Failed(f"{self._name} ended before it was asked") from error

    def _answer(self, timeout_s: float, what: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise Failed(f"{self._name} did not {what} within {timeout_s:g} s") from None
        if not line:
            raise Failed(f"{self._name} ended instead of saying what it found; see its log")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        end(self._process)
        self._reader.join(_END_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self, stdout: TextIO) -> None:
        with contextlib.suppress(ValueError):  # the pipe was closed under us
            for line in stdout:
                if line.startswith("{"):  # libraries also print
                    self._lines.put(line)
        self._lines.put("")


@contextmanager
def program(
    module: str, order: dict[str, Any], *, python: str = sys.executable, log: Path
) -> Iterator[Program]:
    """`python -m module`, given its order; ended with everything it started."""

    with open(log, "ab") as words:
        process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        found = Program(process, module)
        try:
            found._write(order)
            yield found
        finally:
            found.end()


def said(command: list[str], *, timeout_s: float, log: Path) -> str:
    """The standard output of a program that runs once."""

    with open(log, "ab") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, text=True,
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"{' '.join(command[1:4])} took longer than {timeout_s:g} s") from None
        finally:
            try:
                _interrupt(process)
            finally:
                end(process)
                assert process.stdout is not None
                process.stdout.close()
    if process.returncode != 0:
        raise Failed(f"{' '.join(command[1:4])} ended with {process.returncode}; see its log")
    return text


def _interrupt(process: subprocess.Popen[str]) -> None:
    """A stack that it started is in no group of processes that `end` could kill."""

    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DOWN_S)


def end(process: subprocess.Popen[str]) -> None:
    """Close its stdin, which ends a program of ours; what does not go is killed, children too."""

    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.stdin is not None:
            process.wait(timeout=_END_S)
    # The leader is ours until it is waited for; its group has no other use for the number.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
