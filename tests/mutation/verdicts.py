"""Running tests in the copy, and what their end says about a mutant.

A kill is an assertion about behaviour. A mutant that does not import, whose SQL does not install or
does not run, or that breaks a fixture, says nothing about the suite: it is invalid.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.mutation.workspace import Workspace

#: A line of a failure that shows a mutant which is no program, not one that behaves wrongly.
_BROKEN = re.compile(
    r"^E\s+(?:[\w.]*\.)?(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError"
    r"|UnboundLocalError|PostgresSyntaxError|UndefinedColumnError|UndefinedFunctionError"
    r"|UndefinedTableError|UndefinedParameterError|AmbiguousColumnError|AmbiguousParameterError"
    r"|IndeterminateDatatypeError|DatatypeMismatchError|GroupingError|InvalidColumnReferenceError)"
    r"\b.*$",
    re.MULTILINE,
)


class End(StrEnum):
    KILLED = "killed"
    SURVIVED = "SURVIVED"
    INVALID = "INVALID"
    STALE = "STALE"
    HUNG = "HUNG"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run of tests ended: `test` is the one that failed first, `detail` its words."""

    end: End
    test: str = ""
    detail: str = ""
    passed: tuple[str, ...] = ()


def run_tests(
    workspace: Workspace,
    tests: Sequence[str],
    *,
    environ: Mapping[str, str],
    within_s: float,
    stop_at_first: bool = True,
) -> Verdict:
    """Runs the tests in the copy as it is now."""

    report = workspace.root.parent / "report.xml"
    report.unlink(missing_ok=True)
    ended = workspace.run(
        [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.mutation.imported",
            f"--junitxml={report}",
            *(["-x"] if stop_at_first else []),
            *tests,
        ],
        environ=environ,
        within_s=within_s,
    )
    if ended.exit_code is None:
        return Verdict(End.HUNG, detail=f"no end within {within_s:g} s")
    if ended.exit_code not in (0, 1) or not report.exists():
        return Verdict(End.INVALID, detail=_last_lines(ended.output))
    return _read(report, ended.output)


def _read(report: Path, output: str) -> Verdict:
    passed = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        error, failure = case.find("error"), case.find("failure")
        if error is not None:
            return Verdict(End.INVALID, name, f"in set-up: {_words(error)}")
        if failure is not None:
            broken = _BROKEN.search(failure.text or "")
            if broken:
                return Verdict(End.INVALID, name, broken[0].removeprefix("E").strip()[:200])
            return Verdict(End.KILLED, name, _words(failure))
        if case.find("skipped") is None:
            passed.append(name)
    if not passed:
        return Verdict(End.INVALID, detail=f"no test ran: {_last_lines(output)}")
    return Verdict(End.SURVIVED, passed=tuple(passed))


def _words(element: ElementTree.Element) -> str:
    return " ".join(element.get("message", "").split())[:200]


def _last_lines(output: str) -> str:
    return " ".join(" ".join(output.splitlines()[-8:]).split())[-400:]
