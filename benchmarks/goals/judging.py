"""How a figure is judged against its goal. Nothing here measures; all of it is tested.

A goal has one bound. Repetitions of ours and of the peer are paired in the order they ran, so that
a drift of the machine meets both.

- Far from unity the ratio of the medians is judged, and five repetitions are wanted.
- Within 1.3 times of unity the 95 % interval of a bootstrap over pairs must clear the bound, and
  thirty pairs are wanted. A loss may be stated on fewer (the interval lies beyond the bound); a win
  may not.
- A bound in units of its own (ms, GB) is judged by the median, the same way.

What cannot be decided says so, with what is missing.
"""

from __future__ import annotations

import enum
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NEAR_UNITY = 1.3
REPETITIONS_WANTED = 5
PAIRS_WANTED = 30
#: More of the processor than this taken by strangers, and nothing is called a pass. The kernel's
#: own threads count as strangers, so it is not zero.
OTHERS_MAX_CORES = 0.3
_RESAMPLES = 5_000


class Verdict(enum.Enum):
    PASS = "pass"
    SHORT = "short"
    UNDECIDED = "undecided"
    NOT_COMPARABLE = "not comparable"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Bound:
    """What is wanted: at least, or at most, `value` times the peer, or of `unit`."""

    value: float
    at_least: bool
    unit: str = "x"

    @property
    def near_unity(self) -> bool:
        return self.unit == "x" and 1 / NEAR_UNITY <= self.value <= NEAR_UNITY

    def met_by(self, value: float) -> bool:
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        space = "" if self.unit == "x" else " "
        return f"{'≥' if self.at_least else '≤'} {self.value:g}{space}{self.unit}"


def at_least(value: float, unit: str = "x") -> Bound:
    return Bound(value, True, unit)


def at_most(value: float, unit: str = "x") -> Bound:
    return Bound(value, False, unit)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes of repeated runs."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict with what it stands on. `interval`: of the ratio (or value), 95 %."""

    verdict: Verdict
    value: float | None
    interval: tuple[float, float] | None = None
    reason: str = ""

    @classmethod
    def not_measured(cls, reason: str) -> Judged:
        return cls(Verdict.NOT_MEASURED, None, reason=reason)

    def beside_others(self, cores: float) -> Judged:
        """The same on a machine that was busy with other things: no win can be told from that."""

        if cores <= OTHERS_MAX_CORES or self.verdict is Verdict.NOT_MEASURED:
            return self
        verdict = Verdict.UNDECIDED if self.verdict is Verdict.PASS else self.verdict
        said = f"others took {cores:.1f} cores meanwhile"
        reason = f"{self.reason}; {said}" if self.reason else said
        return Judged(verdict, self.value, self.interval, reason)

    @classmethod
    def not_comparable(cls, value: float | None, reason: str) -> Judged:
        return cls(Verdict.NOT_COMPARABLE, value, reason=reason)


def bootstrap(
    pairs: Sequence[float], *, seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """The interval that 95 of 100 geometric means of resampled ratios lie in."""

    if not pairs or min(pairs) <= 0:
        raise ValueError("ratios must be positive, and there must be some")
    logs = [math.log(pair) for pair in pairs]
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(logs, k=len(logs))) for _ in range(resamples))
    low, high = (means[int(resamples * share)] for share in (0.025, 0.975))
    return math.exp(low), math.exp(high)


def judge_ratio(ours: Sequence[float], peer: Sequence[float], bound: Bound) -> Judged:
    """`ours` over `peer`, run by run."""

    runs = min(len(ours), len(peer))
    if runs == 0:
        missing = "ours" if not ours else "the peer"
        return Judged.not_measured(f"{missing} gave no figure")
    if min(ours) <= 0 or min(peer) <= 0:
        return Judged(Verdict.UNDECIDED, None, reason="a run gave nothing or less")
    if bound.near_unity:
        return _judge_pairs([a / b for a, b in zip(ours, peer, strict=False)], bound)
    value = statistics.median(ours) / statistics.median(peer)
    return _judge_median(value, runs, bound)


def judge_value(values: Sequence[float], bound: Bound) -> Judged:
    """A figure with a bound in its own unit; the median is judged."""

    if not values:
        return Judged.not_measured("ours gave no figure")
    return _judge_median(statistics.median(values), len(values), bound)


def judge_count(values: Sequence[float], bound: Bound) -> Judged:
    """Something counted (errors, bytes, statements) that does not vary by chance: every run must
    be within the bound, and one run is enough."""

    if not values:
        return Judged.not_measured("ours gave no figure")
    worst = min(values) if bound.at_least else max(values)
    return Judged(Verdict.PASS if bound.met_by(worst) else Verdict.SHORT, worst)


def _judge_median(value: float, runs: int, bound: Bound) -> Judged:
    few = "" if runs >= REPETITIONS_WANTED else f"{runs} of {REPETITIONS_WANTED} repetitions"
    return Judged(Verdict.PASS if bound.met_by(value) else Verdict.SHORT, value, reason=few)


def _judge_pairs(pairs: Sequence[float], bound: Bound) -> Judged:
    low, high = bootstrap(pairs)
    value = math.exp(statistics.fmean(math.log(pair) for pair in pairs))
    few = "" if len(pairs) >= PAIRS_WANTED else f"{len(pairs)} of {PAIRS_WANTED} pairs"
    surely_met = bound.met_by(low) and bound.met_by(high)
    surely_missed = not bound.met_by(low) and not bound.met_by(high)
    if surely_missed and len(pairs) >= REPETITIONS_WANTED:
        return Judged(Verdict.SHORT, value, (low, high), few)
    if surely_met and not few:
        return Judged(Verdict.PASS, value, (low, high))
    return Judged(Verdict.UNDECIDED, value, (low, high), few or "the interval holds the bound")
