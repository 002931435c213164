"""Answers of queries as aligned text, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, cell_max: int | None = None
) -> list[str]:
    """One line for the names and one for each row; numbers to the right, null is empty.

    :param cell_max: longer values are cut, and end in `…`.
    """

    cells = [list(columns), *([_cell(value, cell_max) for value in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(columns))]
    numeric = [all(_is_number(row[n]) for row in rows) for n in range(len(columns))]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: Any, cell_max: int | None) -> str:
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    # One row is one line, whatever is in it.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if cell_max is None or len(text) <= cell_max:
        return text
    return text[: cell_max - 1] + "…"
