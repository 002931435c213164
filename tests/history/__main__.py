"""`python -m tests.history FILE… [--end-state FILE]`: prints the verdict; exit code 1 on anomalies,
2 when the record cannot be judged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.history.checker import check
from tests.history.end_state import read_end_state
from tests.history.record import RecordInvalid, load


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.history", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="records, one of each process")
    parser.add_argument("--end-state", type=Path, help="the catalog's truth at the end")
    parser.add_argument("--kept-max", type=int, default=20, help="anomalies shown of each kind")
    given = parser.parse_args(arguments)
    try:
        end_state = None if given.end_state is None else read_end_state(given.end_state)
        verdict = check(load(given.files), end_state, kept_max=given.kept_max)
    except (RecordInvalid, OSError, msgspec.DecodeError) as error:
        print(f"cannot be judged: {error}", file=sys.stderr)
        return 2
    print(verdict)
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
