"""The seeded simulation: the same seed twice, old findings, fresh seeds, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.__main__ import main
from tests.simulation.breakages import BREAKAGES, Breakage
from tests.simulation.run import many_runs, simulate, tidy

ROOT = Path(__file__).parents[2]
REGRESSIONS = ROOT / "tests" / "simulation" / "regressions.json"

#: Never changed, so that a failure is the product's doing.
FRESH_FIRST, FRESH_COUNT = 500_000, 100

_DIGESTS = """
from tests.simulation.run import simulate
print(*(simulate(seed).digest for seed in {seeds}))
"""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with many_runs():
        yield


def test_the_same_seed_gives_the_same_history_in_every_interpreter() -> None:
    seeds = [3, 11, 56, 103, 240]
    told = []
    for hash_seed in ("0", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _DIGESTS.format(seeds=seeds)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(done.stdout.split())
    here = [simulate(seed).digest for seed in seeds]
    assert told == [here, here]
    assert len(set(here)) == len(seeds)


def test_old_findings_stay_found() -> None:
    kept = json.loads(REGRESSIONS.read_text())
    assert kept
    assert all(set(entry) == {"seed", "found"} for entry in kept)
    failed = {entry["seed"]: simulate(entry["seed"]).problems for entry in kept}
    assert {seed: problems for seed, problems in failed.items() if problems} == {}


def test_B_to_D_hold_in_fresh_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--seed", str(FRESH_FIRST), "--count", str(FRESH_COUNT)])
    said = capsys.readouterr().out
    assert status == 0, said
    # It shows something only if things go wrong in it, and go right too.
    for word in ("kills", "twins", "database crashes", "replies lost", "processes killed by an"):
        assert word in said, said
    for word in ("ingest ok", "ingest outcome_unknown", "read ok", "ddl ok", "wait ok"):
        assert word in said, said


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.says)
def test_a_broken_product_is_found(breakage: Breakage) -> None:
    with breakage.applied():
        for seed in range(1, breakage.seeds_max + 1):
            if simulate(seed).problems:
                print(f"{breakage.says}: found by seed {seed}")
                return
            tidy(seed)
    pytest.fail(f"{breakage.seeds_max} seeds did not notice that {breakage.says}")


def test_an_anomaly_is_told_with_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    broken = next(b for b in BREAKAGES if b.says == "a position is given twice")
    with broken.applied():
        assert main(["--seed", "2"]) == 1
    said = capsys.readouterr().out
    assert "seed 2 shows" in said
    assert "again: python -m tests.simulation --seed 2 --verbose" in said
