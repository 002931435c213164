"""The processes of one running stack, found by the stack's own mark in their environment.

Only processes that carry the stack's id are ever returned, so that a scenario can end one by pid
without touching anything that belongs to somebody else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

STACK_VARIABLE = "LAKEBUS_STACK_ID"


def stack_processes(stack_id: str) -> Iterator[tuple[int, str]]:
    """(pid, title) of every live process of the stack."""

    mark = f"{STACK_VARIABLE}={stack_id}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if mark not in folder.joinpath("environ").read_bytes().split(b"\0"):
                continue
            title = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            state = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, UnicodeDecodeError):
            continue
        if state != "Z":
            yield int(folder.name), title


def pids_of(stack_id: str, *words: str) -> list[int]:
    """Processes of the stack whose title holds all the words, oldest first."""

    found = [pid for pid, title in stack_processes(stack_id) if all(w in title for w in words)]
    return sorted(found)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
