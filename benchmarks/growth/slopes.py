"""The slope of a curve on two logarithmic axes: 0 is a cost that does not grow, 1 one that grows as
the work does. A constant with a small part that grows looks flat over many decades, so the end of
the curve is fitted by itself, too."""

from __future__ import annotations

import math
from collections.abc import Mapping

#: How much of the axis is the end of a curve.
END = 100.0


def slope(curve: Mapping[float, float]) -> float | None:
    """The exponent of the power law that fits best; None for less than two positive points."""

    points = [(math.log(at), math.log(cost)) for at, cost in curve.items() if at > 0 and cost > 0]
    if len({x for x, _ in points}) < 2:
        return None
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread


def end_slope(curve: Mapping[float, float]) -> float | None:
    """The slope of the last two decades."""

    if not curve:
        return None
    largest = max(curve)
    return slope({at: cost for at, cost in curve.items() if at * END >= largest})
