"""Group commit: one writer a shard and process, one server-side call a group.

While a group commits, the next one gathers; an entry that finds the writer idle goes at once. So
groups grow with the load and a lone entry waits for nobody. An entry never shares a group with an
entry of the same key (they would be judged against each other in one statement): the second waits
for the next group and is then an ordinary replay. An entry that makes tables goes alone, by a
function that takes the head row first: such an append is as rare as a new table. A large entry goes
alone, too, and is encoded and put where it belongs before it queues up (`ClaimCheck`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg

from lakebus.clock import new_uuid
from lakebus.errors import (
    Backpressure,
    Fault,
    IdempotencyExpired,
    LakebusError,
    OutcomeUnknown,
    Unavailable,
)
from storage.bus.interface import (
    Accepted,
    AppendOutcome,
    KeyRecord,
    KeyTaken,
    NewEntry,
    NewTable,
    SchemaStale,
)
from storage.bus.settings import BusSettings
from storage.postgres.catalog import definition_of
from storage.postgres.claim_check import Carried, ClaimCheck
from storage.postgres.failures import reading, writing
from storage.postgres.pool import Pool
from storage.postgres.receipts import ReceiptMaker
from storage.rows.segment import encode_segment

_APPEND = (
    "SELECT * FROM append_group($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14,"
    " $15, $16, $17, $18, $19, $20, $21, $22, $23)"
)
_CREATE = (
    "SELECT * FROM create_and_append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14,"
    " $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26)"
)
_ACCEPTED, _KEY_TAKEN, _STALE, _BACKPRESSURE, _EXPIRED = range(5)
_log = logging.getLogger(__name__)
_INTENT_LOST = "LB001"
BACKPRESSURE_RETRY_S = 2.0


def key_hash(principal_id: int, target: str, key: str) -> bytes:
    """The stored identity of a key: its scope is principal and target (A3)."""

    text = f"{principal_id}\x00{target}\x00{key}".encode()
    return hashlib.sha256(text).digest()[:16]


@dataclass(slots=True, eq=False)
class _Waiting:
    entry: NewEntry
    key: bytes | None
    size_bytes: int
    done: asyncio.Future[AppendOutcome]
    carried: Carried | None = None

    @property
    def alone(self) -> bool:
        return self.carried is not None or bool(self.entry.creates)


@dataclass(slots=True)
class _Refs:
    """The tables each entry was checked against, as parallel arrays."""

    entries: list[int] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class GroupWriter:
    """Appends the entries of one shard. Use from one event loop."""

    def __init__(
        self,
        *,
        shard: int,
        pool: Pool,
        settings: BusSettings,
        receipts: ReceiptMaker,
        claim_check: ClaimCheck,
    ) -> None:
        self._shard = shard
        self._pool = pool
        self._settings = settings
        self._receipts = receipts
        self._claim_check = claim_check
        self._queue: deque[_Waiting] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._large: set[asyncio.Future[None]] = set()
        self._closing = False
        self._window = dt.timedelta(seconds=settings.idempotency_window_s)

    async def append(self, entry: NewEntry) -> AppendOutcome:
        loop = asyncio.get_running_loop()
        key = None
        if entry.idempotency_key is not None:
            key = key_hash(entry.principal_id, entry.target, entry.idempotency_key)
        size = sum([part.size_bytes for part in entry.parts])
        waiting = _Waiting(entry, key, size, loop.create_future())
        if not self._claim_check.goes_alone(size):
            return await self._queue_up(waiting)
        under_way: asyncio.Future[None] = loop.create_future()
        self._large.add(under_way)
        try:
            return await self._append_large(waiting)
        finally:
            self._large.discard(under_way)
            under_way.set_result(None)

    async def _queue_up(self, waiting: _Waiting) -> AppendOutcome:
        if self._closing:
            raise Unavailable("the server is stopping")
        self._queue.append(waiting)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush())
        return await waiting.done

    async def _append_large(self, waiting: _Waiting) -> AppendOutcome:
        """Neither a replay nor a refusal leaves its bytes behind."""

        if waiting.key is not None:
            records = await self._records([waiting.key])
            if waiting.key in records:
                return KeyTaken(records[waiting.key])
        carried = await self._carry(waiting.entry)
        # failpoint: group_commit.after_carry
        waiting.carried = carried
        try:
            outcome = await self._queue_up(waiting)
        except (Backpressure, IdempotencyExpired, Unavailable):
            await self._claim_check.discard(carried)
            raise
        if not isinstance(outcome, Accepted):
            await self._claim_check.discard(carried)
        return outcome

    async def _carry(self, entry: NewEntry) -> Carried:
        try:
            return await self._claim_check.carry(entry.parts)
        except LakebusError:
            raise
        except Exception as error:
            raise _cannot_encode(error) from error

    async def close(self) -> None:
        """Waits for what is under way; entries still queued are refused."""

        self._closing = True
        for waiting in self._queue:
            if not waiting.done.done():
                waiting.done.set_exception(Unavailable("the server is stopping"))
        self._queue.clear()
        if self._flushing is not None:
            await self._flushing
        if self._large:
            await asyncio.wait(self._large)

    async def _flush(self) -> None:
        # Whoever starts the task has queued something; it ends when nothing is left, in the same
        # step of the loop in which it clears itself, so no entry can be left without a flusher.
        try:
            while self._queue:
                group = self._take_group()
                # failpoint: group_commit.after_take
                try:
                    await self._commit(group)
                except LakebusError as error:
                    _fail(group, error)
                except Exception:  # noqa: BLE001 - whoever waits must hear of it
                    # A bug: nobody may be left waiting, and the queue goes on. What was sent is
                    # not known here, so the honest answer is that the outcome is unknown.
                    _log.exception("a group commit failed unexpectedly")
                    _fail(group, OutcomeUnknown("the append was interrupted"))
                except BaseException:
                    _fail([*group, *self._queue], OutcomeUnknown("the append was interrupted"))
                    self._queue.clear()
                    raise
        finally:
            self._flushing = None

    def _take_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        keys: set[bytes] = set()
        deferred: list[_Waiting] = []
        size = 0
        while self._queue and len(group) < self._settings.group_entries_max:
            waiting = self._queue[0]
            if group and waiting.alone:
                break
            if group and size + waiting.size_bytes > self._settings.group_bytes_max:
                break
            self._queue.popleft()
            if waiting.done.cancelled():
                continue
            if waiting.key is not None and waiting.key in keys:
                deferred.append(waiting)
                continue
            if waiting.key is not None:
                keys.add(waiting.key)
            size += waiting.size_bytes
            group.append(waiting)
            if waiting.alone:
                break
        self._queue.extendleft(reversed(deferred))
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        if not group:
            return
        carried = group[0].carried
        if carried is None:
            try:
                segment = encode_segment([waiting.entry.parts for waiting in group])
            except Exception as error:  # noqa: BLE001 - told apart entry by entry
                await self._commit_singly(group, error)
                return
            carried = await self._claim_check.put(segment)
        arguments = self._arguments(group, carried)
        statement, creates = _APPEND, group[0].entry.creates
        if creates:
            statement, arguments = _CREATE, [*_creation(creates), *arguments]
        # failpoint: group_commit.before_append
        async with self._pool.connection() as connection:
            with writing():
                try:
                    row = await connection.fetchrow(statement, *arguments)
                except asyncpg.PostgresError as error:
                    if getattr(error, "sqlstate", None) == _INTENT_LOST:
                        raise Unavailable("the payload was collected; send it again") from error
                    raise
            assert row is not None
            # failpoint: group_commit.after_append
        taken = [
            waiting.key
            for waiting, status in zip(group, row["statuses"], strict=True)
            if status == _KEY_TAKEN
        ]
        self._answer(group, row, await self._records(taken) if taken else {})

    async def _commit_singly(self, group: list[_Waiting], error: Exception) -> None:
        """An entry that cannot be encoded fails alone: its neighbours are appended (A9)."""

        if len(group) == 1:
            _fail(group, _cannot_encode(error))
            return
        for waiting in group:
            try:
                await self._commit([waiting])
            except LakebusError as refusal:
                _fail([waiting], refusal)

    def _arguments(
        self,
        group: Sequence[_Waiting],
        carried: Carried,
    ) -> list[object]:
        entries = [waiting.entry for waiting in group]
        refs = _Refs()
        versions: list[str] = []
        for place, entry in enumerate(entries, start=1):
            seen = {part.table_id: part.schema_version for part in entry.parts}
            for reject in entry.rejects:
                seen.setdefault(reject.table_id, reject.schema_version)
            for table_id, version in seen.items():
                refs.entries.append(place)
                refs.tables.append(table_id)
                refs.versions.append(version)
            versions.append(",".join(f"{t}:{v}" for t, v in sorted(seen.items())))
        rejects = [(n, r) for n, e in enumerate(entries, start=1) for r in e.rejects]
        return [
            self._shard,
            [entry.principal_id for entry in entries],
            [entry.target for entry in entries],
            [waiting.key for waiting in group],
            [entry.fingerprint for entry in entries],
            versions,
            [entry.first_attempt_at for entry in entries],
            [entry.rows for entry in entries],
            [sum(reject.rows for reject in entry.rejects) for entry in entries],
            carried.segment.entry_indexes,
            carried.segment.entry_bytes,
            refs.entries,
            refs.tables,
            refs.versions,
            carried.segment.payload if carried.key is None else None,
            carried.key,
            carried.intent,
            [n for n, _ in rejects],
            [reject.table_id for _, reject in rejects],
            [reject.rows for _, reject in rejects],
            [reject.document for _, reject in rejects],
            self._window,
            self._settings.backlog_bytes_hard,
        ]

    async def _records(self, keys: Sequence[bytes | None]) -> dict[bytes, KeyRecord]:
        """What the taken keys stand for. The group has committed by now, so a failure here is one
        of those who sent them again, and must not look like a refusal to their neighbours (A6).
        """

        try:
            async with self._pool.connection() as connection:
                with reading():
                    rows = await connection.fetch("SELECT * FROM find_keys($1)", keys)
        except LakebusError as error:
            _log.warning("the records of %d taken keys cannot be read: %s", len(keys), error)
            return {}
        return {row["key_hash"]: self._receipts.record(row) for row in rows}

    def _answer(
        self,
        group: Sequence[_Waiting],
        row: asyncpg.Record,
        records: dict[bytes, KeyRecord],
    ) -> None:
        position = row["lo"]
        stale = tuple(row["stale_tables"] or ())
        for waiting, status in zip(group, row["statuses"], strict=True):
            outcome: AppendOutcome | LakebusError
            if status == _ACCEPTED:
                outcome = self._accepted(waiting.entry, row, position)
                position += 1
            elif status == _KEY_TAKEN and waiting.key in records:
                outcome = KeyTaken(records[waiting.key])
            elif status == _STALE:
                mine = {part.table_id for part in waiting.entry.parts}
                mine |= {reject.table_id for reject in waiting.entry.rejects}
                outcome = SchemaStale(tuple(t for t in stale if t in mine))
            elif status == _BACKPRESSURE:
                outcome = Backpressure(
                    "the ingest bus holds as many bytes as it may; send the rows again later",
                    retry_after_s=BACKPRESSURE_RETRY_S,
                )
            elif status == _EXPIRED:
                outcome = IdempotencyExpired(
                    "the first attempt of this request is older than the idempotency window, so "
                    "nobody can know whether it was accepted; check the data before sending again"
                )
            else:
                outcome = Unavailable("the record of the key cannot be read now; try again")
            if waiting.done.done():
                continue
            if isinstance(outcome, LakebusError):
                waiting.done.set_exception(outcome)
            else:
                waiting.done.set_result(outcome)

    def _accepted(self, entry: NewEntry, row: asyncpg.Record, position: int) -> Accepted:
        receipt = self._receipts.make(
            history_serial=row["history_serial"],
            shard=self._shard,
            position=position,
            target=entry.target,
            rows=entry.rows,
            rows_rejected=sum(reject.rows for reject in entry.rejects),
            fingerprint=entry.fingerprint,
            accepted_at=row["accepted_at"],
            expires_at=row["expires_at"],
        )
        return Accepted(receipt, self._shard, position)


def _creation(creates: Sequence[NewTable]) -> list[object]:
    """What `create_and_append` takes before the arguments of `append_group`."""

    tables = [
        {
            "table_id": table.schema.table_id,
            "name": table.schema.name,
            "definition": definition_of(table.schema),
        }
        for table in creates
    ]
    # Numbers of two lines of history are never one request's: they come from one call.
    return [creates[0].history_serial, tables, new_uuid()]


def _cannot_encode(error: Exception) -> Fault:
    _log.error("an entry cannot be encoded", exc_info=error)
    return Fault("the rows passed every check and cannot be encoded")


def _fail(group: Sequence[_Waiting], error: LakebusError) -> None:
    for waiting in group:
        if not waiting.done.done():
            # Each waiter gets an instance of its own: a shared one would share its traceback.
            waiting.done.set_exception(
                type(error)(error.detail, retry_after_s=error.retry_after_s, **error.members)
            )
