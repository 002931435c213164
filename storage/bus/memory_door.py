"""The door of the in-memory bus: one group commit on one shard, and what it knows of keys.

The order of judgement is the contract's: the key first, then the schema, then the age of the first
attempt, then the backlog; a refused entry leaves nothing behind (A3, A9, A11-A13). Encoding comes
before the first change, so an entry that cannot be encoded fails alone. An entry that makes tables
is judged with them in place, and they are taken away again unless it is accepted.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from lakebus.errors import Backpressure, IdempotencyExpired
from storage.bus.interface import (
    Accepted,
    AppendOutcome,
    KeyRecord,
    KeyTaken,
    NewEntry,
    QuarantineItem,
    RejectSet,
    SchemaStale,
    TableNumbers,
)
from storage.bus.receipting import make_receipt
from storage.memory_lake import MemoryLake
from storage.memory_state import (
    KeyScope,
    LogEntry,
    QuarantineRow,
    SchemaRow,
    StoredSegment,
    TableRow,
)
from storage.rows.segment import EncodedSegment, encode_segment

BACKPRESSURE_RETRY_S = 1.0

#: What the door says about one entry: an outcome, or the error that its caller gets.
Verdict = AppendOutcome | Exception


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an accepted entry's payload lies."""

    segment_id: int
    index: bytes
    size_bytes: int


def append_group(lake: MemoryLake, shard: int, entries: Sequence[NewEntry]) -> list[Verdict]:
    """Judges and appends the entries of one group, in order; one verdict for each."""

    verdicts: dict[int, Verdict] = {}
    waiting = []
    for n, entry in enumerate(entries):
        if entry.creates:
            verdicts[n] = _create_and_append(lake, shard, entry)
        else:
            waiting.append(n)
    while waiting:
        # An entry whose key a neighbour of this round carries is judged after that neighbour.
        this_round, deferred, keys = [], [], set[KeyScope]()
        for n in waiting:
            scope = key_scope(entries[n])
            if scope is not None and scope in keys:
                deferred.append(n)
                continue
            if scope is not None:
                keys.add(scope)
            this_round.append(n)
        verdicts |= _append_round(lake, shard, {n: entries[n] for n in this_round})
        waiting = deferred
    return [verdicts[n] for n in range(len(entries))]


def number_tables(lake: MemoryLake, count: int) -> TableNumbers:
    state = lake.state
    first = max((*state.tables, state.table_id_floor), default=0) + 1
    state.table_id_floor = first + count - 1
    return TableNumbers(lake.history_serial, tuple(range(first, first + count)))


def _create_and_append(lake: MemoryLake, shard: int, entry: NewEntry) -> Verdict:
    """The tables, their snapshot and the entry, or nothing of them; one step of the event loop."""

    state = lake.state
    taken = {row.name for row in state.tables.values() if row.live}
    stale = tuple(
        table.schema.table_id
        for table in entry.creates
        if table.history_serial != lake.history_serial or table.schema.name in taken
    )
    if stale:
        return SchemaStale(stale)
    for table in entry.creates:
        state.tables[table.schema.table_id] = TableRow(
            table_id=table.schema.table_id,
            name=table.schema.name,
            first_snapshot=state.head_id + 1,
            last_column_id=len(table.schema.columns),
            versions=[SchemaRow(table.schema, state.head_id + 1)],
        )
    verdict: Verdict | None = None
    try:
        verdict = _append_round(lake, shard, {0: entry})[0]
    finally:
        if not isinstance(verdict, Accepted):
            for table in entry.creates:
                del state.tables[table.schema.table_id]
    if isinstance(verdict, Accepted):
        made = {str(t.schema.table_id): {"created": t.schema.name} for t in entry.creates}
        lake.next_snapshot("create", {"tables": made}, at=lake.next_publish_time())
    return verdict


def key_scope(entry: NewEntry) -> KeyScope | None:
    if entry.idempotency_key is None:
        return None
    return entry.principal_id, entry.target, entry.idempotency_key


def find_record(lake: MemoryLake, scope: KeyScope) -> KeyRecord | None:
    return lake.state.keys.get(scope)


def _append_round(lake: MemoryLake, shard: int, entries: dict[int, NewEntry]) -> dict[int, Verdict]:
    verdicts: dict[int, Verdict] = {}
    fitting: list[int] = []
    for n, entry in entries.items():
        verdict = _judge(lake, shard, entry)
        if verdict is None:
            fitting.append(n)
        else:
            verdicts[n] = verdict
    for group in _encodable(lake, entries, fitting, verdicts):
        numbers, segment = group
        places = _store(lake, segment)
        for n, place in zip(numbers, places, strict=True):
            verdicts[n] = _accept(lake, shard, entries[n], place)
    return verdicts


