"""What the demo prints: steps, a live line of progress, small tables.

On a terminal the live line is rewritten in place; elsewhere a plain line comes now and then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TextIO

from cluster.text_table import text_table

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
        self.clear()
        self._write(f"\n\033[1m{text}\033[0m\n" if self._terminal else f"\n{text}\n")

    def line(self, text: str) -> None:
        self.clear()
        self._write(f"  {text}\n")

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
        for text in text_table(columns, rows, cell_max=_CELL_MAX):
            self.line(f"    {text}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
