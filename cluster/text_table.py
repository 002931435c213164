"""Answers of queries as aligned text, for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def text_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    cell_max: int | None = None,
    numeric: Sequence[bool] | None = None,
) -> list[str]:
    """One line for the names and one for each row; numbers to the right, null is empty, lists and
    objects are JSON.

    :param cell_max: longer values are cut, and end in `…`.
    :param numeric: which columns hold numbers, where their values are texts of them.
    """

    cells = [list(columns), *([_cell(value, cell_max) for value in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(columns))]
    if numeric is None:
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
    if value is None:
        return ""
    text = value if isinstance(value, str) else _text(value)
    # One row is one line, whatever is in it.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if cell_max is None or len(text) <= cell_max:
        return text
    return text[: cell_max - 1] + "…"


def _text(value: Any) -> str:
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return str(value)
