"""Mutations of what reads were told. See `forged`."""

from __future__ import annotations

from tests.history.anomalies import Kind
from tests.history.forging.forged import (
    Forged,
    breaks,
    groups_seen,
    replace,
    rows_of_answer,
    set_group,
)
from tests.history.record import (
    Fail,
    Ingest,
    Ok,
    Read,
    Rows,
)
from tests.history.rows import group_of, row_check


@breaks(Kind.LOST_WRITE, Kind.CHANGED_HISTORY, Kind.TORN_BATCH)
def lose_rows(forged: Forged) -> bool:
    chosen = forged.pick(groups_seen(forged))
    if chosen is None:
        return False
    place, _, request = chosen
    for table, groups in rows_of_answer(forged, place).tables.items():
        if request in groups:
            set_group(forged, place, table, request, None)
    return True


@breaks(Kind.LOST_WRITE)
def lose_rows_for_ever(forged: Forged) -> bool:
    """From one snapshot on, nobody sees them any more."""

    chosen = forged.pick(groups_seen(forged))
    if chosen is None:
        return False
    first, _, request = chosen
    since = rows_of_answer(forged, first).snapshot_id + 1
    later = [
        (place, table)
        for place, table, q in groups_seen(forged)
        if q == request and rows_of_answer(forged, place).snapshot_id >= since
    ]
    for place, table in later:
        set_group(forged, place, table, request, None)
    return bool(later)


@breaks(Kind.CHANGED_HISTORY)
def change_history(forged: Forged) -> bool:
    """Of two reads of one table and snapshot, one does not see a request."""

    seen: dict[tuple[int, str, int], list[int]] = {}
    for place, table, request in groups_seen(forged):
        alone = sum(request in g for g in rows_of_answer(forged, place).tables.values()) == 1
        if alone:
            key = (rows_of_answer(forged, place).snapshot_id, table, request)
            seen.setdefault(key, []).append(place)
    key = forged.pick([key for key, places in seen.items() if len(places) > 1])
    if key is None:
        return False
    set_group(forged, forged.pick(seen[key]), key[1], key[2], None)
    return True


@breaks(Kind.TORN_BATCH)
def tear_tables(forged: Forged) -> bool:
    chosen = forged.pick(
        [
            (place, table, request)
            for place, table, request in groups_seen(forged)
            if sum(request in g for g in rows_of_answer(forged, place).tables.values()) > 1
        ]
    )
    if chosen is None:
        return False
    place, table, request = chosen
    set_group(forged, place, table, request, None)
    return True


@breaks(Kind.TORN_BATCH)
def tear_rows(forged: Forged) -> bool:
    chosen = forged.pick(
        [
            (place, table, request)
            for place, table, request in groups_seen(forged)
            if rows_of_answer(forged, place).tables[table][request][0] > 1
        ]
    )
    if chosen is None:
        return False
    place, table, request = chosen
    count, check = rows_of_answer(forged, place).tables[table][request]
    check -= row_check(request, 0, table, count - 1)
    set_group(forged, place, table, request, (count - 1, check))
    return True


@breaks(Kind.DUPLICATE)
def double_rows(forged: Forged) -> bool:
    chosen = forged.pick(groups_seen(forged))
    if chosen is None:
        return False
    place, table, request = chosen
    count, check = rows_of_answer(forged, place).tables[table][request]
    set_group(forged, place, table, request, (2 * count, 2 * check))
    return True


@breaks(Kind.DAMAGED_ROWS)
def damage_rows(forged: Forged) -> bool:
    chosen = forged.pick(groups_seen(forged))
    if chosen is None:
        return False
    place, table, request = chosen
    count, check = rows_of_answer(forged, place).tables[table][request]
    set_group(forged, place, table, request, (count, check + 1))
    return True


@breaks(Kind.ABORTED_READ)
def show_refused(forged: Forged) -> bool:
    refused: dict[int, Ingest] = {}
    attempted: dict[int, set[str]] = {}
    ends = {line.id: line for line in forged.lines if isinstance(line, Ok | Fail)}
    for invoke in forged.invokes().values():
        if isinstance(invoke.operation, Ingest):
            end = ends.get(invoke.id)
            stored = isinstance(end, Fail) and end.code == "quarantined"
            how = "fail" if isinstance(end, Fail) and not stored else "other"
            attempted.setdefault(invoke.operation.request, set()).add(how)
            refused[invoke.operation.request] = invoke.operation
    never = [refused[q] for q, how in attempted.items() if how == {"fail"}]
    attempt = forged.pick(never)
    if attempt is None:
        return False
    tables = attempt.tables
    place = _last_read(forged, set(tables))
    if place is None:
        return False
    for table, count in tables.items():
        group = group_of(attempt.request, table, count, variant=attempt.variant)
        set_group(forged, place, table, attempt.request, group)
    return True


def _last_read(forged: Forged, tables: set[str]) -> int | None:
    places = [
        place
        for place, line, invoke in forged.answered(Read)
        if isinstance(line.result, Rows)
        and isinstance(invoke.operation, Read)
        and tables <= set(invoke.operation.tables)
        and invoke.operation.window is None
    ]
    return places[-1] if places else None


@breaks(Kind.PHANTOM)
def show_phantom(forged: Forged) -> bool:
    place = _last_read(forged, {"t0"})
    assert place is not None
    set_group(forged, place, "t0", 1_000_000, (1, 7))
    return True


@breaks(Kind.FUTURE_READ)
def show_early(forged: Forged) -> bool:
    """A read that saw a request ended before the request was sent."""

    begins: dict[int, int] = {}
    for invoke in forged.invokes().values():
        if isinstance(invoke.operation, Ingest):
            begins.setdefault(invoke.operation.request, invoke.at)
    chosen = forged.pick(groups_seen(forged))
    if chosen is None:
        return False
    place, _, request = chosen
    line = forged.lines[place]
    assert isinstance(line, Ok)
    invoke = forged.invokes()[line.id]
    at = begins[request] - 1
    forged.lines[forged.lines.index(invoke)] = replace(invoke, at=min(invoke.at, at - 1))
    forged.lines[place] = replace(line, at=at)
    return True
