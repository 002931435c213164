"""Every statement of the contract (A to E, and F1) has a test in the suite of all backends.

Names of tests carry the number of what they prove (`test_A4_absent_equals_null`), so the index is
the names themselves. A statement without a test is named here, in the failure.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.conformance import suite

TESTS = Path(__file__).resolve().parents[1]
_NAME = re.compile(r"^\s*(?:async )?def test_([A-G]\d+)_", re.MULTILINE)


def _section(letter: str, *numbers: int) -> list[str]:
    return [f"{letter}{number}" for number in numbers]


#: What every backend must be shown to keep: the exported suite has a test for each.
STATEMENTS = [
    *_section("A", *range(1, 14)),
    *_section("B", *range(1, 12)),
    *_section("C", *range(1, 8)),
    *_section("D", *range(1, 13)),
    *_section("E", 1, 2, 3, 4, 5, 7, 8),
    *_section("F", 1),
]

#: Proved by tests of their own: the validator looks at a PostgreSQL catalog and real files (E6); a
#: silent rewind is one of a server (F4).
PROVED_APART = ["E6", "F4"]

#: How far each section of the contract is numbered: a test cannot prove what is not stated.
LAST_OF_SECTION = {"A": 13, "B": 11, "C": 7, "D": 12, "E": 8, "F": 4, "G": 2}


def proved_by(folder: Path) -> dict[str, list[str]]:
    """Files by the statement that a test in them names."""

    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for number in _NAME.findall(path.read_text(encoding="utf-8")):
            files = found.setdefault(number, [])
            if path.name not in files:
                files.append(path.name)
    return found


def exported_by(module: ModuleType) -> set[str]:
    """The statements named by the tests that a module offers to a test run."""

    found = (re.match(r"test_([A-G]\d+)_", name) for name in vars(module))
    return {match[1] for match in found if match is not None}


def test_the_exported_suite_has_a_test_of_every_statement() -> None:
    missing = [number for number in STATEMENTS if number not in exported_by(suite)]
    assert not missing, f"the suite has no test of these statements: {', '.join(missing)}"


def test_what_the_suite_leaves_out_has_tests_elsewhere() -> None:
    found = proved_by(TESTS)
    assert not [number for number in PROVED_APART if number not in found]


@pytest.mark.parametrize("backend", ["memory", "postgres"])
def test_every_backend_runs_the_whole_suite(backend: str) -> None:
    module = importlib.import_module(f"tests.test_conformance_{backend}")
    offered = {name for name in vars(suite) if name.startswith("test_")}
    assert offered
    assert not offered - set(vars(module))


def test_the_suite_exports_every_test_of_its_modules() -> None:
    """Two tests of one name in two modules would leave one of them out without a word."""

    exported: dict[str, str] = {}
    for path in sorted((TESTS / "conformance").glob("*.py")):
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.M):
            assert name not in exported, f"{name} is in {exported[name]} and in {path.name}"
            exported[name] = path.name
            assert hasattr(suite, name), f"suite.py does not export {path.name}"


def test_no_test_names_a_statement_that_does_not_exist() -> None:
    unknown = [
        number
        for number in proved_by(TESTS)
        if not 1 <= int(number[1:]) <= LAST_OF_SECTION[number[0]]
    ]
    assert not unknown, f"the contract has no statements {', '.join(unknown)}"


def test_the_scan_finds_names_and_nothing_else(tmp_path: Path) -> None:
    source = (
        "def test_A1_one() -> None: ...\n"
        "class Group:\n    async def test_B10_two(self) -> None: ...\n"
        "def test_something_A2_else() -> None: ...\n"
        "# def test_C1_commented() -> None: ...\n"
    )
    (tmp_path / "test_sample.py").write_text(source, encoding="utf-8")
    assert proved_by(tmp_path) == {"A1": ["test_sample.py"], "B10": ["test_sample.py"]}
