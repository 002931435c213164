"""Every statement of the contract that this repository proves by tests has at least one.

Names of tests carry the number of what they prove (`test_A4_absent_equals_null`), so the index is
the names themselves. A statement without a test is named here, in the failure.
"""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
_NAME = re.compile(r"^\s*(?:async )?def test_([A-G]\d+)_", re.MULTILINE)


def _section(letter: str, *numbers: int) -> list[str]:
    return [f"{letter}{number}" for number in numbers]


STATEMENTS = [
    *_section("A", *range(1, 14)),
    *_section("B", *range(1, 12)),
    *_section("C", *range(1, 8)),
    *_section("D", *range(1, 9), 11),
    *_section("F", 1),
]

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


def test_every_statement_has_a_test() -> None:
    proved = proved_by(TESTS)
    missing = [number for number in STATEMENTS if number not in proved]
    assert not missing, f"no test names these statements of the contract: {', '.join(missing)}"


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
