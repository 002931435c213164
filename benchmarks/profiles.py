"""Where processor time goes in a stack at work: flame graphs of an ingest replica, the actor of the
roles, a query replica and its engine.

`python -m benchmarks.profiles [--clients 64 --query-clients 4 --seconds 15 --door direct]`

Needs py-spy (Ray brings it) and leave to look into other processes: as root, or with the kernel's
setting `kernel.yama.ptrace_scope` at 0. A stack of its own is loaded by closed loops of 100-row
JSON requests and of small queries over what is written; the processes are looked at one after
another, 100 times a second. A sample is a thread of Python that runs, or is in a C function that
it called; threads that libraries have for themselves (DuckDB's, Arrow's, Ray's) are not seen.
Writes a picture (SVG) of each and `flames.md` with the dearest frames to `--out`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measures
from benchmarks.flames import Stacks, at_work, picture, read_folded, table
from benchmarks.goals import processes
from benchmarks.goals.programs import Failed, Program, program
from benchmarks.machine import describe
from benchmarks.show.processes import descendants
from benchmarks.stacks import RunningStack, end_as_interrupted, running_stack

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "flames"
TABLE = "profiled"
QUESTIONS = (
    f"SELECT count(*) FROM {TABLE}",
    f"SELECT region, count(*), avg(value) FROM {TABLE} GROUP BY region",
    f"SELECT max(event_id) FROM {TABLE} WHERE device = 77",
)
_RATE, _SETTLE_S, _LOOK_S, _READY_S, _LONGEST_S = 100, 5.0, 1.0, 60.0, 600.0
#: py-spy counts samples, not seconds: it is told to end when the time is over, and writes what it
#: has. One that does not is killed, and the others are still looked at.
_LATE_S, _WRITE_S = 5.0, 20.0


@dataclass(frozen=True, slots=True)
class Target:
    """`group`: as `benchmarks.goals.processes` names it; `child`: one that it started, instead."""

    name: str
    title: str
    group: str
    child: bool = False


TARGETS = (
    Target("ingest_replica", "ingest replica", "ingest replica"),
    Target("roles", "actor of the roles", "core"),
    Target("query_replica", "query replica", "query replica"),
    Target("engine", "engine process of the query replica", "query replica", child=True),
)


@dataclass(frozen=True, slots=True)
class Profile:
    target: Target
    stacks: Stacks
    cores: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiles", description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--query-clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each process")
    parser.add_argument("--door", choices=("direct", "serve"), default="direct")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        print("py-spy is not here: pip install py-spy (the runtime requirements have it)")
        return 2
    end_as_interrupted()
    about = describe()
    with running_stack() as stack:
        url = stack.ingest_url if given.door == "direct" else None
        conditions = (
            f"{given.clients} ingest clients of 100-row JSON requests at the"
            f" {'direct' if url else 'Serve'} door and {given.query_clients} query clients,"
            f" closed loops; {given.seconds:g} s for each process, {_RATE} samples a second"
        )
        profiles, unseen = _under_load(spy, stack, url or stack.url, given)
    write(given.out, profiles, about=about, conditions=conditions, unseen=unseen)
    print(given.out / "flames.md")
    return 1 if unseen else 0


def _under_load(
    spy: str, stack: RunningStack, url: str, given: argparse.Namespace
) -> tuple[list[Profile], list[str]]:
    """What was seen, and of what could not be looked at, why."""

    found: list[Profile] = []
    unseen: list[str] = []
    asyncio.run(measures.make_table(stack.url, stack.api_key, TABLE))
    ingest: dict[str, Any] = {
        "url": url, "read_url": stack.url, "api_key": stack.api_key, "table": TABLE,
        "clients": given.clients, "rows": 100, "seed": 1, "warm_s": 1.0,
    }  # fmt: skip
    queries: dict[str, Any] = {
        "url": stack.url, "api_key": stack.api_key, "clients": given.query_clients,
        "questions": list(QUESTIONS),
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="lakebus-profiles-") as folder,
        program("benchmarks.closed_load", ingest, log=Path(folder) / "ingest.log") as writers,
        program("benchmarks.query_load", queries, log=Path(folder) / "queries.log") as readers,
    ):
        writers.ready(_READY_S)
        readers.ready(_READY_S)
        loads = [_in_background(load) for load in (writers, readers)]
        time.sleep(_SETTLE_S)
        for target in TARGETS:
            try:
                found.append(_profile(spy, stack.supervisor, target, given.seconds, Path(folder)))
            except Failed as error:
                unseen.append(str(error))
                print(error, file=sys.stderr)
        if not all(load.is_alive() for load in loads):
            raise Failed("a load ended before the last process had been looked at")
    return found, unseen


def _in_background(load: Program) -> threading.Thread:
    def drive() -> None:
        with contextlib.suppress(Failed):  # it is ended with the run, before its window is over
            load.window(2 * _LONGEST_S, seconds=_LONGEST_S)

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    return thread


def _profile(spy: str, supervisor: int, target: Target, seconds: float, folder: Path) -> Profile:
    print(f"{target.title} …", file=sys.stderr)
    pid = busiest(supervisor, target)
    raw = folder / f"{target.name}.folded"
    command = [
        spy, "record", "--pid", str(pid), "--duration", f"{seconds:.0f}", "--rate", str(_RATE),
        # Stopping all threads for each sample took it 15 ms and more in a process with many, and
        # slowed what was measured; without, a stack is torn now and then and left out.
        "--nonblocking",
        "--format", "raw", "--full-filenames", "--function", "--output", str(raw),
    ]  # fmt: skip
    before, began = processes.cpu_of(pid), time.monotonic()
    code, said = ended_in_time(command, seconds + _LATE_S)
    used = (processes.cpu_of(pid) - before) / (time.monotonic() - began)
    if code is None:
        raise Failed(f"py-spy at the {target.title} did not end in time")
    if code != 0 or not raw.exists():
        raise Failed(f"py-spy at the {target.title}: {said.strip()[-400:]}")
    stacks = read_folded(raw.read_text(encoding="utf-8", errors="replace"), checkout=str(ROOT))
    return Profile(target, at_work(stacks), used)


def ended_in_time(
    command: Sequence[str], seconds: float, *, write_s: float = _WRITE_S
) -> tuple[int | None, str]:
    """The code and the words of a program: interrupted at the time, killed (None) a while after."""

    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            _, said = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)
            try:
                _, said = running.communicate(timeout=write_s)
            except subprocess.TimeoutExpired:
                return None, ""
        finally:
            running.kill()  # does nothing to one that has ended
    return running.returncode, said


def busiest(supervisor: int, target: Target) -> int:
    """The process of that kind that takes most of the processor."""

    known = dict(descendants(supervisor))
    leaders = [pid for pid, title in known.items() if processes.group_of(title) == target.group]
    pids = leaders
    if target.child:
        pids = [pid for leader in leaders for pid, _ in descendants(leader)]
    if not pids:
        raise Failed(f"the stack has no {target.title}")
    before = {pid: processes.cpu_of(pid) for pid in pids}
    time.sleep(_LOOK_S)
    return max(pids, key=lambda pid: processes.cpu_of(pid) - before[pid])


# --- what is written -------------------------------------------------------------------------


def write(
    out: Path,
    profiles: Sequence[Profile],
    *,
    about: dict[str, Any],
    conditions: str,
    unseen: Sequence[str] = (),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for profile in profiles:
        title = f"{profile.target.title}: {sum(profile.stacks.values()):,} samples"
        text = picture(profile.stacks, title=title)
        (out / f"{profile.target.name}.svg").write_text(text, encoding="utf-8")
    text = report(profiles, about, conditions, unseen)
    (out / "flames.md").write_text(text, encoding="utf-8")


def report(
    profiles: Sequence[Profile],
    about: dict[str, Any],
    conditions: str,
    unseen: Sequence[str] = (),
) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in about["packages"].items())
    lines = [
        "# Where processor time goes",
        "",
        f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, kernel "
        f"{about['kernel']}, Python {about['python']}; {versions}; commit {about['commit']}; load "
        f"average {about['load_average_at_start']} at the start. {conditions}.",
        "",
        "Made by `python -m benchmarks.profiles`. A sample is a Python thread that runs, or is in a"
        " C function that it called; threads that libraries have for themselves (DuckDB's, Arrow's,"
        " Ray's) are not seen, so the cores that a process took may be more than its samples tell."
        " Threads that only wait are left out, and with them what uvloop does in C (sockets).",
    ]
    if unseen:
        lines += ["", f"Not seen: {'; '.join(unseen)}."]
    for profile in profiles:
        samples = sum(profile.stacks.values())
        lines += [
            "",
            f"## {profile.target.title}",
            "",
            f"{samples:,} samples; the process took {profile.cores:.2f} cores meanwhile.",
            "",
            f"![{profile.target.title}]({profile.target.name}.svg)",
            "",
            *table(profile.stacks),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
