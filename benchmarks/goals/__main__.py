"""`python -m benchmarks.goals`: the goals, each beside what people would run instead.

Ours and peers take turns in one run. What was found is written after every turn, so that a run that
is cut short is not lost. No turn can hang: each has a limit in time, and a contender that fails is
written down as failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals.context import Context, Options
from benchmarks.goals.registry import BENCHMARKS, UnknownGoal, chosen, goals_of
from benchmarks.goals.report import Report, goal_table
from benchmarks.goals.rows import Benchmark
from benchmarks.stacks import end_as_interrupted

RESULTS = Path(__file__).parents[1] / "results"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goals", description=__doc__)
    parser.add_argument("--only", default="", metavar="P1,P5", help="goals or benchmarks by name")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours")
    parser.add_argument("--repetitions", type=int, help="5; 1 with --quick")
    parser.add_argument("--seconds", type=float, help="of each load: 8; 3 with --quick")
    parser.add_argument("--pairs", type=int, help="for bounds near unity: 30; 3 with --quick")
    parser.add_argument(
        "--held-s", type=float, help="P21's foreign transaction: 1800; 30 with --quick"
    )
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peers' environment")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--list", action="store_true", help="what there is to measure")
    return parser.parse_args(arguments)


def command_of(given: argparse.Namespace) -> str:
    """What to type for the same run elsewhere: without the paths of this machine."""

    words = ["python -m benchmarks.goals"]
    words += ["--quick"] if given.quick else []
    for name in ("only", "repetitions", "seconds", "pairs", "held_s"):
        value = getattr(given, name)
        words += [f"--{name.replace('_', '-')} {value}"] if value not in (None, "") else []
    return " ".join([*words, "--peers PYTHON"] if given.peers else words)


def options_of(given: argparse.Namespace) -> Options:
    def choice(value: float | None, full: float, quick: float) -> float:
        return value if value is not None else quick if given.quick else full

    return Options(
        # A quick run never replaces the figures of a full one.
        out=(given.out / "quick" if given.quick and given.out == RESULTS else given.out).resolve(),
        peers=given.peers,
        quick=given.quick,
        repetitions=int(choice(given.repetitions, 5, 1)),
        seconds=choice(given.seconds, 8.0, 3.0),
        pairs=int(choice(given.pairs, 30, 3)),
        goals=goals_of(given.only),
        held_s=given.held_s,
    )


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.list:
        for one in BENCHMARKS:
            print(f"{one.name:12} {', '.join(one.goals):30} {one.measures}")
        return 0
    try:
        benchmarks = chosen(given.only)
    except UnknownGoal as error:
        print(error, file=sys.stderr)
        return 2
    end_as_interrupted()
    options = options_of(given)
    options.out.mkdir(parents=True, exist_ok=True)
    context = Context(options)
    report = Report(
        options.out,
        context.about(),
        command=command_of(given),
        quick=options.quick,
        goals=options.goals,
    )
    print(f"the words of its programs go to {context.log}", file=sys.stderr)
    try:
        for benchmark in benchmarks:
            measure(benchmark, context, report)
    except KeyboardInterrupt:
        report.write()
        print(f"interrupted; what there is: {options.out / 'report.md'}", file=sys.stderr)
        return 130
    report.plotted(plots(context))
    print("\n".join(goal_table(report.rows())))
    print(f"\n{options.out / 'report.md'}")
    return 0


def measure(benchmark: Benchmark, context: Context, report: Report) -> None:
    turns = report.begin(benchmark, context)
    began = time.monotonic()
    print(f"{benchmark.name}: {', '.join(benchmark.goals)} …", file=sys.stderr)
    try:
        benchmark.run(context, turns)
    except Exception as error:  # noqa: BLE001 - a finding; the other benchmarks still run
        turns.failures.append(f"the benchmark ended early: {error!r}"[:500])
    turns.notes["took_s"] = round(time.monotonic() - began)
    report.done()


def plots(context: Context) -> list[str]:
    """Drawn by a library that the peers' environment has; without it a report has none."""

    if context.options.peers is None:
        return []
    try:
        found: list[str] = context.peer_says("plots", str(context.options.out), timeout_s=120)
    except Exception as error:  # noqa: BLE001 - a report without pictures is a report
        print(f"no plots: {error}", file=sys.stderr)
        return []
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
