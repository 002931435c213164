"""Clearing away what a killed stack left behind, and nothing else.

Most of a stack dies with its supervisor by the kernel's hand (`cluster/ray_host.py`). What may be
left for a moment is found in two ways, both of which name one stack and one process: the marks that
the supervisor wrote down, with all that descends from them, and the stack's random id in the
environment of the process.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cluster import processes
from cluster.processes import ProcessMark
from cluster.ray_environment import STACK_VARIABLE
from cluster.stack_files import StackState

_STEPS = ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0))


def leftovers(state: StackState | None, stack_id: str) -> list[ProcessMark]:
    """Living processes of this stack other than its database, ourselves and our supervisor."""
    recorded: list[ProcessMark] = []
    if state is not None:
        recorded = [*state.processes, *([state.host] if state.host else [])]
    found = {mark.pid: mark for mark in recorded if mark.alive()}
    for mark in list(found.values()):
        found |= {below.pid: below for below in processes.descendants(mark.pid)}
    found |= {mark.pid: mark for mark in with_stack_id(stack_id)}
    found.pop(os.getpid(), None)
    return list(found.values())


def with_stack_id(stack_id: str) -> list[ProcessMark]:
    """All processes that were born with this stack's id in their environment."""
    wanted = f"{STACK_VARIABLE}={stack_id}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if wanted in environment.split(b"\0"):
            mark = ProcessMark.of(int(entry))
            if mark is not None:
                found.append(mark)
    return found


async def clear(state: StackState | None, stack_id: str) -> int:
    """Stop all leftovers and return how many there were."""
    first = leftovers(state, stack_id)
    living = first
    # Killing a parent may bring up children that were not listed; three rounds see the last.
    for _ in range(3):
        if not living:
            break
        await processes.stop(living, _STEPS)
        living = leftovers(state, stack_id)
    return len(first)
