"""What the mutations share: a history to be forged, the register of operators, and small views.

Each operator makes one small change, to what one client was told or to one fact of the end state,
and names the kinds of which the checker must find at least one (the first is the one it stands
for). An operator answers False when the history has no place for it. They mutate what
`tests.history.forging.valid` makes: its reads are complete and its bus is drained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from tests.history.anomalies import Kind
from tests.history.end_state import EndState
from tests.history.record import (
    Fail,
    Ingest,
    Invoke,
    Line,
    Ok,
    Read,
    Receipt,
    Receipted,
    Rows,
    Token,
)

replace = msgspec.structs.replace


@dataclass(slots=True)
class Forged:
    """A history to be mutated; operators work on a copy of `lines`."""

    lines: list[Line]
    end_state: EndState
    random: random.Random

    def __post_init__(self) -> None:
        self.lines = list(self.lines)

    def invokes(self) -> dict[str, Invoke]:
        return {line.id: line for line in self.lines if isinstance(line, Invoke)}

    def answered(self, kind: type[Any]) -> Iterator[tuple[int, Ok, Invoke]]:
        invokes = self.invokes()
        for place, line in enumerate(self.lines):
            if isinstance(line, Ok) and isinstance(invokes[line.id].operation, kind):
                yield place, line, invokes[line.id]

    def refused(self, code: str) -> Iterator[tuple[int, Fail, Invoke]]:
        invokes = self.invokes()
        for place, line in enumerate(self.lines):
            if isinstance(line, Fail) and line.code == code:
                yield place, line, invokes[line.id]

    def receipts(self) -> dict[int, Receipt]:
        found: dict[int, Receipt] = {}
        for _, line, invoke in self.answered(Ingest):
            assert isinstance(invoke.operation, Ingest)
            assert isinstance(line.result, Receipted)
            found.setdefault(invoke.operation.request, line.result.receipt)
        return found

    def pick(self, choices: list[Any]) -> Any:
        return self.random.choice(choices) if choices else None


Operator = Callable[[Forged], bool]
OPERATORS: list[tuple[Operator, tuple[Kind, ...]]] = []


def breaks(*kinds: Kind) -> Callable[[Operator], Operator]:
    def register(operator: Operator) -> Operator:
        OPERATORS.append((operator, kinds))
        return operator

    return register


# --- views of reads ---


def groups_seen(forged: Forged) -> list[tuple[int, str, int]]:
    """(line, table, request) of everything that was read of a request with a receipt and without a
    second entry."""

    places = {(fact.shard, fact.position) for fact in forged.end_state.quarantined}
    known = {q for q, receipt in forged.receipts().items() if receipt.token.own[0] not in places}
    return [
        (place, table, request)
        for place, line, _ in forged.answered(Read)
        if isinstance(line.result, Rows)
        for table, groups in line.result.tables.items()
        for request in groups
        if request in known
    ]


def set_group(
    forged: Forged, place: int, table: str, request: int, group: tuple[int, int] | None
) -> None:
    line = forged.lines[place]
    assert isinstance(line, Ok)
    assert isinstance(line.result, Rows)
    groups = dict(line.result.tables[table])
    if group is None:
        del groups[request]
    else:
        groups[request] = group
    tables = line.result.tables | {table: groups}
    forged.lines[place] = replace(line, result=replace(line.result, tables=tables))


def rows_of_answer(forged: Forged, place: int) -> Rows:
    line = forged.lines[place]
    assert isinstance(line, Ok)
    assert isinstance(line.result, Rows)
    return line.result


# --- views of receipts ---


def accepted(forged: Forged) -> dict[int, list[tuple[int, Ok, Invoke]]]:
    found: dict[int, list[tuple[int, Ok, Invoke]]] = {}
    for place, line, invoke in forged.answered(Ingest):
        assert isinstance(invoke.operation, Ingest)
        found.setdefault(invoke.operation.request, []).append((place, line, invoke))
    return found


def set_receipt(forged: Forged, place: int, receipt: Receipt) -> None:
    line = forged.lines[place]
    assert isinstance(line, Ok)
    assert isinstance(line.result, Receipted)
    forged.lines[place] = replace(line, result=replace(line.result, receipt=receipt))


def receipt_of(line: Ok) -> Receipt:
    assert isinstance(line.result, Receipted)
    return line.result.receipt


def placed_at(receipt: Receipt, shard: int, position: int) -> Receipt:
    token = Token(receipt.token.history, 0, {shard: position + 1}, ((shard, position),))
    return replace(receipt, batch_id=f"b1-{shard}-{position}", token=token)


def replays(forged: Forged) -> list[tuple[int, Ok, Invoke, Ok]]:
    """Later answers to a request, with the earliest one."""

    found = []
    for answers in accepted(forged).values():
        first = min(answers, key=lambda answer: answer[1].at)
        found += [(*answer, first[1]) for answer in answers if answer is not first]
    return found
