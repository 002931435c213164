"""docs/formats.md says what the decoders do, value by value (contract A10)."""

from __future__ import annotations

from pathlib import Path

from cluster.formats_page import formats_page
from storage.rows.types import Family, parse_type

_PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_A10_the_page_of_formats_is_what_the_decoders_do() -> None:
    made = formats_page()
    assert _PAGE.read_text(encoding="utf-8") == made, "run `make docs`"


def test_A10_the_page_of_formats_shows_every_family_kept_and_refused() -> None:
    lines = [line.split(" | ") for line in _PAGE.read_text(encoding="utf-8").splitlines()]
    texts = [cells for cells in lines if len(cells) == 6 and cells[0].startswith("| `")]
    arrays = [cells for cells in lines if len(cells) == 5 and cells[0].startswith("| `")]
    for rows, place in ((texts, 2), (arrays, 3)):
        kept = {_family(row[0]) for row in rows if not row[place].startswith("refused")}
        refused = {_family(row[0]) for row in rows if row[place].startswith("refused")}
        assert kept == set(Family)
        # Every JSON value is a JSON document, and Arrow text is text in any layout.
        assert refused >= set(Family) - {Family.JSON, Family.VARCHAR}


def _family(cell: str) -> Family:
    return parse_type(cell.strip("| `")).family
