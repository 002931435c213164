"""The door for rows: one request to one receipt, exactly once for its key (contract A1-A13).

Why it is safe. The body is decoded optimistically under the schema this process remembers, and
appended; only the append transaction decides, because it alone sees the key, the schema version
and the backlog at one moment. Its three answers lead on:

* accepted: the receipt;
* the key is taken: the payload is compared with the first one, under the schema versions of the
  first one, and the first receipt or a conflict is the answer (A3, A4);
* the schema is stale: look again, decode again (A12).

With `create`, a table that does not exist is made by the append transaction itself, so that there
is never the table without the rows or the other way round. Who loses the race for a name is told
that the schema is stale, and is then held to the winner's table like everybody else.

Every refusal, whoever utters it, is held back until the key was looked up: a request that was
accepted before gets its receipt whatever has changed since (A3). An unknown outcome is never turned
into anything else (A6). Forbidden and unseen tables come first: they say nothing about the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from lakebus.clock import Clock, SystemClock
from lakebus.errors import (
    Forbidden,
    IdempotencyConflict,
    LakebusError,
    MalformedBody,
    MalformedRequest,
    OutcomeUnknown,
    RetryLater,
    RowsInvalid,
    SchemaInvalid,
    TableNotFound,
    Unavailable,
    UnsupportedMediaType,
)
from lakebus.receipts import Receipt
from lakebus.schemas import TableSchema, fold_table_name
from storage.bus.interface import Accepted, AppendOutcome, IngestBus, KeyRecord, KeyTaken
from storage.catalog.interface import Catalog, TableState
from storage.ingesting.grants import KeyStore, Principal
from storage.ingesting.large import LargeBodies
from storage.ingesting.new_tables import TableBody, TableRows
from storage.ingesting.prepared import (
    PreparedRows,
    decode_tables,
    prepare_decoded,
    prepare_identified,
)
from storage.ingesting.requests import IngestAnswer, IngestRequest, IngestSettings
from storage.ingesting.table_cache import TableCache
from storage.ingesting.together import GroupDecoder
from storage.reading.barrier import Barrier
from storage.rows.decode import JSON, split_tables
from storage.rows.decoded import OnInvalid
from storage.rows.multipart import MULTIPART, split_parts
from storage.rows.names import fold

_log = logging.getLogger(__name__)


class IngestService:
    """One per process; stateless but for what it remembers of tables.

    `on_accepted` is called after each accepted entry, to wake whoever publishes; it must not block.
    `keys` hold the audit log, in which new tables are noted.
    """

    def __init__(
        self,
        *,
        bus: IngestBus,
        catalog: Catalog,
        barrier: Barrier,
        tables: TableCache,
        settings: IngestSettings | None = None,
        on_accepted: Callable[[], None] | None = None,
        keys: KeyStore | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._on_accepted = on_accepted
        self._keys = keys
        self._appending_since_s: dict[object, float] = {}
        self._bus = bus
        self._catalog = catalog
        self._barrier = barrier
        self._tables = tables
        self._settings = settings or IngestSettings()
        self._group = GroupDecoder(rows_max=self._settings.rows_max)
        self._large = LargeBodies(rows_max=self._settings.rows_max)

    async def ingest(self, request: IngestRequest) -> IngestAnswer:
        """Makes the rows durable, and waits for them when asked.

        Raises Forbidden, TableNotFound, MalformedRequest, MalformedBody, UnsupportedMediaType,
        RowsInvalid, BodyTooLarge, IdempotencyConflict, IdempotencyExpired, Backpressure,
        Unavailable (nothing was stored), OutcomeUnknown, Quarantined (after `wait_visible`).
        """

        answer = await self.accept(request)
        if not request.wait_visible:
            return answer
        return await self.seen(answer, request.deadline_s)

    async def accept(self, request: IngestRequest) -> IngestAnswer:
        """Makes the rows durable, without waiting for them. Raises what `ingest` raises."""

        request.principal.require("ingest")
        return await self._accept(request)

    async def seen(self, answer: IngestAnswer, deadline_s: float) -> IngestAnswer:
        """The answer after the wait for a snapshot that covers it. Raises Quarantined."""

        snapshot_id = await self._wait_visible(answer.receipt, deadline_s)
        return replace(answer, visible=snapshot_id is not None, snapshot_id=snapshot_id)

    async def knows(self, principal: Principal, target: str, key: str) -> bool:
        """True when a request with this key was accepted before. Raises Unavailable."""

        return await self._bus.find_key(principal.principal_id, target, key) is not None

    @property
    def oldest_append_s(self) -> float:
        """For how long the oldest append has been waiting for the bus; 0.0 when none does."""

        for since_s in self._appending_since_s.values():
            return self._clock.monotonic_s() - since_s
        return 0.0

    # --- acceptance -------------------------------------------------------------------------

    async def _accept(self, request: IngestRequest) -> IngestAnswer:
        prepared: PreparedRows | None = None
        try:
            prepared, outcome = await self._append(request)
        except OutcomeUnknown:
            raise
        except LakebusError as refusal:
            # The right to make a table says something about the request: whether it is needed.
            if isinstance(refusal, Forbidden) and not request.create:
                raise
            record = await self._known(request, refusal)
            if record is None:
                raise
        else:
            if isinstance(outcome, Accepted):
                if self._on_accepted is not None:
                    self._on_accepted()
                await self._record(request, prepared)
                return IngestAnswer(outcome.receipt, columns_skipped=prepared.skipped)
            record = outcome.record
        async with self._in_time(request, "key"):
            same = await self._compare(request, record, prepared)
        return IngestAnswer(record.receipt, replayed=True, columns_skipped=same.skipped)

    async def _record(self, request: IngestRequest, prepared: PreparedRows) -> None:
        """Who made which tables. The rows are durable, so nothing may look like a failure now."""

        if self._keys is None:
            return
        try:
            for table in prepared.creates:
                await self._keys.audit(
                    principal=request.principal.name,
                    action="table.create",
                    subject=table.schema.name,
                    detail={"schema_version": table.schema.version},
                )
        except LakebusError as error:
            _log.warning("the making of a table is missing in the audit log: %s", error)

    async def _known(self, request: IngestRequest, refusal: LakebusError) -> KeyRecord | None:
        """What the bus remembers of the request's key, asked before a refusal is uttered (A3)."""

        if request.idempotency_key is None:
            return None
        try:
            async with self._in_time(request, "key"):
                return await self._bus.find_key(
                    request.principal.principal_id, request.target, request.idempotency_key
                )
        except Unavailable as error:
            # Whether the refusal holds cannot be known without the bus, so it is not uttered.
            raise error from refusal

    @contextlib.asynccontextmanager
    async def _in_time(self, request: IngestRequest, phase: str) -> AsyncIterator[None]:
        """What runs inside stores nothing, and ends with the request's time (a pool without a free
        connection would make it wait for longer). Raises Unavailable."""

        try:
            async with asyncio.timeout(max(0.0, request.deadline_s - self._clock.monotonic_s())):
                yield
        except TimeoutError:
            raise Unavailable(
                "timeout_ms ran out before the catalog answered; send the rows again with the same "
                "Idempotency-Key",
                phase=phase,
            ) from None

    async def _append(self, request: IngestRequest) -> tuple[PreparedRows, Accepted | KeyTaken]:
        schema = await self._likely_schema(request)
        if schema is None:
            return await self._append_prepared(request, None)
        if not self._group.takes(request.media_type, request.body):
            return await self._append_prepared(request, await self._prepare_large(request, schema))
        with self._group.crowd(schema.table_id):
            prepared = await self._prepare_together(request, schema)
            return await self._append_prepared(request, prepared)

    async def _append_prepared(
        self, request: IngestRequest, prepared: PreparedRows | None
    ) -> tuple[PreparedRows, Accepted | KeyTaken]:
        fresh = False
        for _ in range(self._settings.schema_tries):
            if prepared is None:
                async with self._in_time(request, "decode"):
                    prepared = await self._prepare(request, fresh=fresh)
            outcome = await self._append_in_time(request, prepared)
            if isinstance(outcome, (Accepted, KeyTaken)):
                return prepared, outcome
            fresh, prepared = True, None
        raise Unavailable(
            "the table changed again and again while the rows were checked; nothing was stored, "
            "send them again",
            retry_after_s=1.0,
        )

    async def _append_in_time(
        self, request: IngestRequest, prepared: PreparedRows
    ) -> AppendOutcome:
        left_s = request.deadline_s - self._clock.monotonic_s()
        if left_s <= 0:
            raise Unavailable(
                "timeout_ms ran out before the rows were appended; nothing was stored",
                phase="decode",
            )
        mark = object()
        self._appending_since_s[mark] = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(left_s):
                return await self._bus.append(prepared.as_entry(request))
        except TimeoutError:
            raise OutcomeUnknown(
                "the bus did not answer within timeout_ms, so the rows may be stored or not; send "
                "them again with the same Idempotency-Key",
                phase="append",
            ) from None
        finally:
            del self._appending_since_s[mark]

    # --- decoding under the current schema ----------------------------------------------------

    async def _prepare(self, request: IngestRequest, *, fresh: bool) -> PreparedRows:
        bodies = _bodies(request)
        states = await self._states(request, bodies, fresh=fresh)
        try:
            decoded = self._decode(request, _schemas(states), bodies)
            if fresh or not any(table.rows.rejected for table in decoded):
                return await self._numbered(request, decoded)
        except RowsInvalid:
            if fresh:
                raise
        # Rows that do not fit what is remembered may fit what the table is now.
        again = await self._states(request, bodies, fresh=True)
        return await self._numbered(request, self._decode(request, _schemas(again), bodies))

    async def _likely_schema(self, request: IngestRequest) -> TableSchema | None:
        """Of a request for one table that most likely is open; without a timer where the table is
        remembered. None when the request has to be looked at by itself: `_prepare` does, and says
        why."""

        table = request.table
        if table is None or request.create or not request.principal.allows("ingest", table):
            return None
        state = self._tables.remembered(table)
        if state is None and self._tables.knew(table):
            async with self._in_time(request, "decode"):
                state = await self._tables.state(table)
        return None if state is None or not state.open else state.schema

    async def _prepare_together(
        self, request: IngestRequest, schema: TableSchema
    ) -> PreparedRows | None:
        """The usual way, which takes some milliseconds at most, so without a timer. None as
        before."""

        rows = await self._group.decode(
            schema,
            request.media_type,
            request.body,
            principal_id=request.principal.principal_id,
            at_once=not self._appending_since_s,
        )
        return None if rows is None else prepare_identified(schema, rows)

    async def _prepare_large(
        self, request: IngestRequest, schema: TableSchema
    ) -> PreparedRows | None:
        if not self._large.takes(request.media_type, request.body):
            return None
        async with self._in_time(request, "decode"):
            rows = await self._large.decode(schema, request.media_type, request.body)
        return None if rows is None else prepare_identified(schema, rows)

    def _decode(
        self,
        request: IngestRequest,
        schemas: Mapping[str, TableSchema],
        bodies: Mapping[str, TableBody],
        *,
        on_invalid: OnInvalid | None = None,
    ) -> list[TableRows]:
        return decode_tables(
            schemas,
            bodies,
            several=request.table is None,
            create=request.create,
            on_invalid=on_invalid or request.on_invalid,
            rows_max=self._settings.rows_max,
        )

    async def _numbered(self, request: IngestRequest, decoded: Sequence[TableRows]) -> PreparedRows:
        """The entry, after its new tables have got their ids: the payload names tables by id."""

        new = sum(table.is_new for table in decoded)
        numbers = await self._bus.number_tables(new) if new else None
        return prepare_decoded(decoded, several=request.table is None, numbers=numbers)

    async def _states(
        self, request: IngestRequest, names: Iterable[str], *, fresh: bool
    ) -> dict[str, TableState]:
        """The open tables of these names, without those that may be made. Raises Forbidden,
        TableNotFound."""

        found: dict[str, TableState] = {}
        for name in names:
            if not request.principal.allows("ingest", name):
                request.principal.require_table("ingest", name, await self._tables.names())
            state = await (self._tables.fresh_state if fresh else self._tables.state)(name)
            if not fresh and (state is None or not state.open):
                state = await self._tables.fresh_state(name)
            if state is None and request.create:
                request.principal.require_table("create", name)
                continue
            if state is None:
                raise request.principal.table_not_found(name, await self._tables.names())
            if not state.open:
                raise TableNotFound(f"the table {name} is being dropped and takes no more rows")
            found[name] = state
        return found

    # --- replays --------------------------------------------------------------------------------

    async def _compare(
        self, request: IngestRequest, record: KeyRecord, prepared: PreparedRows | None
    ) -> PreparedRows:
        """Raises IdempotencyConflict unless the payload is the one first accepted (A3, A4)."""

        if prepared is None or prepared.schema_versions != record.schema_versions:
            prepared = await self._prepare_as_first(request, record)
        if prepared is None or prepared.fingerprint != record.fingerprint:
            raise IdempotencyConflict(
                f"the idempotency key was used before with other rows, in batch "
                f"{record.receipt.batch_id}; nothing was stored. Use a new key for new rows",
                batch_id=record.receipt.batch_id,
            )
        return prepared

    async def _prepare_as_first(
        self, request: IngestRequest, record: KeyRecord
    ) -> PreparedRows | None:
        """The body under the schema versions of its first acceptance; None when it does not hold
        rows of just these tables, so that it cannot be the first payload."""

        schemas: dict[str, TableSchema] = {}
        for table_id, version in record.schema_versions.items():
            schema = await self._catalog.schema_version(table_id, version)
            if schema is None:
                raise Unavailable("the schema of the first attempt cannot be read now")
            schemas[schema.name] = schema
        try:
            bodies = _bodies(request)
            if request.table is None and set(bodies) != set(schemas):
                return None
            # The table may have been renamed since it took the rows of a request to it alone.
            if request.table is not None:
                (schema,) = schemas.values()
                schemas = {request.table: schema}
            # Diverted rows are part of the payload, so they are diverted whatever was asked.
            decoded = self._decode(request, schemas, bodies, on_invalid="quarantine")
            return prepare_decoded(decoded, several=request.table is None)
        except (
            MalformedBody,
            MalformedRequest,
            RowsInvalid,
            TableNotFound,
            UnsupportedMediaType,
        ):
            return None

    # --- visibility -----------------------------------------------------------------------------

    async def _wait_visible(self, receipt: Receipt, deadline_s: float) -> int | None:
        """The snapshot that covers the receipt, or None when the wait ran out. The rows are
        durable, so nothing but their own quarantine may look like a failure to the caller."""

        try:
            covered = await self._barrier.wait_for(
                [receipt.visibility_token], deadline_s=deadline_s
            )
        except RetryLater as error:
            _log.info("rows were not seen to be visible: %s", error)
            return None
        return covered.head.snapshot_id


