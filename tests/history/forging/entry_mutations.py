"""Mutations of the order and the ends of entries. See `forged`."""

from __future__ import annotations

from typing import Any

from tests.history.anomalies import Kind
from tests.history.forging.forged import (
    Forged,
    accepted,
    breaks,
    placed_at,
    receipt_of,
    replace,
    set_receipt,
)
from tests.history.record import (
    BatchSeen,
    Covered,
    Fail,
    Ingest,
    Read,
    Status,
    Token,
    Wait,
)


@breaks(Kind.ORDER_INVERSION)
def swap_positions(forged: Forged) -> bool:
    """Two requests of the same ordering, one after the other's receipt, swap their places."""

    answers_of = accepted(forged)
    found = []
    for a in answers_of.values():
        for b in answers_of.values():
            one, other = receipt_of(a[0][1]), receipt_of(b[0][1])
            begin = min(
                i.at
                for i in forged.invokes().values()
                if isinstance(i.operation, Ingest)
                and isinstance(b[0][2].operation, Ingest)
                and i.operation.request == b[0][2].operation.request
            )
            same = one.token.own[0][0] == other.token.own[0][0]
            if same and min(line.at for _, line, _ in a) < begin:
                found.append((a, b))
    chosen = forged.pick(found)
    if chosen is None:
        return False
    a, b = chosen
    places = receipt_of(a[0][1]).token.own[0], receipt_of(b[0][1]).token.own[0]
    for answers, place_on_bus in ((a, places[1]), (b, places[0])):
        for place, line, _ in answers:
            set_receipt(forged, place, placed_at(receipt_of(line), *place_on_bus))
    return True


@breaks(Kind.SHARD_CHANGE)
def change_shard(forged: Forged) -> bool:
    answers_of = accepted(forged)
    by_order: dict[Any, list[int]] = {}
    for request, answers in answers_of.items():
        asked = answers[0][2].operation
        assert isinstance(asked, Ingest)
        what = asked.ordering_key or tuple(sorted(asked.tables))
        by_order.setdefault((asked.principal, what), []).append(request)
    chosen = forged.pick([requests for requests in by_order.values() if len(requests) > 1])
    if chosen is None:
        return False
    for place, line, _ in answers_of[chosen[-1]]:
        receipt = receipt_of(line)
        shard = 1 - receipt.token.own[0][0]
        end = next(s.end for s in forged.end_state.shards if s.shard == shard)
        set_receipt(forged, place, placed_at(receipt, shard, end))
    return True


@breaks(Kind.POSITION_GAP, Kind.LOST_WRITE)
def leave_gap(forged: Forged) -> bool:
    """The highest position of a shard moves far up."""

    answers_of = accepted(forged)
    if not answers_of:
        return False
    top = max(answers_of.values(), key=lambda answers: receipt_of(answers[0][1]).token.own[0][1])
    shard, position = receipt_of(top[0][1]).token.own[0]
    for place, line, _ in top:
        set_receipt(forged, place, placed_at(receipt_of(line), shard, position + 100_000))
    return True


@breaks(Kind.UNSTABLE_END)
def move_status(forged: Forged) -> bool:
    chosen = forged.pick(
        [
            (place, line)
            for place, line, _ in forged.answered(Status)
            if isinstance(line.result, BatchSeen) and line.result.snapshot_id is not None
        ]
    )
    if chosen is None:
        return False
    place, line = chosen
    seen = replace(line.result, snapshot_id=line.result.snapshot_id + 1)
    forged.lines[place] = replace(line, result=seen)
    return True


@breaks(Kind.UNSTABLE_END)
def reopen_batch(forged: Forged) -> bool:
    """A batch that was known to be terminal is told to be merely accepted again."""

    ended: dict[str, int] = {}
    found = []
    for place, line, invoke in forged.answered(Status):
        assert isinstance(invoke.operation, Status)
        assert isinstance(line.result, BatchSeen)
        batch_id = invoke.operation.batch_id
        if ended.get(batch_id, invoke.at) < invoke.at:
            found.append((place, line))
        if line.result.state != "accepted":
            ended.setdefault(batch_id, line.at)
    chosen = forged.pick(found)
    if chosen is None:
        return False
    place, line = chosen
    forged.lines[place] = replace(line, result=BatchSeen("accepted"))
    return True


@breaks(Kind.FALSE_QUARANTINE)
def quarantine_falsely(forged: Forged) -> bool:
    bad = {(fact.shard, fact.position) for fact in forged.end_state.quarantined}
    chosen = forged.pick(
        [
            (place, line, own)
            for place, line, invoke in (*forged.answered(Wait), *forged.answered(Read))
            if isinstance(invoke.operation, Wait | Read)
            and (own := {p for token in invoke.operation.tokens for p in token.own})
            and not own & bad
        ]
    )
    if chosen is None:
        return False
    place, line, own = chosen
    shard, position = min(own)
    batch_id = f"b1-{shard}-{position}"
    forged.lines[place] = Fail(line.id, line.at, "quarantined", "", batch_id)
    return True


@breaks(Kind.MISSED_QUARANTINE)
def miss_quarantine(forged: Forged) -> bool:
    """A wait was answered although it owned an entry that is quarantined for good."""

    marks = {fact.snapshot_id: fact.watermark for fact in forged.end_state.snapshots}
    found = [
        (invoke, fact)
        for _, line, invoke in forged.answered(Wait)
        for fact in forged.end_state.quarantined
        if isinstance(line.result, Covered)
        and fact.successor_batch_id is None
        and marks[line.result.snapshot_id][fact.shard] > fact.position
    ]
    chosen = forged.pick(found)
    if chosen is None:
        return False
    invoke, fact = chosen
    own = (fact.shard, fact.position)
    token = Token("h", 0, {fact.shard: fact.position + 1}, (own,))
    forged.lines[forged.lines.index(invoke)] = replace(invoke, operation=Wait((token,)))
    return True
