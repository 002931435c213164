"""How long a fault was felt, by what the probe was told: pure functions over a record.

The probe writes a row and reads it back by its token, again and again. A stack served again when a
cycle that was begun after the fault came to its end: nothing that was under way before counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.history.record import History, Ingest, Ok, Operated, Read


@dataclass(frozen=True, slots=True)
class Cycle:
    """One write that was read back. Nanoseconds of the record's clock."""

    began: int
    ended: int


def cycles(history: History, *, probe: str = "-probe") -> list[Cycle]:
    """The whole cycles of all probes, in order of their beginning."""
    by_client: dict[str, list[Operated]] = {}
    for operated in history.operations:
        if operated.client.endswith(probe):
            by_client.setdefault(operated.client, []).append(operated)
    found = [cycle for operations in by_client.values() for cycle in _of_client(operations)]
    return sorted(found, key=lambda cycle: cycle.began)


def _of_client(operations: Iterable[Operated]) -> list[Cycle]:
    found: list[Cycle] = []
    began: int | None = None
    for operated in operations:
        operation = operated.operation
        if isinstance(operation, Ingest) and operation.attempt == 1:
            began = operated.begin
        elif isinstance(operation, Read) and isinstance(operated.end, Ok) and began is not None:
            found.append(Cycle(began, operated.end.at))
            began = None
    return found


def served_again_s(found: Sequence[Cycle], fault_at: int) -> float | None:
    """Seconds from a fault to the end of the first cycle that was begun after it; None: never."""
    starts = [cycle.began for cycle in found]
    later = found[bisect_left(starts, fault_at) :]
    if not later:
        return None
    return (min(cycle.ended for cycle in later) - fault_at) / 1e9


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that so large a share does not exceed; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
