"""The demo as a person runs it, on a part of its data: every check holds and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.leftovers import with_stack_id
from cluster.stack_files import StackFiles
from tests.acceptance.stacks import ROOT, wait_until
from tests.postgres_server import new_data_dir

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FLIGHTS = 20_000
DEMO_S = 180.0


@pytest.fixture
def folder() -> Iterator[Path]:
    made = new_data_dir()
    yield made / "demo"
    shutil.rmtree(made, ignore_errors=True)


@contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running demo; one that the test does not wait for is told to end."""

    command = [sys.executable, "-m", "lakebus", "demo", "--data-dir", str(folder), *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=DEMO_S)


def test_demo_holds_what_it_says_and_leaves_nothing(folder: Path) -> None:
    with demo(folder, "--json", "--flights", str(FLIGHTS)) as process:
        output, said = process.communicate(timeout=DEMO_S)
    assert process.returncode == 0, said
    found = json.loads(output)
    assert found["ok"]
    assert [check for check in found["checks"] if not check["ok"]] == []
    assert {check["name"] for check in found["checks"]} >= {
        "reference_tables",
        "coordinator_restarted",
        "receipts",
        "nothing_lost_nothing_double",
        "delays_by_weather",
        "worst_destinations",
        "replay_arrow",
        "replay_ndjson",
        "replay_json",
        "conflict",
        "nothing_doubled",
        "by_id",
        "by_time",
        "rows_invalid",
    }
    assert found["numbers"]["rows"] == FLIGHTS
    assert found["answers"]["totals"]["rows"][0][0] == FLIGHTS
    assert all(size > 0 for size in found["numbers"]["body_bytes"].values())
    assert "killed process" in said
    assert "Summary" in said
    assert not folder.exists()


def test_interrupted_demo_takes_its_stack_with_it(folder: Path) -> None:
    files = StackFiles(folder)
    with demo(folder) as process:
        wait_until(files.state, within_s=60, why="the stack starts")
        stack_id = files.stack_id()
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=DEMO_S)
    assert process.returncode == 130, said
    assert "Interrupted" in output
    assert with_stack_id(stack_id) == []
    assert not folder.exists()


def test_folder_of_somebody_else_is_not_touched(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with demo(folder) as process:
        output, said = process.communicate(timeout=DEMO_S)
    assert process.returncode == 1, said
    assert "was not made by a demo" in output
    assert os.listdir(folder) == ["mine"]
