"""Rates: so much a second, and a burst of it at once, kept as one number a bucket.

The generic cell rate algorithm (ITU-T I.371, annex A), which is a token bucket written as time: a
bucket is the moment at which it would be full again. All arithmetic is in whole nanoseconds, so
that the wait that a refusal names is exactly the one after which the same request passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_NS, _NS_A_MS = 1_000_000_000, 1_000_000
#: What the clock's own floating point may be wrong by.
_SLACK_NS = 1_000
_BUCKETS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_s` units a second, and `burst` of them at once. A burst holds one unit at least."""

    per_s: float
    burst: float

    @property
    def burst_ns(self) -> int:
        return self.time_ns(max(1.0, self.burst))

    def time_ns(self, units: float) -> int:
        return math.ceil(units / self.per_s * _NS)


#: What is limited, of which principal, and of which key where it has a quota of its own.
Key = tuple[str, int, str]


class Buckets:
    """The buckets of one process, by whom they belong to."""

    def __init__(self) -> None:
        self._full_ns: dict[Key, int] = {}

    def wait_ms(self, key: Key, rate: Rate, units: float, now_s: float) -> int:
        """0 when `units` may be taken now; else how long until they may be, if nothing else is.

        More than the burst may be taken from a full bucket: it then owes the rest.
        """

        now_ns = round(now_s * _NS)
        ahead_ns = self._full_ns.get(key, now_ns) - now_ns
        room_ns = rate.burst_ns - min(rate.time_ns(units), rate.burst_ns)
        wait_ns = ahead_ns - room_ns
        return -(-wait_ns // _NS_A_MS) if wait_ns > _SLACK_NS else 0

    def take(self, key: Key, rate: Rate, units: float, now_s: float) -> None:
        """Takes them, owed if they are not there."""

        now_ns = round(now_s * _NS)
        if key not in self._full_ns and len(self._full_ns) >= _BUCKETS_MAX:
            self._forget_full(now_ns)
        self._full_ns[key] = max(self._full_ns.get(key, now_ns), now_ns) + rate.time_ns(units)

    def _forget_full(self, now_ns: int) -> None:
        """A full bucket is like one that was never there."""

        self._full_ns = {key: at for key, at in self._full_ns.items() if at > now_ns}
