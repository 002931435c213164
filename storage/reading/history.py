"""Tokens across lines of history: what an older line's token means today (contract D5, D6).

A line forks when a backup is restored or the bus is changed. Up to the fork both lines are the same
past, so a token that asks for nothing above any fork on the path from its line to the current one
keeps its meaning word for word. A token above one asks for something that was lost.

A planned change of shards forks at the drained end (G2): everything below the fork is terminal in
the fork's snapshot. A shard that the current line does not have any more can only come from there,
so its position is replaced by the fork's snapshot as a floor.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence

from lakebus.errors import TokenHistoryLost
from lakebus.tokens import VisibilityToken
from storage.catalog.interface import HistoryFork


def map_token(
    token: VisibilityToken,
    *,
    path: Sequence[HistoryFork],
    shards: Collection[int],
) -> VisibilityToken:
    """The token in the words of the current history, the last of `path` (which is not empty).

    `shards` are the shards of the current line. The token's signature has been checked, so an
    unknown history is a line of this lake that was lost. Raises TokenHistoryLost.
    """

    current = path[-1].history
    if token.history == current:
        return token
    forks = _forks_after(token.history, path)
    if forks is None:
        raise TokenHistoryLost(
            "the token belongs to a line of history that is no ancestor of the present one: the "
            "rows it names were lost by a restore; write them again and use the new token"
        )
    for fork in forks:
        if token.floor > fork.snapshot_id or any(
            position > fork.positions.get(shard, 0) for shard, position in token.positions.items()
        ):
            raise TokenHistoryLost(
                "the token names rows or changes after the point from which the lake was "
                "restored; they were lost: write them again and use the new token"
            )
    kept = {shard: position for shard, position in token.positions.items() if shard in shards}
    floor = token.floor
    if len(kept) < len(token.positions):
        floor = max(floor, *(fork.snapshot_id for fork in forks))
    return VisibilityToken(current, floor, kept, token.own)


def _forks_after(history: uuid.UUID, path: Sequence[HistoryFork]) -> Sequence[HistoryFork] | None:
    """The forks between `history` and the end of the path, or None when it is not on the path."""

    for index, fork in enumerate(path):
        if fork.history == history:
            return path[index + 1 :]
    return None
