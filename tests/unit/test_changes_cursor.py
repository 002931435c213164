"""Cursors of the change feed: good for their table, refused when damaged."""

from __future__ import annotations

import pytest

from lakebus.errors import MalformedRequest
from storage.reading.changes import Place, Window


@pytest.mark.parametrize("text", ["", "x", "W10", "bnVsbA", "WzEsMiwzLDQsNSw2LDdd", "é", "[" * 99])
def test_a_damaged_cursor_is_refused(text: str) -> None:
    with pytest.raises(MalformedRequest):
        Window.decode(text, 1)


def test_a_cursor_is_good_for_its_table_only() -> None:
    window = Window(3, 9, Place(2, 2**40, 7))
    assert Window.decode(window.encode(5), 5) == window
    with pytest.raises(MalformedRequest):
        Window.decode(window.encode(5), 6)
