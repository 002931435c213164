"""Mutations of which snapshot was answered. See `forged`."""

from __future__ import annotations

from tests.history.anomalies import Kind
from tests.history.forging.forged import (
    Forged,
    breaks,
    replace,
    rows_of_answer,
)
from tests.history.record import (
    Covered,
    Ddl,
    Fail,
    Ok,
    Read,
    Rows,
    Token,
    Wait,
)


def _other_answers(forged: Forged, place: int) -> list[Rows]:
    """Answers of other reads of the same tables, so that each is right for its own snapshot."""

    line = forged.lines[place]
    assert isinstance(line, Ok)
    asked = forged.invokes()[line.id].operation
    assert isinstance(asked, Read)
    return [
        line.result
        for _, line, invoke in forged.answered(Read)
        if isinstance(line.result, Rows)
        and isinstance(invoke.operation, Read)
        and set(invoke.operation.tables) == set(asked.tables)
        and invoke.operation.window == asked.window
    ]


def _answer(forged: Forged, place: int, rows: Rows) -> None:
    line = forged.lines[place]
    assert isinstance(line, Ok)
    forged.lines[place] = replace(line, result=rows)


def _answer_one(forged: Forged, found: list[tuple[int, Rows]]) -> bool:
    """Answers one of these reads like that; False when there are none."""

    chosen = forged.pick(found)
    if chosen is not None:
        _answer(forged, *chosen)
    return chosen is not None


@breaks(Kind.NON_MONOTONIC_READ)
def read_below_token(forged: Forged) -> bool:
    found: list[tuple[int, Rows]] = []
    for place, _, invoke in forged.answered(Read):
        assert isinstance(invoke.operation, Read)
        floor = max((token.floor for token in invoke.operation.tokens), default=0)
        found += [(place, r) for r in _other_answers(forged, place) if r.snapshot_id < floor]
    return _answer_one(forged, found)


@breaks(Kind.STALE_READ)
def read_old_latest(forged: Forged) -> bool:
    """A read of the latest snapshot is older than an answer that was complete before it began."""

    found: list[tuple[int, Rows]] = []
    for place, _, invoke in forged.answered(Read):
        asked = invoke.operation
        assert isinstance(asked, Read)
        if asked.snapshot_id is not None or asked.time is not None:
            continue
        newest = max(
            (
                line.result.snapshot_id
                for _, line, _ in forged.answered(Read)
                if line.at < invoke.at and isinstance(line.result, Rows)
            ),
            default=0,
        )
        floor = max((token.floor for token in asked.tokens), default=0)
        found += [
            (place, rows)
            for rows in _other_answers(forged, place)
            if floor <= rows.snapshot_id < newest
        ]
    return _answer_one(forged, found)


@breaks(Kind.STALE_READ)
def raise_token(forged: Forged) -> bool:
    """A wait is answered although its token asks for more than its snapshot reaches."""

    found = []
    marks = {fact.snapshot_id: fact.watermark for fact in forged.end_state.snapshots}
    for _, line, invoke in forged.answered(Wait):
        if not isinstance(line.result, Covered):
            continue
        mark = marks[line.result.snapshot_id]
        shard = forged.random.choice(sorted(mark))
        found.append((invoke, Token("h", 0, {shard: mark[shard] + 1})))
    chosen = forged.pick(found)
    if chosen is None:
        return False
    invoke, token = chosen
    forged.lines[forged.lines.index(invoke)] = replace(invoke, operation=Wait((token,)))
    return True


@breaks(Kind.WRONG_SNAPSHOT)
def answer_other_snapshot(forged: Forged) -> bool:
    found = []
    for place, _, invoke in forged.answered(Read):
        asked = invoke.operation
        assert isinstance(asked, Read)
        if asked.snapshot_id is None:
            continue
        found += [
            (place, rows)
            for rows in _other_answers(forged, place)
            if rows.snapshot_id != asked.snapshot_id
        ]
    return _answer_one(forged, found)


@breaks(Kind.WRONG_SNAPSHOT)
def answer_other_time(forged: Forged) -> bool:
    found = []
    for place, line, invoke in forged.answered(Read):
        assert isinstance(invoke.operation, Read)
        assert isinstance(line.result, Rows)
        if invoke.operation.time is None:
            continue
        now = line.result.snapshot_id
        found += [
            (place, rows) for rows in _other_answers(forged, place) if rows.snapshot_id != now
        ]
    return _answer_one(forged, found)


@breaks(Kind.WRONG_TOKEN)
def answer_other_token(forged: Forged) -> bool:
    chosen = forged.pick([place for place, _, _ in forged.answered(Read)])
    if chosen is None:
        return False
    rows = rows_of_answer(forged, chosen)
    assert rows.token is not None
    wrong = replace(rows.token, floor=rows.token.floor - 1)
    _answer(forged, chosen, replace(rows, token=wrong))
    return True


@breaks(Kind.TIME_REGRESSION)
def answer_other_publication_time(forged: Forged) -> bool:
    seen: dict[int, list[int]] = {}
    for place, _, _ in forged.answered(Read):
        seen.setdefault(rows_of_answer(forged, place).snapshot_id, []).append(place)
    snapshots = sorted(seen)
    if len(snapshots) < 2:
        return False
    chosen = forged.random.randrange(1, len(snapshots))
    before = rows_of_answer(forged, seen[snapshots[chosen - 1]][0]).snapshot_time
    for place in seen[snapshots[chosen]]:
        _answer(forged, place, replace(rows_of_answer(forged, place), snapshot_time=before))
    return True


@breaks(Kind.STALE_SCHEMA)
def miss_table(forged: Forged) -> bool:
    """A read of a table that was there is told that it does not exist."""

    created = {
        invoke.operation.table: line.at
        for _, line, invoke in forged.answered(Ddl)
        if isinstance(invoke.operation, Ddl) and invoke.operation.action == "create"
    }
    chosen = forged.pick(
        [
            (place, line)
            for place, line, invoke in forged.answered(Read)
            if isinstance(invoke.operation, Read)
            and set(invoke.operation.tables) <= {"t0", "t1"}
            and invoke.operation.time is None
            and (invoke.operation.snapshot_id or 3) >= 3
            and all(created[table] < invoke.at for table in invoke.operation.tables)
        ]
    )
    if chosen is None:
        return False
    place, line = chosen
    forged.lines[place] = Fail(line.id, line.at, "table_not_found")
    return True


@breaks(Kind.STALE_SCHEMA)
def keep_dropped(forged: Forged) -> bool:
    """A drop is told to have been published before a read that still shows the table."""

    found = []
    for place, line, invoke in forged.answered(Ddl):
        assert isinstance(invoke.operation, Ddl)
        if invoke.operation.action != "drop":
            continue
        shown = [
            rows.snapshot_id
            for read, _, _ in forged.answered(Read)
            if invoke.operation.table in (rows := rows_of_answer(forged, read)).tables
        ]
        found += [(place, line, snapshot_id) for snapshot_id in shown]
    chosen = forged.pick(found)
    if chosen is None:
        return False
    place, line, snapshot_id = chosen
    changed = replace(line.result, snapshot_id=snapshot_id, token=None)
    forged.lines[place] = replace(line, result=changed)
    return True
