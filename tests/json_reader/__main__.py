"""`python -m tests.json_reader --minutes 5 --seed 1`: holds the compiled JSON reader against the
exact pass for as long as it is given. Ends with 1 when they differ, with more when it died.

`--first 123 --groups 1 --seed 1` reads one group again, in this process with `--reader LIBRARY`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from storage.rows.compiled_json import load
from tests.json_reader.building import compiler
from tests.json_reader.run import numbers_for, read_groups, run_in_child


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.json_reader", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first group")
    parser.add_argument("--groups", type=int, help="so many groups, however long they take")
    parser.add_argument("--reader", type=Path, help="a library that is built already")
    parser.add_argument("--place", type=Path, help="keeps the number of the group under way")
    given = parser.parse_args(arguments)
    if given.reader is not None:
        return _here(given)
    if compiler() is None:
        parser.error("this needs a C compiler (cc)")
    with tempfile.TemporaryDirectory() as folder:
        exit_code, said = run_in_child(arguments, Path(folder))
    print(said)
    return exit_code


def _here(given: argparse.Namespace) -> int:
    reader = load(given.reader)
    if reader is None:
        print(f"{given.reader} is no reader")
        return 2

    def about(number: int) -> None:
        if given.place is not None:
            given.place.write_text(str(number))

    numbers = numbers_for(given.first, groups=given.groups, seconds=given.minutes * 60)
    found = read_groups(reader, given.seed, numbers, about=about)
    for kind, count in sorted(found.accepted.items()):
        print(f"{count:9} bodies with {kind}")
    for fault in found.faults:
        print(f"\nFAULT {fault}")
    print(
        f"\n{found.groups} groups, {found.bodies} bodies, {found.accepted_bodies} accepted with "
        f"{found.values} values, {len(found.faults)} faults"
    )
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
