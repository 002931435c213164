"""`python -m tests.simulation --seed N [--count K] [--minutes M] [--jobs J] [--verbose]`

Runs the schedules of seeds N, N+1, … until K are done or M minutes are over, and prints what came
of them. Ends with 1 when a schedule showed an anomaly, after its seed and what it showed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.history.record import encode_line
from tests.simulation.run import Run, many_runs, simulate, simulate_all, tidy

#: Seeds that a process is given at once.
_CHUNK = 25


@dataclass(slots=True)
class Summary:
    began_s: float = field(default_factory=time.perf_counter)
    jobs: int = 1
    runs: int = 0
    steps: int = 0
    virtual_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self.runs += 1
        self.steps += run.steps
        self.virtual_s += run.virtual_s
        self.outcomes += run.outcomes
        self.faults += run.faults
        if run.problems:
            self.failed.append(run.seed)

    def text(self) -> str:
        spent_s = time.perf_counter() - self.began_s
        lines = [
            f"{self.runs} schedules in {spent_s:.1f} s with {self.jobs} processes: "
            f"{self.runs / spent_s * 60:.0f} a minute; {self.steps} steps, "
            f"{self.virtual_s / 3600:.1f} h of virtual time",
            "faults: " + _counted(self.faults),
            "outcomes: " + _counted(self.outcomes),
        ]
        if self.failed:
            lines.append(f"anomalies in the seeds {', '.join(map(str, self.failed))}")
        return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--count", type=int, help="how many seeds (1 when no --minutes is given)")
    parser.add_argument("--minutes", type=float, help="how long at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--verbose", action="store_true", help="print what everybody was told")
    asked = parser.parse_args(arguments)
    count = asked.count or (None if asked.minutes else 1)
    summary = Summary(jobs=1 if count == 1 else asked.jobs)
    until_s = summary.began_s + asked.minutes * 60 if asked.minutes else None
    runs = _alone if summary.jobs == 1 else _side_by_side
    for run in runs(asked.seed, count, until_s, summary.jobs):
        summary.add(run)
        _tell(run, verbose=asked.verbose)
    print(summary.text())
    return 1 if summary.failed else 0


def _alone(seed: int, count: int | None, until_s: float | None, _: int) -> Iterator[Run]:
    done = 0
    with many_runs():
        while (count is None or done < count) and not _late(until_s):
            yield simulate(seed + done)
            done += 1
            tidy(done)


def _side_by_side(seed: int, count: int | None, until_s: float | None, jobs: int) -> Iterator[Run]:
    """The same runs in the same order, several at a time, each in one of `jobs` processes."""

    begun = 0
    waiting: list[Future[list[Run]]] = []
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        while True:
            while len(waiting) < 2 * jobs and not _late(until_s):
                seeds = range(seed + begun, seed + min(begun + _CHUNK, count or begun + _CHUNK))
                if not seeds:
                    break
                waiting.append(pool.submit(simulate_all, seeds))
                begun += len(seeds)
            if not waiting:
                return
            yield from waiting.pop(0).result()


def _late(until_s: float | None) -> bool:
    return until_s is not None and time.perf_counter() > until_s


def _tell(run: Run, *, verbose: bool) -> None:
    if verbose:
        for line in run.lines:
            print(encode_line(line).decode(), end="")
        print(f"seed {run.seed}: {run.plan.describe()}\ndigest {run.digest}, {run.steps} steps")
    if run.problems:
        print(f"seed {run.seed} shows {len(run.problems)} anomalies; {run.plan.describe()}")
        for problem in run.problems[:10]:
            print(f"  {problem}")
        print(f"again: python -m tests.simulation --seed {run.seed} --verbose", flush=True)


if __name__ == "__main__":
    sys.exit(main())