def _judge(lake: MemoryLake, shard: int, entry: NewEntry) -> Verdict | None:
    """None when the entry may be appended."""

    settings = lake.settings
    scope = key_scope(entry)
    if scope is not None and (record := find_record(lake, scope)) is not None:
        return KeyTaken(record)
    if stale := _stale_tables(lake, entry):
        return SchemaStale(stale)
    window = dt.timedelta(seconds=settings.idempotency_window_s)
    if entry.first_attempt_at is not None and entry.first_attempt_at < lake.now() - window:
        return IdempotencyExpired(
            "the first attempt is older than the idempotency window, so nobody can know whether it "
            "was accepted; look at the data before sending the rows again"
        )
    row = lake.state.shards[shard]
    if row.appended_bytes - row.terminal_bytes >= settings.backlog_bytes_hard:
        return Backpressure(
            "the ingest bus holds as many bytes as it may; send the rows again later",
            retry_after_s=BACKPRESSURE_RETRY_S,
        )
    return None


def schema_versions_of(entry: NewEntry) -> dict[int, int]:
    """The schema version by table id under which the entry was checked."""

    versions = {reject.table_id: reject.schema_version for reject in entry.rejects}
    return versions | {part.table_id: part.schema_version for part in entry.parts}


def _stale_tables(lake: MemoryLake, entry: NewEntry) -> tuple[int, ...]:
    checked = [(part.table_id, part.schema_version) for part in entry.parts]
    checked += [(reject.table_id, reject.schema_version) for reject in entry.rejects]
    stale = set[int]()
    for table_id, version in checked:
        table = lake.state.tables.get(table_id)
        if table is None or not table.accepts_rows or table.current.version != version:
            stale.add(table_id)
    return tuple(sorted(stale))


def _encodable(
    lake: MemoryLake,
    entries: dict[int, NewEntry],
    fitting: list[int],
    verdicts: dict[int, Verdict],
) -> list[tuple[list[int], EncodedSegment]]:
    """One segment for all; when that fails, one for each, and the culprit's error to its caller."""

    if not fitting:
        return []
    try:
        return [(fitting, encode_segment([entries[n].parts for n in fitting]))]
    except ValueError:  # pyarrow's errors of form are ValueErrors
        pass
    singles: list[tuple[list[int], EncodedSegment]] = []
    for n in fitting:
        try:
            singles.append(([n], encode_segment([entries[n].parts])))
        except ValueError as error:
            verdicts[n] = error
    return singles


def _store(lake: MemoryLake, segment: EncodedSegment) -> list[_Place]:
    state = lake.state
    state.last_segment_id += 1
    count = len(segment.entry_indexes)
    state.segments[state.last_segment_id] = StoredSegment(segment.payload, live=count)
    return [
        _Place(state.last_segment_id, index, size)
        for index, size in zip(segment.entry_indexes, segment.entry_bytes, strict=True)
    ]


def _accept(lake: MemoryLake, shard: int, entry: NewEntry, place: _Place) -> Accepted:
    state, row = lake.state, lake.state.shards[shard]
    position, now = row.end, lake.now()
    rows_rejected = sum(reject.rows for reject in entry.rejects)
    receipt = make_receipt(
        codec=lake.codec,
        history=lake.history,
        history_serial=lake.history_serial,
        shard=shard,
        position=position,
        target=entry.target,
        rows=entry.rows,
        rows_rejected=rows_rejected,
        fingerprint=entry.fingerprint,
        accepted_at=now,
        expires_at=now + dt.timedelta(seconds=lake.settings.idempotency_window_s),
    )
    scope = key_scope(entry)
    row.end += 1
    row.appended_bytes += place.size_bytes
    logged = LogEntry(
        shard=shard,
        position=position,
        batch_id=receipt.batch_id,
        principal_id=entry.principal_id,
        target=entry.target,
        table_ids=tuple(sorted({part.table_id for part in entry.parts})),
        rows=entry.rows,
        segment_id=place.segment_id,
        index=place.index,
        size_bytes=place.size_bytes,
        accepted_at=now,
        key_scope=scope,
    )
    row.log[position] = logged
    if scope is not None:
        state.keys[scope] = KeyRecord(receipt, entry.fingerprint, schema_versions_of(entry))
    for reject in entry.rejects:
        _set_aside(lake, logged, reject)
    return Accepted(receipt, shard, position)


def _set_aside(lake: MemoryLake, entry: LogEntry, reject: RejectSet) -> None:
    """Stores a reject set in the transaction of its entry (A10)."""

    state = lake.state
    state.last_quarantine_id += 1
    item = QuarantineItem(
        quarantine_id=state.last_quarantine_id,
        kind="rejects",
        batch_id=entry.batch_id,
        shard=entry.shard,
        position=entry.position,
        principal_id=entry.principal_id,
        table_ids=(reject.table_id,),
        rows=reject.rows,
        reason="rows did not fit the table",
        attempts=0,
        created_at=entry.accepted_at,
        successor_batch_id=None,
        payload=reject.document,
        target=entry.target,
    )
    state.quarantine[item.quarantine_id] = QuarantineRow(item, by_crash=False)
