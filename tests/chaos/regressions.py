"""Runs that once did not hold: kept, and run again by `--regressions`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.kinds import Placement
from tests.chaos.run import Options

FILE = Path(__file__).with_name("regressions.json")


@dataclass(frozen=True, slots=True)
class Regression:
    """A run, and in a sentence what it found."""

    options: Options
    found: str


def regressions(path: Path = FILE) -> list[Regression]:
    found = []
    for one in json.loads(path.read_text()):
        options = Options(
            seed=one["seed"],
            seconds=one["seconds"],
            placement=Placement(one["placement"]),
            kills=one.get("kills", False),
            gap_s=one.get("gap_s", 3.0),
            kinds=tuple(one.get("kinds", ())),
        )
        found.append(Regression(options, one["found"]))
    return found
