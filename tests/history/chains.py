"""Checks of which snapshot was answered: real time, tokens, fixed snapshots, quarantine (D1-D7).

Real time is decided by `end of a < invoke of b`: whatever a proved to be committed by then, b must
not be behind.
"""

from __future__ import annotations

from itertools import pairwise

from tests.history.anomalies import Kind
from tests.history.record import (
    BatchSeen,
    Changed,
    Covered,
    Ddl,
    Fail,
    Ok,
    Operated,
    Read,
    Receipted,
    Rows,
    Token,
    Wait,
)
from tests.history.stories import Knowledge, Place, parse_batch_id


def check_chains(known: Knowledge) -> None:
    _check_latest(known)
    _check_schema(known)
    marks = _watermarks(known)
    for operated in known.history.operations:
        operation, end = operated.operation, operated.end
        if isinstance(end, Ok):
            _check_answer_token(known, operated, end)
            if isinstance(operation, Read | Wait):
                snapshot_id = _proven(end)
                assert snapshot_id is not None
                _check_tokens(known, operated, operation.tokens, snapshot_id, marks)
        elif isinstance(end, Fail) and end.code == "quarantined":
            _check_quarantined(known, operated, end)
    _check_fixed(known)


def _proven(end: Ok) -> int | None:
    """The snapshot that an answer proves to have been committed by then."""

    result = end.result
    if isinstance(result, Rows | Covered):
        return result.snapshot_id
    if isinstance(result, Receipted | BatchSeen | Changed):
        return result.snapshot_id
    return None


# --- real time -----------------------------------------------------------------------------------


def _check_latest(known: Knowledge) -> None:
    """A read of the latest snapshot is not older than any answer that ended before it began."""

    operations = known.history.operations
    proofs = [
        (operated.end.at, snapshot_id, operated)
        for operated in operations
        if isinstance(operated.end, Ok) and (snapshot_id := _proven(operated.end)) is not None
    ]
    proofs.sort(key=lambda proof: proof[0])
    newest, witness, place = 0, None, 0
    for operated in operations:
        while place < len(proofs) and proofs[place][0] < operated.begin:
            if proofs[place][1] > newest:
                newest, witness = proofs[place][1], proofs[place][2]
            place += 1
        read = operated.operation
        if not _reads_latest(operated) or not isinstance(read, Read) or witness is None:
            continue
        assert isinstance(operated.end, Ok)
        snapshot_id = _proven(operated.end)
        assert snapshot_id is not None
        floor = max((token.floor for token in read.tokens), default=0)
        if floor <= snapshot_id < newest:  # below its own floor it is told as non-monotonic
            known.findings.add(
                Kind.STALE_READ,
                f"a read of the latest snapshot got {snapshot_id}, and {newest} had been answered "
                "before it began",
                [witness, operated],
            )


def _reads_latest(operated: Operated) -> bool:
    read = operated.operation
    return (
        isinstance(read, Read)
        and isinstance(operated.end, Ok)
        and read.snapshot_id is None
        and read.time is None
        and read.max_staleness_ms is None
    )


def _check_schema(known: Knowledge) -> None:
    """Tables are there from their creation and until their drop."""

    created: dict[str, Operated] = {}
    dropped: dict[str, Operated] = {}
    drops_begun: dict[str, int] = {}
    for operated in known.history.operations:
        ddl = operated.operation
        if not isinstance(ddl, Ddl):
            continue
        if ddl.action == "drop" and not isinstance(operated.end, Fail):
            drops_begun[ddl.table] = min(operated.begin, drops_begun.get(ddl.table, operated.begin))
        if isinstance(operated.end, Ok):
            {"create": created, "drop": dropped}.get(ddl.action, {}).setdefault(ddl.table, operated)
    if not created and not dropped:
        return
    for operated, read, rows in known.reads:
        for table in read.tables:
            drop = dropped.get(table)
            snapshot_id = _changed_in(drop)
            if drop is not None and snapshot_id is not None and rows.snapshot_id >= snapshot_id:
                known.findings.add(
                    Kind.STALE_SCHEMA,
                    f"snapshot {rows.snapshot_id} still shows {table}, dropped in {snapshot_id}",
                    [drop, operated],
                )
    for operated in known.history.operations:
        if isinstance(operated.operation, Read) and isinstance(operated.end, Fail):
            _check_missed_table(known, operated, created, drops_begun)


def _changed_in(operated: Operated | None) -> int | None:
    if operated is None or not isinstance(operated.end, Ok):
        return None
    return _proven(operated.end)


def _check_missed_table(
    known: Knowledge,
    operated: Operated,
    created: dict[str, Operated],
    drops_begun: dict[str, int],
) -> None:
    """`table_not_found` needs a table that was not created before, or may be dropped by then."""

    read, end = operated.operation, operated.end
    assert isinstance(read, Read)
    assert isinstance(end, Fail)
    if end.code != "table_not_found" or read.time is not None or read.max_staleness_ms is not None:
        return
    for table in read.tables:
        create = created.get(table)
        there = create is not None and (
            create.end is not None and create.end.at < operated.begin
            if read.snapshot_id is None
            else read.snapshot_id >= (_changed_in(create) or read.snapshot_id + 1)
        )
        if not there or drops_begun.get(table, end.at) < end.at:
            return
    known.findings.add(
        Kind.STALE_SCHEMA,
        f"{', '.join(read.tables)} had been created, and a read did not find it",
        [*(created[table] for table in read.tables), operated],
    )


