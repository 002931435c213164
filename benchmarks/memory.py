"""Memory of a stack: the proportional set size of all its processes, so that shared pages count
once."""

from __future__ import annotations

from pathlib import Path

from benchmarks.show.processes import descendants


def stack_memory_mib(supervisor: int) -> int:
    pids = [supervisor, *(pid for pid, _ in descendants(supervisor))]
    return round(sum(proportional_kib(pid) for pid in pids) / 1024)


def proportional_kib(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
