"""Processes as lakebus knows them: a pid together with the moment it started.

A pid alone is no identity: the kernel gives it to somebody else later. A mark holds the pid, the
start time in clock ticks since boot and the boot's id, so that a signal can only ever reach the
process that was recorded. Nothing here, or anywhere in lakebus, finds a process by its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """One process of this boot; equal marks are the same process."""

    pid: int
    started_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessMark | None:
        """The mark of a living process, or None if there is none with this pid."""
        stat = _stat(pid)
        if stat is None or stat.state in "ZX":
            return None
        return cls(pid=pid, started_ticks=stat.started_ticks, boot_id=_boot_id())

    @classmethod
    def from_json(cls, value: Any) -> ProcessMark | None:
        """Read a mark from a state file; anything else than a mark is None."""
        if not isinstance(value, dict):
            return None
        pid, ticks, boot = value.get("pid"), value.get("started_ticks"), value.get("boot_id")
        if isinstance(pid, int) and isinstance(ticks, int) and isinstance(boot, str) and pid > 1:
            return cls(pid=pid, started_ticks=ticks, boot_id=boot)
        return None

    def to_json(self) -> dict[str, Any]:
        return {"pid": self.pid, "started_ticks": self.started_ticks, "boot_id": self.boot_id}

    def alive(self) -> bool:
        """True while exactly this process runs (a zombie does not run)."""
        return ProcessMark.of(self.pid) == self

    def send(self, signal_number: int) -> bool:
        """Signal the process if it is still the recorded one; False if it is gone."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, signal_number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent_pid: int
    started_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The second field is the command in parentheses and may hold anything, so cut behind it.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(state=fields[0], parent_pid=int(fields[1]), started_ticks=int(fields[19]))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def descendants(pid: int) -> list[ProcessMark]:
    """Marks of all living processes below `pid`, parents before children."""
    children: dict[int, list[ProcessMark]] = {}
    boot_id = _boot_id()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        stat = _stat(int(entry))
        if stat is not None and stat.state not in "ZX":
            mark = ProcessMark(int(entry), stat.started_ticks, boot_id)
            children.setdefault(stat.parent_pid, []).append(mark)
    found: list[ProcessMark] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(0), [])
        found.extend(below)
        waiting.extend(mark.pid for mark in below)
    return found


def working_directory(pid: int) -> Path | None:
    """The current folder of a process, where we may look."""
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:  # gone, a kernel thread, or another user's
        return None


def working_in(folder: Path) -> list[ProcessMark]:
    """All processes whose current folder is exactly this one, as far as we may look."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and working_directory(int(entry)) == folder:
            mark = ProcessMark.of(int(entry))
            if mark is not None:
                found.append(mark)
    return found


async def wait_gone(mark: ProcessMark, *, timeout_s: float | None = None) -> bool:
    """Wait until the process is gone (True) or the time is up (False)."""
    try:
        descriptor = os.pidfd_open(mark.pid)
    except (AttributeError, OSError):  # an old kernel, or it is gone already
        return await _poll_gone(mark, timeout_s)
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        if not mark.alive():
            return True
        await asyncio.wait_for(gone.wait(), timeout_s)
        return True
    except TimeoutError:
        return not mark.alive()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _poll_gone(mark: ProcessMark, timeout_s: float | None) -> bool:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while mark.alive():
        if deadline is not None and time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


async def stop(marks: Iterable[ProcessMark], steps: Iterable[tuple[int, float]]) -> bool:
    """Send each signal in turn to all that still live and give them its seconds to end.

    :param steps: pairs of (signal number, seconds to wait), gentlest first.
    :return: True if none of them lives.
    """
    living = [mark for mark in marks if mark.alive()]
    for signal_number, wait_s in steps:
        if not living:
            return True
        for mark in living:
            with contextlib.suppress(PermissionError):
                mark.send(signal_number)
        await asyncio.gather(*(wait_gone(mark, timeout_s=wait_s) for mark in living))
        living = [mark for mark in living if mark.alive()]
    return not living


GENTLY_THEN_HARD: tuple[tuple[int, float], ...] = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
"""The usual way to stop a process of ours."""