def _schemas(states: Mapping[str, TableState]) -> dict[str, TableSchema]:
    return {name: state.schema for name, state in states.items()}


def _bodies(request: IngestRequest) -> dict[str, TableBody]:
    """What was sent for each table, by folded name. Raises what is wrong with the whole body."""

    if request.table is not None:
        return {request.table: TableBody(request.media_type, request.body)}
    if request.media_type == MULTIPART:
        bodies = _part_bodies(request)
    elif request.media_type == JSON:
        parts = split_tables(request.body)
        bodies = {name: TableBody(JSON, body) for name, body in parts.items()}
    else:
        raise UnsupportedMediaType(
            f"rows for several tables are sent as {JSON}: {{table: [rows], …}}, or as {MULTIPART}, "
            "one part a table",
            supported=[JSON, MULTIPART],
        )
    for name in bodies:
        try:
            fold_table_name(name)
        except SchemaInvalid:
            raise request.principal.table_not_found(name[:80]) from None
    return bodies


def _part_bodies(request: IngestRequest) -> dict[str, TableBody]:
    bodies: dict[str, TableBody] = {}
    for part in split_parts(request.body, request.boundary):
        name = fold(part.name)
        if name in bodies:
            raise MalformedRequest(f"the body has two parts for the table {name[:80]!r}")
        bodies[name] = TableBody(part.media_type, part.body)
    return bodies
