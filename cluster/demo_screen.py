"""What the demo prints: steps, a live line of progress, small tables.

On a terminal the live line is rewritten in place; elsewhere a plain line comes now and then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TextIO

_LIVE_S, _PLAIN_S = 0.1, 2.0
_CELL_MAX = 40


class Screen:
    """Writes to one stream; used by one thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._live = False
        self._live_at_s = 0.0

    def title(self, text: str) -> None:
        self.line()
        self.line(f"\033[1m{text}\033[0m" if self._terminal else text)

    def line(self, text: str = "") -> None:
        self.clear()
        self._write(f"  {text}\n" if text and not text.startswith("\033") else f"{text}\n")

    def check(self, ok: bool, text: str) -> None:
        self.line(f"{'ok  ' if ok else 'FAIL'}  {text}")

    def progress(self, text: str) -> None:
        """The live line; more often than can be read it is left out."""

        now = time.monotonic()
        if now - self._live_at_s < (_LIVE_S if self._terminal else _PLAIN_S):
            return
        self._live_at_s = now
        if self._terminal:
            self._write(f"\r\033[K  {text}")
            self._live = True
        else:
            self._write(f"  {text}\n")

    def clear(self) -> None:
        if self._live:
            self._write("\r\033[K")
            self._live = False

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = [[str(name) for name in columns], *([_cell(v) for v in row] for row in rows)]
        widths = [max(len(row[n]) for row in cells) for n in range(len(columns))]
        numeric = [all(isinstance(row[n], (int, float)) for row in rows) for n in range(len(widths))]
        for row in cells:
            parts = [
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, numeric, strict=True)
            ]
            self.line("    " + "  ".join(parts).rstrip())

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= _CELL_MAX else text[: _CELL_MAX - 1] + "…"
