"""All chance of a run, as independent streams of one seed.

Streams are named, so that a draw more in one place does not change what all others draw: a
schedule stays recognisable while the simulator grows.
"""

from __future__ import annotations

import random
import uuid


def stream(seed: int, name: str) -> random.Random:
    """Seeded by text, which `random` hashes with SHA-512: the same in every process."""

    return random.Random(f"{seed}/{name}")


class SeededChance:
    """Satisfies `lakebus.clock.Chance`."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def new_uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self._source.getrandbits(128), version=4)

    def jitter(self) -> float:
        return self._source.random()
