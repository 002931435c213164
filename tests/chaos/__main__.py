"""`python -m tests.chaos`: seeded runs of a whole stack under faults. Exit code 1 when one did not
hold.

One run:          --seed 7 --minutes 4 --placement spread
Many kills:       --kills 1000 --results FILE     (goes on where it was cut)
Known failures:   --regressions
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.kinds import BY_NAME, Placement
from tests.chaos.regressions import regressions
from tests.chaos.report import shown
from tests.chaos.results import Results
from tests.chaos.run import Options, Report, run

_KILL_GAP_S = 2.0
_IDLE_RUNS_MAX = 3
_PLACEMENTS = [one.value for one in Placement]


def main(arguments: Sequence[str]) -> int:
    chosen = _parser().parse_args(arguments)
    if chosen.regressions:
        return _regressions(chosen)
    if chosen.kills:
        return _kills(chosen)
    reports = [
        _one(_options(chosen, seed), chosen.out)
        for seed in range(chosen.seed, chosen.seed + chosen.repeat)
    ]
    return 0 if all(report.held for report in reports) else 1


def _options(chosen: argparse.Namespace, seed: int) -> Options:
    return Options(
        seed=seed,
        seconds=chosen.minutes * 60,
        placement=Placement(chosen.placement or Placement.TOGETHER),
        gap_s=chosen.gap,
        kinds=chosen.kinds,
    )


def _kills(chosen: argparse.Namespace) -> int:
    """Runs of kills until there have been so many, over all calls."""
    placements = [chosen.placement] if chosen.placement else ["spread", "together"]
    turns = itertools.cycle(placements)
    bad = idle = 0
    while (results := Results.read(chosen.results)).kills < chosen.kills:
        if idle == _IDLE_RUNS_MAX:
            _say(f"{idle} runs without a kill: something is wrong with the machine or the stack")
            return 1
        before = results.kills
        options = Options(
            seed=results.next_seed,
            seconds=chosen.minutes * 60,
            placement=Placement(next(turns)),
            kills=True,
            gap_s=_KILL_GAP_S,
            kinds=chosen.kinds,
        )
        report = _one(options, chosen.out)
        bad += not report.held
        results.add(report)
        results.write(chosen.results)
        idle = idle + 1 if results.kills == before else 0
        _say(f"{results.kills} of {chosen.kills} kills, {len(results.runs)} runs")
    return 1 if bad else 0


def _regressions(chosen: argparse.Namespace) -> int:
    bad = 0
    for one in regressions():
        _say(f"once: {one.found}")
        bad += not _one(one.options, chosen.out).held
    return 1 if bad else 0


def _one(options: Options, out: Path) -> Report:
    folder = out / f"{options.placement}-{options.seed}-{int(time.time())}"
    report = asyncio.run(run(options, folder, say=_say))
    print(shown(report), flush=True)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=1, help="the schedule and the workload are functions of it")
    add("--minutes", type=float, default=3.0, help="how long faults are made in a run")
    add("--placement", choices=_PLACEMENTS, help="default: together; for kills spread, together")
    add("--gap", type=float, default=3.0, help="mean seconds between two faults")
    add("--repeat", type=int, default=1, help="so many runs, with the following seeds")
    add("--kills", type=int, help="runs of kills until so many have been made, over all calls")
    add(
        "--results",
        type=Path,
        default=Path("benchmarks/results/chaos.json"),
        help="the table that runs of kills add to; its Markdown stands beside it",
    )
    add("--regressions", action="store_true", help="run again what once did not hold")
    add("--kinds", type=_kinds, default=(), help="only these kinds of faults, commas between")
    add(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "lakebus-chaos",
        help="where the record, the schedule and the report of each run are kept",
    )
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} are no kinds; there are {sorted(BY_NAME)}")
    return names


def _say(line: str) -> None:
    print(f"chaos: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
