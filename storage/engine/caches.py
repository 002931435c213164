"""A least-recently-used cache that is bounded in entries and in bytes.

Statements come from strangers, so counting entries alone would let them fill the memory.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """By text. Not for several threads at once."""

    def __init__(self, *, entries_max: int, bytes_max: int) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._held: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def get(self, key: str) -> Value | None:
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: str, value: Value, size_bytes: int) -> None:
        """Keeps `value` unless it alone would take more than an eighth of the cache."""

        if size_bytes > self._bytes_max // 8:
            return
        old = self._held.pop(key, None)
        self._bytes += size_bytes - (old[1] if old else 0)
        self._held[key] = (value, size_bytes)
        while len(self._held) > self._entries_max or self._bytes > self._bytes_max:
            _, (_, gone_bytes) = self._held.popitem(last=False)
            self._bytes -= gone_bytes