# --- tokens --------------------------------------------------------------------------------------


def _check_answer_token(known: Knowledge, operated: Operated, end: Ok) -> None:
    result = end.result
    if not isinstance(result, Rows | Covered | Changed):
        return
    if result.token is None or result.snapshot_id is None:
        return
    if result.token.floor != result.snapshot_id:
        known.findings.add(
            Kind.WRONG_TOKEN,
            f"the answer is of snapshot {result.snapshot_id}, its token's floor is "
            f"{result.token.floor}",
            [operated],
        )


def _watermarks(known: Knowledge) -> dict[int, dict[int, int]]:
    if known.end_state is None:
        return {}
    return {fact.snapshot_id: fact.watermark for fact in known.end_state.snapshots}


def _check_tokens(
    known: Knowledge,
    operated: Operated,
    tokens: tuple[Token, ...],
    snapshot_id: int,
    marks: dict[int, dict[int, int]],
) -> None:
    floor = max((token.floor for token in tokens), default=0)
    if snapshot_id < floor:
        known.findings.add(
            Kind.NON_MONOTONIC_READ,
            f"the caller's token names snapshot {floor}, the answer is of {snapshot_id}",
            [operated],
        )
        return
    mark = marks.get(snapshot_id)
    for token in tokens:
        for place in token.own:
            if place in known.quarantined and known.quarantined[place] is None:
                known.findings.add(
                    Kind.MISSED_QUARANTINE,
                    f"the caller's own entry at shard {place[0]}, position {place[1]} is "
                    "quarantined, and its token was answered as covered",
                    [operated],
                )
                return
        if mark is not None:
            short = {s: p for s, p in token.positions.items() if mark.get(s, 0) < p}
            if short:
                shard, position = min(short.items())
                known.findings.add(
                    Kind.STALE_READ,
                    f"a token asks for shard {shard} below {position}, and snapshot {snapshot_id} "
                    f"reaches {mark.get(shard, 0)}",
                    [operated],
                )
                return


def _check_quarantined(known: Knowledge, operated: Operated, end: Fail) -> None:
    """It needs an own entry that was: of the token, or for an ingest the one that it names."""

    operation = operated.operation
    own: set[Place] = set()
    if isinstance(operation, Read | Wait):
        own = {place for token in operation.tokens for place in token.own}
    elif end.batch_id is not None and (parsed := parse_batch_id(end.batch_id)) is not None:
        own = {parsed[1]}
    if not any(place in known.quarantined for place in own):
        known.findings.add(
            Kind.FALSE_QUARANTINE,
            f"none of the {len(own)} own entries was quarantined",
            [operated],
        )


# --- fixed snapshots -----------------------------------------------------------------------------


def _check_fixed(known: Knowledge) -> None:
    by_time: dict[str, Operated] = {}
    times: dict[int, tuple[str, Operated]] = {}
    for operated, read, rows in known.reads:
        if read.snapshot_id is not None and rows.snapshot_id != read.snapshot_id:
            known.findings.add(
                Kind.WRONG_SNAPSHOT,
                f"snapshot {read.snapshot_id} was asked for, {rows.snapshot_id} was answered",
                [operated],
            )
        if read.time is not None:
            first = by_time.setdefault(read.time, operated)
            assert isinstance(first.end, Ok)
            if _proven(first.end) != rows.snapshot_id:
                known.findings.add(
                    Kind.WRONG_SNAPSHOT,
                    f"the time {read.time} was answered with two snapshots",
                    [first, operated],
                )
        if rows.snapshot_time is not None:
            time, earlier = times.setdefault(rows.snapshot_id, (rows.snapshot_time, operated))
            if time != rows.snapshot_time:
                known.findings.add(
                    Kind.TIME_REGRESSION,
                    f"snapshot {rows.snapshot_id} has two times, {time} and {rows.snapshot_time}",
                    [earlier, operated],
                )
    _check_time_order(known, times, by_time)


def _check_time_order(
    known: Knowledge, times: dict[int, tuple[str, Operated]], by_time: dict[str, Operated]
) -> None:
    before: tuple[str, Operated] | None = None
    for _, now in sorted(times.items()):
        if before is not None and now[0] <= before[0]:
            known.findings.add(
                Kind.TIME_REGRESSION,
                f"a later snapshot was published at {now[0]}, not after {before[0]}",
                [before[1], now[1]],
            )
        before = now
    answered = sorted(by_time.items())
    for (early, first), (late, second) in pairwise(answered):
        assert isinstance(first.end, Ok)
        assert isinstance(second.end, Ok)
        if (_proven(first.end) or 0) > (_proven(second.end) or 0):
            known.findings.add(
                Kind.WRONG_SNAPSHOT,
                f"time {late} was answered with an older snapshot than {early}",
                [first, second],
            )
    if known.end_state is None:
        return
    facts = {fact.snapshot_id: fact for fact in known.end_state.snapshots}
    order = sorted(facts)
    next_of = dict(pairwise(order))
    for time, operated in answered:
        assert isinstance(operated.end, Ok)
        snapshot_id = _proven(operated.end)
        fact = facts.get(snapshot_id or 0)
        if fact is None:
            continue
        later = facts.get(next_of.get(fact.snapshot_id, -1))
        if fact.published_at > time or (later is not None and later.published_at <= time):
            known.findings.add(
                Kind.WRONG_SNAPSHOT,
                f"time {time} was answered with snapshot {snapshot_id}, published at "
                f"{fact.published_at}",
                [operated],
            )
