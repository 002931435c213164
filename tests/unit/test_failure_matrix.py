"""docs/failure-matrix.md and the tests are one matrix: every row has tests, and they lie where the
page says."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "failure-matrix.md"
ROWS = [f"M{number:02}" for number in range(1, 30)]
#: Rows whose tests are still to come. Only ever gets shorter.
NOT_YET: set[str] = set()

_NAME = re.compile(r"^\s*(?:async )?def test_(M\d\d)_\w", re.MULTILINE)
_FILE = re.compile(r"`([\w/]+\.py)`")


def proved_by(folder: Path) -> dict[str, set[str]]:
    """Files, relative to the folder, by the row that a test in them names."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for row in _NAME.findall(path.read_text(encoding="utf-8")):
            found.setdefault(row, set()).add(path.relative_to(folder).as_posix())
    return found


def written() -> dict[str, list[str]]:
    """The cells after the row's number."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"M\d\d", cells[0]):
            assert cells[0] not in rows, f"{cells[0]} is there twice"
            rows[cells[0]] = cells[1:]
    return rows


def test_the_page_has_every_row_once_and_in_order() -> None:
    assert list(written()) == ROWS


def test_no_row_leaves_a_question_open() -> None:
    for row, cells in written().items():
        assert len(cells) == 5, row
        assert all(cells[:4]), f"{row} does not say all of step, fault, what holds and how"


def test_every_row_has_a_test() -> None:
    proved = proved_by(TESTS)
    missing = [row for row in ROWS if row not in proved]
    assert sorted(missing) == sorted(NOT_YET), (
        f"without tests: {missing}; NOT_YET must be exactly these: strike off what is proved"
    )


def test_no_test_names_a_row_that_does_not_exist() -> None:
    assert set(proved_by(TESTS)) <= set(ROWS)


def test_the_page_names_the_files_of_every_row() -> None:
    proved = proved_by(TESTS)
    for row, cells in written().items():
        assert set(_FILE.findall(cells[4])) == proved.get(row, set()), row


def test_the_scan_finds_names_and_nothing_else(tmp_path: Path) -> None:
    source = (
        "def test_M01_one() -> None: ...\n"
        "class Group:\n    async def test_M10_two(self) -> None: ...\n"
        "def test_something_M02_else() -> None: ...\n"
        "# def test_M03_commented() -> None: ...\n"
    )
    (tmp_path / "test_sample.py").write_text(source, encoding="utf-8")
    assert proved_by(tmp_path) == {"M01": {"test_sample.py"}, "M10": {"test_sample.py"}}
