"""The schedule: which fault, which victim, at which moment, how long. A pure function of the seed.

Kinds are drawn from a deck that is shuffled when it is used up, so that a run of some minutes meets
each kind before it meets many twice. A victim is an ordinal among the processes of its kind that
live at that moment. Heavy faults, after which the stack starts anew, have a quiet time behind them
in which only the database, disks and network are struck, and take at most `heavy_share` of the run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tests.chaos.kinds import BY_NAME, Kind, cards_of

_FIRST_S = 3.0
_ORDINALS = 1 << 16


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault. `at_s` counts from the start of the load; `dice` settles what a kind has
    to choose besides its victim."""

    number: int
    kind: str
    at_s: float
    hold_s: float
    ordinal: int
    dice: float

    @property
    def known(self) -> Kind:
        return BY_NAME[self.kind]

    @property
    def until_s(self) -> float:
        return self.at_s + self.hold_s


def schedule(
    seed: int,
    kinds: Sequence[Kind],
    *,
    seconds: float,
    gap_s: float,
    kills: bool = False,
    maintenance: bool = False,
    heavy_share: float = 0.5,
) -> tuple[Fault, ...]:
    """Faults of a run of so many seconds, in order of their moment; all end within it.

    :param gap_s: mean pause between two faults.
    :param heavy_share: the part of the run that heavy faults and their quiet time may take.
    """

    if not kinds:
        raise ValueError("there is no kind of fault to draw from")
    cards = [
        kind for kind in kinds for _ in range(cards_of(kind, kills=kills, maintenance=maintenance))
    ]
    draw = _Deck(random.Random(f"chaos/{seed}"), cards)
    heavy_left_s = seconds * heavy_share
    faults: list[Fault] = []
    at_s, quiet_until_s = _FIRST_S, 0.0
    while at_s < seconds:
        kind = draw.next(
            on_ray=at_s >= quiet_until_s, heavy_s_max=min(heavy_left_s, seconds - at_s)
        )
        if kind is not None:
            fault = draw.fault(len(faults), kind, at_s)
            if fault.until_s <= seconds:
                faults.append(fault)
                if kind.heavy:
                    quiet_until_s = fault.until_s + kind.quiet_s
                    heavy_left_s -= fault.hold_s + kind.quiet_s
        at_s = round(at_s + gap_s * draw.randomness.uniform(0.4, 1.6), 3)
    return tuple(faults)


class _Deck:
    """Cards of kinds; what cannot be played now stays on top for later."""

    def __init__(self, randomness: random.Random, cards: Sequence[Kind]) -> None:
        self.randomness = randomness
        self._cards = list(cards)
        self._deck: list[Kind] = []

    def next(self, *, on_ray: bool, heavy_s_max: float) -> Kind | None:
        """The next card that may be played; None if there is none even in a full deck."""

        def playable(kind: Kind) -> bool:
            fits = not kind.heavy or kind.hold_s[1] + kind.quiet_s <= heavy_s_max
            return fits and (on_ray or not kind.on_ray)

        if not any(playable(kind) for kind in self._cards):
            return None
        while not any(playable(kind) for kind in self._deck):
            fresh = list(self._cards)
            self.randomness.shuffle(fresh)
            self._deck += fresh
        return self._deck.pop(next(n for n, kind in enumerate(self._deck) if playable(kind)))

    def fault(self, number: int, kind: Kind, at_s: float) -> Fault:
        low, high = kind.hold_s
        return Fault(
            number=number,
            kind=kind.name,
            at_s=at_s,
            hold_s=round(self.randomness.uniform(low, high), 3),
            ordinal=self.randomness.randrange(_ORDINALS),
            dice=round(self.randomness.random(), 6),
        )


def as_json(faults: Sequence[Fault]) -> str:
    return json.dumps([asdict(fault) for fault in faults], indent=1)


def from_json(text: str) -> tuple[Fault, ...]:
    return tuple(Fault(**one) for one in json.loads(text))
