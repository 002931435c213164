"""A row of the report: a goal, what was found, and the verdict with its conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.goals import judging
from benchmarks.goals.context import Context
from benchmarks.goals.judging import Bound, Judged, Spread, Verdict
from benchmarks.goals.turns import Turns


@dataclass(frozen=True, slots=True)
class Row:
    """`peer` is None where the goal has none, `bound` where the row only informs."""

    goal: str
    what: str
    unit: str
    ours: Spread | None
    judged: Judged
    bound: Bound | None = None
    peer_name: str = ""
    peer: Spread | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "goal": self.goal,
            "what": self.what,
            "unit": self.unit,
            "ours": _spread(self.ours),
            "peer": self.peer_name,
            "peer_figure": _spread(self.peer),
            "ratio_or_value": self.judged.value,
            "interval_95": self.judged.interval,
            "wanted": None if self.bound is None else str(self.bound),
            "verdict": self.judged.verdict.value,
            "reason": self.judged.reason,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A group of goals that are measured together.

    :param run: takes the turns; may end early, what it has is judged.
    :param judge: rows from whatever turns there are.
    :param details: lines of the report instead of the usual table of contenders.
    """

    name: str
    goals: tuple[str, ...]
    measures: str
    conditions: str
    run: Callable[[Context, Turns], None]
    judge: Callable[[Turns], list[Row]]
    details: Callable[[Turns], list[str]] | None = None


def against(
    turns: Turns,
    goal: str,
    what: str,
    *,
    ours: str,
    peer: str,
    figure: str,
    unit: str,
    bound: Bound,
    note: str = "",
    paired_as: tuple[str, str] | None = None,
) -> Row:
    """Ours over a peer's, of the repetitions that both have. `paired_as`: other contenders whose
    turns are the interleaved pairs, for a bound near unity."""

    a, b = turns.pairs(ours, peer, figure)
    others = turns.others_cores(ours, peer)
    if not a and turns.values(ours, figure):
        return Row(
            goal, what, unit, spread_of(turns.values(ours, figure)),
            Judged.not_measured("the peer gave no figure in a repetition in which ours did"),
            bound, peer, spread_of(turns.values(peer, figure)), note,
        )  # fmt: skip
    if paired_as is not None and bound.near_unity:
        many = turns.pairs(*paired_as, figure)
        if len(many[0]) > len(a):
            a, b = many
            others = turns.others_cores(*paired_as)
    return Row(
        goal, what, unit, spread_of(a or turns.values(ours, figure)),
        judging.judge_ratio(a, b, bound).beside_others(others), bound, peer,
        spread_of(b or turns.values(peer, figure)), note,
    )  # fmt: skip


def alone(
    turns: Turns,
    goal: str,
    what: str,
    *,
    ours: str,
    figure: str,
    bound: Bound,
    peer: str = "",
    note: str = "",
) -> Row:
    """A figure with a bound in its own unit; a peer's stands beside it for information."""

    values = turns.values(ours, figure)
    beside = turns.values(peer, figure) if peer else []
    judged = judging.judge_value(values, bound).beside_others(turns.others_cores(ours))
    return Row(
        goal, what, bound.unit, spread_of(values), judged, bound, peer, spread_of(beside), note
    )


def absent(goal: str, what: str, reason: str) -> Row:
    return Row(goal, what, "", None, Judged.not_measured(reason))


def information(
    goal: str, what: str, unit: str, values: Sequence[float], reason: str, **more: Any
) -> Row:
    """A figure that nothing is judged by; the reason says why."""

    return Row(
        goal, what, unit, spread_of(values), Judged(Verdict.NOT_COMPARABLE, None, reason=reason),
        **more,
    )  # fmt: skip


def spread_of(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def _spread(spread: Spread | None) -> dict[str, float] | None:
    if spread is None:
        return None
    return {"median": spread.median, "min": spread.low, "max": spread.high, "runs": spread.runs}
