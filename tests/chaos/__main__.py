"""`python -m tests.chaos`: seeded runs of a whole stack under faults. Exit code 1 when one did not
hold.

One run:          --seed 7 --minutes 4 --placement spread
Many kills:       --kills 1000 --results FILE     (goes on where it was cut)
A soak:           --maintenance --minutes 30 --results FILE
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
from tests.chaos.soak.judging import PAIRS_MIN
from tests.chaos.soak.results import write_soak

_GAP_S, _KILL_GAP_S, _SOAK_GAP_S = 3.0, 2.0, 7.0
_KILL_RESULTS = Path("benchmarks/results/chaos.json")
_IDLE_RUNS_MAX = 3
_PLACEMENTS = [one.value for one in Placement]


def main(arguments: Sequence[str]) -> int:
    chosen = _parser().parse_args(arguments)
    if chosen.regressions:
        return _regressions(chosen)
    if chosen.maintenance:
        return _soak(chosen)
    chosen.gap = chosen.gap or _GAP_S
    if chosen.kills:
        chosen.results = chosen.results or _KILL_RESULTS
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
        maintenance=chosen.maintenance,
        pairs=chosen.pairs,
    )


def _soak(chosen: argparse.Namespace) -> int:
    """All of maintenance at work, one run; its results."""
    chosen.placement = chosen.placement or Placement.SPREAD.value
    chosen.gap = chosen.gap or _SOAK_GAP_S
    report = _one(_options(chosen, chosen.seed), chosen.out)
    if chosen.results is not None:
        write_soak(chosen.results, report)
    return 0 if report.held else 1


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
    add("--gap", type=float, help="mean seconds between two faults")
    add("--repeat", type=int, default=1, help="so many runs, with the following seeds")
    add("--kills", type=int, help="runs of kills until so many have been made, over all calls")
    add(
        "--results",
        type=Path,
        help="the table that runs of kills add to, or what a soak came to, as JSON; Markdown stands"
        " beside it",
    )
    add("--maintenance", action="store_true", help="a soak: all jobs at work without rest")
    add("--pairs", type=int, default=PAIRS_MIN, help="questions that a soak has to keep")
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
