"""How much of what is shared somebody has had of late: what tells a flood from its neighbours.

Kept as two sums that fade together, by a factor of e in each `memory_s`: the time that places were
held, and the turns that began. Nothing is kept of single turns, so an answer costs the same however
many there were. Times come from whoever asks, so that one clock orders all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Use:
    """`held_s`: place-seconds, which for a principal that always holds n places is n·memory_s."""

    memory_s: float
    at_s: float = 0.0
    held_s: float = 0.0
    turns: float = 0.0

    def pass_to(self, now_s: float, held: int) -> None:
        """Until now, `held` places were held."""

        passed_s = now_s - self.at_s
        if passed_s <= 0.0:
            return
        kept = math.exp(-passed_s / self.memory_s)
        self.held_s = self.held_s * kept + held * self.memory_s * (1.0 - kept)
        self.turns *= kept
        self.at_s = now_s

    @property
    def turn_s(self) -> float:
        """How long turns take on average. Far too much while none has begun for long, so who asks
        bounds it."""

        return self.held_s / self.turns if self.turns else 0.0
