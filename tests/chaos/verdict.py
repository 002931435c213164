"""What a run proves: pure functions from the record, the faults and the end to a list of problems.

A run is good only when the checker found nothing, everything came back, every answer was typed, and
enough was really done: a run in which nothing happened proves nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.chaos.injector import Done
from tests.chaos.session import FINDING
from tests.history.record import Fail, History, Ok, Operated

_DROPPED = "dropped: "


@dataclass(frozen=True, slots=True)
class Minima:
    """What a run must have done to prove anything."""

    ingests: int
    reads: int
    faults: int

    @classmethod
    def of(cls, *, seconds: float, planned: int) -> Minima:
        """A few a second; and half of the planned faults must have struck somebody."""
        return cls(ingests=int(seconds), reads=int(seconds), faults=max(1, planned // 2))


def outcomes(history: History) -> dict[str, dict[str, int]]:
    """Operations by kind and end: `ok`, `fail CODE`, `unknown REASON`."""
    found: dict[str, Counter[str]] = {}
    for operated in history.operations:
        kind = type(operated.operation).__name__.lower()
        found.setdefault(kind, Counter())[_end_of(operated)] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(found.items())}


def _end_of(operated: Operated) -> str:
    end = operated.end
    if end is None:
        return "unknown, the client died"
    if isinstance(end, Ok):
        return "ok"
    if isinstance(end, Fail):
        return f"fail {end.code}"
    return f"unknown {_reason(end.reason)}"


def _reason(text: str) -> str:
    """The sort of a reason: without addresses and numbers of its own."""
    if text.startswith(_DROPPED):
        return "dropped " + text.removeprefix(_DROPPED).split("(", 1)[0]
    return text.split(":", 1)[0]


def findings(history: History) -> list[str]:
    """Answers that nobody may give, as the clients noted them."""
    return [
        note.text.removeprefix(FINDING) for note in history.notes if note.text.startswith(FINDING)
    ]


def late_failures(history: History, *, healthy_since: int) -> list[str]:
    """Operations begun when everything was healed and served again, and yet nobody knows how they
    ended.

    :param healthy_since: nanoseconds of the record's clock.
    """
    found = []
    for operated in history.operations:
        if operated.begin > healthy_since and not isinstance(operated.end, Ok | Fail):
            after_s = (operated.begin - healthy_since) / 1e9
            found.append(f"{operated.id} {after_s:.1f} s after all was well: {_end_of(operated)}")
    return found


def too_little(history: History, done: Iterable[Done], minima: Minima) -> list[str]:
    """What was not exercised."""
    by_kind = outcomes(history)
    struck = sum(1 for one in done if not one.missed)
    counted = {
        "ingests": (by_kind.get("ingest", {}).get("ok", 0), minima.ingests),
        "reads": (by_kind.get("read", {}).get("ok", 0), minima.reads),
        "faults": (struck, minima.faults),
    }
    return [
        f"only {found} {name} of at least {wanted}: the run proves nothing"
        for name, (found, wanted) in counted.items()
        if found < wanted
    ]


def shown(problems: Sequence[str], *, most: int = 30) -> list[str]:
    """The first of them, and how many more there are."""
    rest = len(problems) - most
    return [*problems[:most], *([f"… and {rest} more"] if rest > 0 else [])]
