"""`python -m tests.openapi --minutes 10 --seed 1`: looks for answers that `/openapi.json` does not
describe, for as long as it is given. Ends with 1 when it found some. `--played`: without DuckDB."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.openapi.run import long_run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.openapi", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=60, help="requests of an operation a round")
    parser.add_argument("--played", action="store_true", help="play statements, do not run them")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = long_run(
            seconds=given.minutes * 60,
            seed=given.seed,
            folder=None if given.played else Path(folder),
            examples=given.examples,
        )
    for (label, status), count in sorted(found.answers.items()):
        print(f"{count:8} {status} {label}")
    for fault in found.faults:
        print(f"\nFAULT {fault}")
    if found.never_well:
        print(f"\nnever answered well: {', '.join(found.never_well)}")
    print(f"\n{found.requests} requests, {len(found.faults)} faults")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
