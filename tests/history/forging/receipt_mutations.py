"""Mutations of receipts, keys and conflicts. See `forged`."""

from __future__ import annotations

from tests.history.anomalies import Kind
from tests.history.forging.forged import (
    Forged,
    accepted,
    breaks,
    placed_at,
    receipt_of,
    replace,
    replays,
    set_receipt,
)
from tests.history.record import (
    Fail,
    Ingest,
    Ok,
    Receipted,
    Token,
)


@breaks(Kind.UNSTABLE_RECEIPT)
def change_receipt(forged: Forged) -> bool:
    chosen = forged.pick(replays(forged))
    if chosen is None:
        return False
    set_receipt(forged, chosen[0], replace(receipt_of(chosen[1]), digest="other"))
    return True


@breaks(Kind.WRONG_RECEIPT)
def miscount_receipt(forged: Forged) -> bool:
    chosen = forged.pick(list(accepted(forged).values()))
    if chosen is None:
        return False
    for place, line, _ in chosen:
        receipt = receipt_of(line)
        set_receipt(forged, place, replace(receipt, rows=receipt.rows + 1))
    return True


@breaks(Kind.WRONG_RECEIPT)
def misplace_receipt_token(forged: Forged) -> bool:
    chosen = forged.pick(list(accepted(forged).values()))
    if chosen is None:
        return False
    for place, line, _ in chosen:
        receipt = receipt_of(line)
        shard, position = receipt.token.own[0]
        token = Token(receipt.token.history, 0, {shard: position}, receipt.token.own)
        set_receipt(forged, place, replace(receipt, token=token))
    return True


@breaks(Kind.DUPLICATE)
def accept_twice(forged: Forged) -> bool:
    chosen = forged.pick(replays(forged))
    if chosen is None:
        return False
    receipt = receipt_of(chosen[1])
    shard = receipt.token.own[0][0]
    end = next(s.end for s in forged.end_state.shards if s.shard == shard)
    set_receipt(forged, chosen[0], placed_at(receipt, shard, end))
    return True


@breaks(Kind.SHARED_POSITION)
def share_position(forged: Forged) -> bool:
    answers = list(accepted(forged).values())
    if len(answers) < 2:
        return False
    one, other = forged.random.sample(answers, 2)
    shard, position = receipt_of(one[0][1]).token.own[0]
    for place, line, _ in other:
        set_receipt(forged, place, placed_at(receipt_of(line), shard, position))
    return True


@breaks(Kind.FALSE_CONFLICT)
def refuse_replay_as_conflict(forged: Forged) -> bool:
    chosen = forged.pick(replays(forged))
    if chosen is None:
        return False
    place, line, _, first = chosen
    batch_id = receipt_of(first).batch_id
    forged.lines[place] = Fail(line.id, line.at, "idempotency_conflict", "", batch_id)
    return True


@breaks(Kind.MISSED_CONFLICT)
def accept_conflict(forged: Forged) -> bool:
    receipts = forged.receipts()
    chosen = forged.pick(
        [
            (place, line, receipts[invoke.operation.request])
            for place, line, invoke in forged.refused("idempotency_conflict")
            if isinstance(invoke.operation, Ingest) and invoke.operation.request in receipts
        ]
    )
    if chosen is None:
        return False
    place, line, receipt = chosen
    forged.lines[place] = Ok(line.id, line.at, Receipted(receipt, replayed=True))
    return True


@breaks(Kind.UNSTABLE_RECEIPT)
def name_other_batch_in_conflict(forged: Forged) -> bool:
    receipts = forged.receipts()
    chosen = forged.pick(
        [
            (place, line)
            for place, line, invoke in forged.refused("idempotency_conflict")
            if isinstance(invoke.operation, Ingest) and invoke.operation.request in receipts
        ]
    )
    if chosen is None:
        return False
    place, line = chosen
    forged.lines[place] = replace(line, batch_id="b1-0-999999")
    return True


@breaks(Kind.BROKEN_REPLAY)
def refuse_replay(forged: Forged) -> bool:
    chosen = forged.pick([c for c in replays(forged) if c[3].at < c[2].at])
    if chosen is None:
        return False
    place, line, _, _ = chosen
    forged.lines[place] = Fail(line.id, line.at, "rows_invalid")
    return True
