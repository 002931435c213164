"""CPU and memory of a stack and of peers, by group of processes, from /proc.

CPU of a process counts its children that ended and were waited for, so that the sum over a tree
only grows by what was really used between two looks.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.memory import proportional_kib
from benchmarks.show.processes import descendants

_TICKS = os.sysconf("SC_CLK_TCK")

#: First match wins; words of a process's command line. What matches none belongs to its parent's
#: group: the engine's processes to their query replica.
GROUPS = (
    ("PostgreSQL", ("postgres",)),
    ("HAProxy", ("haproxy",)),
    ("ingest replica", ("ServeReplica", ":api")),
    ("query replica", ("ServeReplica", ":query")),
    ("core", ("RoleActor",)),
    ("core", ("RoleHost",)),
    ("jobs", (":job:",)),
)
OTHER = "Ray, Serve and supervisor"


def group_of(title: str) -> str | None:
    for group, words in GROUPS:
        if all(word in title for word in words):
            return group
    return None


def cpu_seconds(root: int) -> dict[str, float]:
    """CPU seconds by group of the process and all below it, since each began."""

    found: defaultdict[str, float] = defaultdict(float)
    for pid, group in tree(root):
        found[group] += cpu_of(pid)
    return dict(found)


def memory_mib(root: int) -> Counter[str]:
    """Proportional memory by group: shared pages count once."""

    found: Counter[str] = Counter()
    for pid, group in tree(root):
        found[group] += proportional_kib(pid)
    return Counter({group: round(kib / 1024) for group, kib in found.items()})


def tree(root: int) -> list[tuple[int, str]]:
    """(pid, group) of the process and all below it."""

    titles = {root: _title(root), **dict(descendants(root))}
    return [(pid, _group(pid, titles)) for pid in titles]


def _group(pid: int, titles: dict[int, str]) -> str:
    while pid in titles:
        if (group := group_of(titles[pid])) is not None:
            return group
        pid = _parent(pid)
    return OTHER


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def cpu_of(pid: int) -> float:
    """0 for a process that has gone."""

    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS


def used(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was used between two looks; a group can only grow."""

    return {
        group: round(max(after.get(group, 0.0) - before.get(group, 0.0), 0.0), 3)
        for group in sorted(after.keys() | before.keys())
    }


def busy_seconds() -> float:
    """What all processors of the machine were busy with, since it began; what the hypervisor took
    is in it."""

    fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, _, _, irq, softirq, stolen, *_ = map(int, fields)
    return (user + nice + system + irq + softirq + stolen) / _TICKS


def status_mib(pid: int, field: str) -> float:
    """`VmRSS` or `VmHWM` (the peak) of a process; 0 for one that has gone."""

    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = (line for line in text.splitlines() if line.startswith(f"{field}:"))
    return next((int(line.split()[1]) / 1024 for line in lines), 0.0)
