"""A least-recently-used store that is bounded by the summed cost of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")

#: What an entry costs beside its value: keys and links.
_ENTRY_COST = 256


class Kept(Generic[_Value]):
    """A value that costs more than a quarter of the bound is not kept at all."""

    def __init__(self, cost_max: int) -> None:
        self._cost_max = cost_max
        self._cost = 0
        self._entries: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> _Value | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: _Value, cost: int) -> None:
        cost += _ENTRY_COST
        if cost > self._cost_max // 4:
            return
        replaced = self._entries.pop(key, None)
        self._cost += cost - (0 if replaced is None else replaced[1])
        self._entries[key] = (value, cost)
        while self._cost > self._cost_max:
            _, (_, freed) = self._entries.popitem(last=False)
            self._cost -= freed

    def clear(self) -> None:
        self._entries.clear()
        self._cost = 0
