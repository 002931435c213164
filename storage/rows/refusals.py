"""What does not fit in an Arrow column: which row, why, and where inside of its value.

A row is told of once for each part of its column, with the first value that does not fit: a row may
hold millions of values, and one is enough to refuse it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Refusal:
    """`place`: in the array that was looked at. `path`: inside of a nested value, like `.b[0]`.
    `shown`: the value there, None for the whole value at the place."""

    place: int
    reason: str
    path: str = ""
    shown: str | None = None


@dataclass(slots=True)
class Refusals:
    """Of one array. `bounds`: where the values of each row end, when a row has several."""

    bounds: NDArray[np.int32] | None = None
    found: list[Refusal] = field(default_factory=list)

    def add(self, place: int, reason: str, path: str = "", shown: str | None = None) -> None:
        self.found.append(Refusal(place, reason, path, shown))

    def add_all(self, places: NDArray[np.int64], reason: str, path: str = "") -> None:
        """One of each row."""

        if self.bounds is not None:
            rows = np.searchsorted(self.bounds, places, "right")
            places = places[np.unique(rows, return_index=True)[1]]
        for place in places.tolist():
            self.add(place, reason, path)

    def row_end(self, place: int) -> int:
        """Where the values of the row with this one end."""

        if self.bounds is None:
            return place + 1
        return int(self.bounds[np.searchsorted(self.bounds, place, "right")])

    def of_items(self, offsets: NDArray[np.int32]) -> Refusals:
        """For the items of the lists in this array."""

        return Refusals(offsets[1:] if self.bounds is None else offsets[self.bounds])

    def of_fields(self) -> Refusals:
        """For a field of the structs in this array."""

        return Refusals(self.bounds)

    def take(self, inner: Iterable[Refusal], step: str) -> None:
        """What was found of a field."""

        self.found += [Refusal(one.place, one.reason, step + one.path, one.shown) for one in inner]

    def take_items(
        self, inner: Iterable[Refusal], offsets: NDArray[np.int32], step: str = ""
    ) -> None:
        """What was found of items, told of the lists that hold them."""

        for one in inner:
            row = int(np.searchsorted(offsets, one.place, "right")) - 1
            path = f"[{one.place - int(offsets[row])}]{step}{one.path}"
            self.found.append(Refusal(row, one.reason, path, one.shown))
