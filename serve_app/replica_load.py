"""Lets Serve see the load that comes past it: the requests of a replica's direct door.

Serve scales a deployment by the requests that its replicas have going, and lets those end before it
ends a replica. It counts what its own route brings. Here its count of this process's replica is
made to include the door's. Where Serve keeps no such count any more, nothing changes: the door's
requests are then not seen, as without this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_COUNT = "_num_ongoing_requests"


class _WithMore:
    """In place of the attribute: Serve changes its own part of the number, and reads the sum."""

    def __init__(self, more: Callable[[], int]) -> None:
        self._more = more

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else int(instance.__dict__[_COUNT]) + self._more()

    def __set__(self, instance: Any, value: int) -> None:
        # "+= 1" reads the sum and writes the sum, with nothing in between on the replica's loop.
        given = _COUNT in instance.__dict__
        instance.__dict__[_COUNT] = value - self._more() if given else value


def count_in(counter: Any, more: Callable[[], int]) -> None:
    """Adds `more()` to the going requests of this process's replica. `counter`: the class that
    counts them, Ray Serve's `ReplicaMetricsManager`."""

    setattr(counter, _COUNT, _WithMore(more))
