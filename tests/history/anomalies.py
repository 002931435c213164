"""The anomalies: what a history can show that the contract forbids, each with the statement it
breaks. The names follow Jepsen's and Elle's where theirs fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from tests.history.record import Operated


class Kind(StrEnum):
    """One kind of anomaly. `CONTRACT[kind]` names the statements it breaks."""

    # rows
    LOST_WRITE = "lost write"
    DUPLICATE = "duplicate"
    ABORTED_READ = "aborted read"
    PHANTOM = "phantom"
    FUTURE_READ = "future read"
    TORN_BATCH = "torn batch"
    DAMAGED_ROWS = "damaged rows"
    CHANGED_HISTORY = "changed history"
    # which snapshot was answered
    STALE_READ = "stale read"
    NON_MONOTONIC_READ = "non-monotonic read"
    WRONG_SNAPSHOT = "wrong snapshot"
    WRONG_TOKEN = "wrong token"
    STALE_SCHEMA = "stale schema"
    # receipts and keys
    UNSTABLE_RECEIPT = "unstable receipt"
    WRONG_RECEIPT = "wrong receipt"
    FALSE_CONFLICT = "false conflict"
    MISSED_CONFLICT = "missed conflict"
    BROKEN_REPLAY = "broken replay"
    # order
    POSITION_GAP = "position gap"
    SHARED_POSITION = "shared position"
    ORDER_INVERSION = "order inversion"
    SHARD_CHANGE = "shard change"
    # ends
    UNSTABLE_END = "unstable end"
    STUCK_ENTRY = "stuck entry"
    FALSE_QUARANTINE = "false quarantine"
    MISSED_QUARANTINE = "missed quarantine"
    # the catalog
    WATERMARK_REGRESSION = "watermark regression"
    WATERMARK_HOLE = "watermark hole"
    OVERLAPPING_RANGES = "overlapping ranges"
    TIME_REGRESSION = "time regression"
    BROKEN_LINE = "broken line"
    DANGLING_FILE = "dangling file"


#: Kind → (statements of the contract, what it means).
CONTRACT: dict[Kind, tuple[str, str]] = {
    Kind.LOST_WRITE: ("A1 C2 D3", "rows of an accepted entry are missing where they must be"),
    Kind.DUPLICATE: ("A3 A5 A6 C2", "one request has two entries, or its rows appear twice"),
    Kind.ABORTED_READ: ("A4 A10 A11", "rows of a request that was refused were read"),
    Kind.PHANTOM: ("C2", "rows or entries that no recorded request explains"),
    Kind.FUTURE_READ: ("D1", "rows were read before their request was sent"),
    Kind.TORN_BATCH: ("A8", "a snapshot shows a part of a request, over all its tables"),
    Kind.DAMAGED_ROWS: ("D8", "as many rows as were sent, but not the rows that were sent"),
    Kind.CHANGED_HISTORY: ("D8", "two reads of one snapshot saw different rows"),
    Kind.STALE_READ: ("D2 D3 D4", "older than a token or an earlier answer asked for"),
    Kind.NON_MONOTONIC_READ: ("D6", "older than the snapshot that the caller's token names"),
    Kind.WRONG_SNAPSHOT: ("C4 D1 D2", "another snapshot than the fixed one that was asked for"),
    Kind.WRONG_TOKEN: ("D6", "an answer's token does not name the snapshot it read or made"),
    Kind.STALE_SCHEMA: ("D1 D2", "a table was seen after its drop, or missed after its creation"),
    Kind.UNSTABLE_RECEIPT: ("A2 A3", "two answers to one request carry different receipts"),
    Kind.WRONG_RECEIPT: ("A2", "a receipt does not describe the request or its own entry"),
    Kind.FALSE_CONFLICT: ("A4", "a conflict although the key's payload was the same"),
    Kind.MISSED_CONFLICT: ("A4", "a key was accepted with two different payloads"),
    Kind.BROKEN_REPLAY: ("A3", "after its receipt a request was refused for what replays ignore"),
    Kind.POSITION_GAP: ("Words: position", "positions of a shard are missing and nobody has them"),
    Kind.SHARED_POSITION: ("C2", "two requests have one position"),
    Kind.ORDER_INVERSION: ("A7", "accepted after another's receipt, yet placed before it"),
    Kind.SHARD_CHANGE: ("A7", "one ordering key was put on two shards"),
    Kind.UNSTABLE_END: ("C2", "an entry's end is told in two ways"),
    Kind.STUCK_ENTRY: ("B3 C2", "an entry is not terminal although the bus was drained"),
    Kind.FALSE_QUARANTINE: ("D4", "`quarantined` although none of the own entries was"),
    Kind.MISSED_QUARANTINE: ("D4", "a wait ended well although an own entry was quarantined"),
    Kind.WATERMARK_REGRESSION: ("C3", "a watermark decreased within a line of history"),
    Kind.WATERMARK_HOLE: ("C1 C3", "a watermark passed positions that were not terminal"),
    Kind.OVERLAPPING_RANGES: ("B2 C2", "a position became terminal twice"),
    Kind.TIME_REGRESSION: ("C4", "a later snapshot has no later publication time"),
    Kind.BROKEN_LINE: ("C4", "snapshots do not form one line, or a range names none of them"),
    Kind.DANGLING_FILE: ("C1 C6", "files of a snapshot do not hold exactly its ranges' rows"),
}


class Anomaly(msgspec.Struct, frozen=True):
    """One finding: its kind, one sentence, and the operations that show it."""

    kind: Kind
    sentence: str
    operations: tuple[Operated, ...] = ()

    def __str__(self) -> str:
        statements, _ = CONTRACT[self.kind]
        lines = [f"{self.kind.value} ({statements}): {self.sentence}"]
        lines += [f"    {describe(operated)}" for operated in self.operations]
        return "\n".join(lines)


def describe(operated: Operated) -> str:
    """One line on an operation: who, when, what, and how it ended."""

    end = operated.end
    told = "no end" if end is None else f"{type(end).__name__.lower()} at {end.at}"
    asked = repr(operated.operation)
    asked = asked if len(asked) <= 160 else asked[:157] + "…"
    return f"{operated.id} by {operated.client} at {operated.begin}, {told}: {asked}"


class Findings:
    """Collects anomalies: all are counted, the first `kept_max` of each kind are kept."""

    def __init__(self, *, kept_max: int = 100) -> None:
        self._kept_max = kept_max
        self.counts: Counter[Kind] = Counter()
        self.kept: list[Anomaly] = []

    def add(self, kind: Kind, sentence: str, operations: Iterable[Operated] = ()) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= self._kept_max:
            self.kept.append(Anomaly(kind, sentence, tuple(operations)))
