"""The processes of one running stack: what descends from the `lakebus up` that runs it.

Only descendants of that process are ever returned, so that a scenario can end one by pid without
touching anything that belongs to somebody else.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path


def supervisor_of(data_dir: Path) -> int:
    """The pid of the stack's supervisor, as its state file says."""

    state = json.loads((data_dir / "state.json").read_text(encoding="utf-8"))
    return int(state["supervisor"]["pid"])


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of every live process below `pid`, oldest first."""

    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
            title = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)] = int(parent)
            titles[int(folder.name)] = title.decode("utf-8", "replace").strip()
    found = {pid}
    while grown := {one for one, parent in parents.items() if parent in found} - found:
        found |= grown
    return sorted((one, titles[one]) for one in found - {pid} if one in titles)


def pids_of(supervisor: int, *words: str) -> list[int]:
    """Descendants whose command line holds all the words, oldest first."""

    return [pid for pid, title in descendants(supervisor) if all(w in title for w in words)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
