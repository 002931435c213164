"""Rounds: ranges that were claimed back to back, whose files become one publication.

Under load each round of claims takes one range a shard. Published one by one, they would cost as
many transactions, and each but the first would wait for the publisher's linger; so those that are
written first wait for the others. It is a matter of speed only: whoever waits holds its lease as
before, proposes a commit of its own, and goes alone when the others take too long.
"""

from __future__ import annotations

import asyncio
import contextlib


class Round:
    """One round: the ranges in it that are being written, whether there was load when one of them
    was claimed, and whether more may join."""

    def __init__(self) -> None:
        self.loaded = False
        self.closed = False
        self._writing: set[int] = set()
        self._written = asyncio.Event()

    def join(self, lease_id: int) -> None:
        self._writing.add(lease_id)

    def leave(self, lease_id: int) -> None:
        """The range is written, or has ended in another way; once more changes nothing."""

        self._writing.discard(lease_id)
        self._settle()

    def close(self) -> None:
        """Nobody joins any more."""

        self.closed = True
        self._settle()

    async def gathered(self, patience_s: float) -> bool:
        """Returns once all of it is written (True), or time is up."""

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                return await self._written.wait()
        return False

    def _settle(self) -> None:
        if self.closed and not self._writing:
            self._written.set()
