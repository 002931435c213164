"""What the turns of a benchmark found: figures by contender and repetition, and what failed.

A turn has a limit in time, and its failure is a finding: it is written down and the run goes on. A
contender that failed twice is not tried again.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from benchmarks.goals import processes

_FAILURES_MAX = 2
_AGAIN_S = 20.0

Figures = dict[str, Any]


@dataclass(slots=True)
class Turns:
    """`changed` is called after each turn, so that what was found is on disk whatever follows.
    `known_cpu_s`: CPU seconds of everything that belongs to the run; the rest is strangers'."""

    changed: Callable[[], None] = lambda: None
    known_cpu_s: Callable[[], float] = processes.busy_seconds
    figures: dict[str, dict[int, Figures]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _failed: Counter[str] = field(default_factory=Counter)

    def take(
        self, contender: str, repetition: int, turn: Callable[[], Figures], *, limit_s: float
    ) -> Figures | None:
        """Run a turn. None when it failed, or was not tried again."""

        if self._failed[contender] >= _FAILURES_MAX:
            return None
        busy, ours, began = processes.busy_seconds(), self.known_cpu_s(), time.monotonic()
        try:
            with limited(limit_s):
                found = turn()
        except Exception as error:  # noqa: BLE001 - whatever a contender does wrong is a finding
            self._failed[contender] += 1
            said = str(error) or type(error).__name__
            self.failures.append(f"{contender}, repetition {repetition + 1}: {said[:400]}")
            self.changed()
            return None
        busy, ours = processes.busy_seconds() - busy, self.known_cpu_s() - ours
        others = max(busy - ours, 0.0) / max(time.monotonic() - began, 1.0)
        # Of a window inside the turn, where the turn has measured it.
        found = {"cores_of_others": round(others, 3)} | found
        self.figures.setdefault(contender, {})[repetition] = found
        self.changed()
        return found

    def values(self, contender: str, figure: str) -> list[float]:
        """Of all repetitions that have the figure."""

        runs = self.figures.get(contender, {})
        return [runs[n][figure] for n in sorted(runs) if runs[n].get(figure) is not None]

    def pairs(self, ours: str, peer: str, figure: str) -> tuple[list[float], list[float]]:
        """Of the repetitions that both have."""

        a, b = self.figures.get(ours, {}), self.figures.get(peer, {})
        both = sorted(n for n in a.keys() & b.keys() if figure in a[n] and figure in b[n])
        return [a[n][figure] for n in both], [b[n][figure] for n in both]

    def others_cores(self, *contenders: str) -> float:
        """What strangers took of the processor beside them: the worst of the medians."""

        found = [self.values(contender, "cores_of_others") for contender in contenders]
        return max((statistics.median(values) for values in found if values), default=0.0)

    def counted(self, contender: str) -> tuple[int, int]:
        """Failures that a client saw, and requests that were answered well."""

        runs = self.figures.get(contender, {}).values()
        return (
            sum(sum(run.get("failures", {}).values()) for run in runs),
            sum(run.get("requests", 0) for run in runs),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "turns": {
                contender: [{"repetition": n, **runs[n]} for n in sorted(runs)]
                for contender, runs in self.figures.items()
            },
            "failed": self.failures,
            **self.notes,
        }


class TookTooLong(Exception):
    pass


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TookTooLong inside the block at the limit; again later, because an event loop logs
    what a callback of its own raises and goes on. Main thread only; does not nest."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
