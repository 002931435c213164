"""Stacks for acceptance tests: started as a person would, watched from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.leftovers import leftovers
from cluster.processes import ProcessMark
from cluster.stack_files import StackFiles, StackState

ROOT = Path(__file__).parents[2]
LISTENING = "0A"
START_S = 120.0


def wait_until(what: Callable[[], Any], *, within_s: float, why: str) -> Any:
    """Look until there is something; what is waited for lives in other processes."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s:.0f} s: {why}")


def lakebus(*arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command; returns (exit code, standard output, standard error)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LAKEBUS_")}
    done = subprocess.run(
        [sys.executable, "-m", "lakebus", *arguments],
        cwd=ROOT,
        env=clean | (environ or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )
    return done.returncode, done.stdout, done.stderr


class RunningStack:
    """A stack with the smallest application, in a process of its own."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.files = StackFiles(data_dir)
        self.output = data_dir / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start; `ready` waits for the end."""
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.acceptance.stack_process", str(self.data_dir)],
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )

    def ready(self) -> StackState:
        """The state once the stack answers."""
        process = self.process
        assert process is not None

        def look() -> StackState | None:
            if process.poll() is not None:
                raise AssertionError(f"the stack ended: {self.output.read_text()}")
            state = self.files.state()
            mine = state is not None and state.supervisor.pid == process.pid
            return state if mine and state is not None and state.phase == "ready" else None

        found: StackState = wait_until(look, within_s=START_S, why="the stack gets ready")
        return found

    def ask(self, path: str = "/who") -> dict[str, Any]:
        connection = self.files.connection()
        assert connection is not None
        with urllib.request.urlopen(connection["url"] + path, timeout=10) as answer:
            value: dict[str, Any] = json.loads(answer.read())
        return value

    def answers(self) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            return self.ask()
        return None

    def postgres(self) -> ProcessMark | None:
        """The mark of the database server that runs for this stack."""
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((self.data_dir / "postgres" / "state.json").read_text())
            mark = ProcessMark.from_json(state["process"])
            return mark if mark is not None and mark.alive() else None
        return None

    def living(self) -> list[ProcessMark]:
        """All that runs for this stack, but the database and the supervisor."""
        state = self.files.state()
        return leftovers(state, self.files.stack_id())

    def remove(self) -> None:
        """Delete all its files, those of Ray too."""
        state = self.files.state()
        if state is not None and state.run_dir:
            shutil.rmtree(state.run_dir, ignore_errors=True)
        shutil.rmtree(self.data_dir)

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=60)


def listeners(pids: set[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which one of these processes listens."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    target = os.readlink(descriptor)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """The kernel's hexadecimal address in usual words; IPv4 inside IPv6 as IPv4."""
    words = [bytes.fromhex(text[place : place + 8])[::-1] for place in range(0, len(text), 8)]
    if len(words) == 1:
        return ".".join(str(byte) for byte in words[0])
    if words[:2] == [bytes(4)] * 2 and words[2] == b"\x00\x00\xff\xff":
        return ".".join(str(byte) for byte in words[3])
    whole = b"".join(words)
    return "::1" if whole == bytes(15) + b"\x01" else whole.hex(":", 2)
