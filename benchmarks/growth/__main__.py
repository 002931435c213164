"""`python -m benchmarks.growth files|snapshots|tables SIZE…`: one axis, as a table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.goals.growth import AXES, contender, details
from benchmarks.goals.programs import program
from benchmarks.goals.turns import Turns
from benchmarks.growth.lake import SERVER_SETTINGS
from benchmarks.own_postgres import own_postgres


def main() -> None:
    axes = {axis.name: axis for axis in AXES}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("axis", choices=axes)
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tables", type=int, default=100, help="where they do not grow")
    parser.add_argument("--snapshots", type=int, default=10_000, help="where they do not grow")
    given = parser.parse_args()
    axis, turns = axes[given.axis], Turns()
    with (
        tempfile.TemporaryDirectory(prefix="lakebus-growth-log-") as folder,
        own_postgres(SERVER_SETTINGS) as dsn,
    ):
        order = {"dsn": dsn, "tables": given.tables, "snapshots": given.snapshots}
        log = Path(folder) / "words.log"
        with program(axis.program, order, log=log) as running:
            running.ready(axis.limit_s)
            for size in sorted(given.sizes):
                print(f"{size:,} {axis.name} …", file=sys.stderr)
                found = running.window(axis.limit_s, size=size, repetitions=given.repetitions)
                turns.figures[contender(axis.name, size)] = {0: found}
    print("\n".join(details(turns)))


if __name__ == "__main__":
    main()
