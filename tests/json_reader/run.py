"""A run: groups one after the other, each in kept and in tight buffers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from storage.rows.compiled_json import CompiledReader
from tests.json_reader.bodies import group
from tests.json_reader.building import SANITIZED, SOURCE, build, sanitizer_environment
from tests.json_reader.judge import Findings, judge
from tests.json_reader.tight import tight_buffers

FAULTS_MAX = 20
#: Of every hundred bodies, so many are accepted at least, or the run has shown nothing. They are
#: about a quarter.
ACCEPTED_MIN = 10

Say = Callable[[str], None]


def read_groups(
    reader: CompiledReader, seed: int, numbers: Iterator[int], *, about: Callable[[int], None]
) -> Findings:
    """`about` is told each number before its group is read, which may be the end of the process."""

    findings = Findings()
    for number in numbers:
        about(number)
        before = len(findings.faults)
        made = group(seed, number)
        judge(made, reader, findings)
        with tight_buffers():
            judge(made, reader, findings)
        findings.faults[before:] = [f"group {number}: {f}" for f in findings.faults[before:]]
        if len(findings.faults) >= FAULTS_MAX:
            break
    if findings.bodies >= 1000 and findings.accepted_bodies * 100 < ACCEPTED_MIN * findings.bodies:
        findings.faults.append("too few bodies were accepted for this to show anything")
    return findings


def numbers_for(first: int, *, groups: int | None, seconds: float) -> Iterator[int]:
    """So many, or as many as there is time for."""

    end_s = time.monotonic() + seconds
    for number in count(first):
        if number - first >= groups if groups is not None else time.monotonic() >= end_s:
            return
        yield number


def run_in_child(arguments: list[str], folder: Path, *, source: Path = SOURCE) -> tuple[int, str]:
    """Exit code and output of a run in a process that has the sanitizers where the compiler has
    them. What ends that process is a fault, and the output says which group it was at."""

    environment = sanitizer_environment(folder)
    options = ("-O1",) if environment is None else SANITIZED
    library = build(source, folder / "json_columns.so", options)
    place = folder / "group"
    place.write_text("none yet")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "tests.json_reader", *arguments),
            *("--reader", str(library), "--place", str(place)),
        ],
        env=os.environ if environment is None else environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    )
    said = ended.stdout
    if environment is None:
        said += "\nwithout sanitizers: the compiler has none\n"
    if ended.returncode not in (0, 1):
        said += f"\nFAULT the process ended with {ended.returncode} at group {place.read_text()}\n"
    return ended.returncode, said
