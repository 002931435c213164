"""The examples of the README and of docs/api.md are run as they stand, and answer what they show.

A page is a session: its commands run in one shell, in their order, on a fresh lake. Where a page
shows the answer, `…` stands for any text, and what is another each time (ids, times, tokens) is
compared by its kind. What only a started stack can answer is left to the acceptance tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.client_rig import Lake, whole_lake

ROOT = Path(__file__).parents[2]
#: Commands of these begin or end a stack; the acceptance tests run them.
ELSEWHERE = ("make ", "lakebus up", "lakebus down", "export PATH")
#: Nobody runs jobs here; tests/acceptance has deletes and erasures on a whole stack.
NEEDS_JOBS = re.compile(r"/(delete|erase) -H")
#: What is another each time: tokens, ids, hashes, times.
_VARIES = (
    (re.compile(r"lb1\.[\w…-]+"), "<token>"),
    (re.compile(r"v1:[0-9a-f]+…?"), "<fingerprint>"),
    (re.compile(r"b\d+-\d+-\d+"), "<batch>"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"), "<time>"),
    (re.compile(r'"(wait_ms|plan_ms|execute_ms|bytes_scanned)": ?[\d.]+'), r'"\1":<number>'),
    (re.compile(r"[0-9a-f]{8}-[0-9a-f…]*[0-9a-f-]*"), "<id>"),
)
#: Of pages whose answers come from several sessions.
_NUMBERS = (
    (re.compile(r'"(\w*snapshot_id|files_\w+)": ?\d+'), r'"\1":<number>'),
    (re.compile(r'"snapshots": ?\[\d+\]'), '"snapshots":[<number>]'),
)
_COMMAND_S = 60


@dataclass
class Step:
    """A command, with the answer that the page shows for it. `place`: where it stands. `several`:
    more than one command, and the answer is the last one's."""

    command: str
    place: str
    shown: str | None = None
    several: bool = False


@dataclass
class Page:
    name: str
    steps: list[Step] = field(default_factory=list)
    python: list[str] = field(default_factory=list)


def page_of(name: str) -> Page:
    page = Page(name)
    text = (ROOT / name).read_text()
    for found in re.finditer(r"(?ms)^```(\w+)\n(.*?)^```", text):
        kind, body = found.groups()
        place = f"{name}:{text[: found.start()].count(chr(10)) + 1}"
        if kind == "sh" and not body.startswith(ELSEWHERE):
            page.steps.append(Step(body, place, several=True))
        elif kind == "console":
            for part in re.split(r"(?m)^\$ ", body)[1:]:
                command, _, shown = part.partition("\n")
                page.steps.append(Step(command, place, shown))
        elif kind == "json" and page.steps and _follows(text, found.start()):
            page.steps[-1].shown = body
        elif kind == "python":
            page.python.append(body)
    page.steps = [
        step
        for step in page.steps
        if not step.command.startswith(ELSEWHERE) and not NEEDS_JOBS.search(step.command)
    ]
    return page


def _follows(text: str, start: int) -> bool:
    """A block of JSON right behind a block of commands is their answer."""
    return re.search(r"(?s)```sh\n(?:(?!```).)*```\n\s*$", text[:start]) is not None


def pattern_of(shown: str) -> re.Pattern[str]:
    """What an answer must look like. Line breaks within JSON are the page's."""
    pieces = (re.escape(piece.strip()) for piece in plain(shown).split("…"))
    return re.compile(".*".join(pieces), re.DOTALL)


def plain(text: str, *, numbered: bool = True) -> str:
    for varies, word in (*_VARIES, *(() if numbered else _NUMBERS)):
        text = varies.sub(word, text)
    if text.lstrip().startswith("{") or '":' in text:
        text = re.sub(r"\s+", "", text)
    return text.strip()


class Shell:
    """Commands in one shell, as a person types them, with the lake's address where a stack leaves
    it."""

    def __init__(self, lake: Lake, folder: Path) -> None:
        self.folder = folder
        (folder / ".lakebus").mkdir()
        (folder / ".lakebus" / "connection.json").write_text(
            json.dumps({"url": lake.url, "api_key": lake.key})
        )
        programs = folder / "bin"
        programs.mkdir()
        for name, program in (("lakebus", "-m lakebus "), ("python", ""), ("python3", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {program}"$@"\n')
            (programs / name).chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("LAKEBUS_")}
        self._environ = clean | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
        }

    def run(self, steps: list[Step]) -> list[str]:
        """What each of them printed, errors included."""
        script = "\n".join(
            f"{{ {step.command.rstrip()}\n}} > out.{number} 2>&1\n"
            for number, step in enumerate(steps)
        )
        subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self._environ,
            check=False,
            timeout=_COMMAND_S * 2,
            stdin=subprocess.DEVNULL,
        )
        return [(self.folder / f"out.{number}").read_text() for number in range(len(steps))]


@pytest.fixture
def lake(tmp_path: Path) -> Iterator[Lake]:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("the pages' commands need bash and curl")
    (tmp_path / "lake").mkdir()
    with whole_lake(tmp_path / "lake") as made:
        yield made


def checked(step: Step, printed: str, *, numbered: bool = True) -> None:
    if step.shown is None:
        assert '"code":' not in printed, (step.place, step.command, printed)
        return
    shown, found = plain(step.shown, numbered=numbered), plain(printed, numbered=numbered)
    begin = "…" if step.several else ""
    same = pattern_of(begin + shown).fullmatch(found)
    assert same, f"{step.place}: {step.command}\n--- shown\n{shown}\n--- printed\n{found}"


def test_the_first_five_minutes_of_the_readme(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of("README.md")
    assert len(page.steps) >= 9
    shell = Shell(lake, tmp_path)
    for step, printed in zip(page.steps, shell.run(page.steps), strict=True):
        checked(step, printed)

    monkeypatch.chdir(tmp_path)
    assert page.python
    for block in page.python:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, page.name, "exec"), {"__name__": "example"})
        assert said.getvalue().splitlines() == re.findall(r"(?m)print\(.*\)  # (.*)$", block)


def test_the_examples_of_the_api_page(lake: Lake, tmp_path: Path) -> None:
    page = page_of("docs/api.md")
    assert len(page.steps) >= 9
    shell = Shell(lake, tmp_path)
    # What the page takes for granted: files to send, and a table of events.
    (tmp_path / "readings.csv").write_text("sensor,celsius\nattic,31.5\n")
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "events.parquet")
    sending = next(n for n, step in enumerate(page.steps) if "events.parquet" in step.command)
    page.steps.insert(sending, Step("lakebus tables create events 'id bigint'", "this test"))
    for step, printed in zip(page.steps, shell.run(page.steps), strict=True):
        checked(step, printed, numbered=False)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("2 rows durable\n", "2 rows durable\n", True),
        ("2 rows durable\n", "3 rows durable\n", False),
        ('{"a": "lb1.x…", "n": 1, …}', '{"a":"lb1.abc-D","n":1,"m":2}\n', True),
        ('{"a": "lb1.x…", "n": 1}', '{"a":"lb1.abc-D","n":2}\n', False),
    ],
)
def test_answers_are_compared_by_what_does_not_vary(shown: str, printed: str, same: bool) -> None:
    step = Step("true", "page:1", shown)
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        checked(step, printed)


def test_a_page_is_read_with_its_answers() -> None:
    names: dict[str, Any] = {}
    for name in ("README.md", "docs/api.md"):
        names[name] = [step.place for step in page_of(name).steps if step.shown]
    assert all(len(places) >= 3 for places in names.values()), names
