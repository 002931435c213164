"""The door for rows: one request to one receipt, exactly once for its key (contract A1-A13).

Why it is safe. The body is decoded optimistically under the schema this process remembers, and
appended; only the append transaction decides, because it alone sees the key, the schema version
and the backlog at one moment. Its three answers lead on:

* accepted: the receipt;
* the key is taken: the payload is compared with the first one, under the schema versions of the
  first one, and the first receipt or a conflict is the answer (A3, A4);
* the schema is stale: look again, decode again (A12).

Every refusal, whoever utters it, is held back until the key was looked up: a request that was
accepted before gets its receipt whatever has changed since (A3). An unknown outcome is never turned
into anything else (A6). Forbidden and unseen tables come first: they say nothing about the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

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
from storage.ingesting.prepared import PreparedRows, prepare_one, prepare_several
from storage.ingesting.requests import IngestAnswer, IngestRequest, IngestSettings
from storage.ingesting.table_cache import TableCache
from storage.reading.barrier import Barrier
from storage.rows.decode import JSON, split_tables

_log = logging.getLogger(__name__)


class IngestService:
    """One per process; stateless but for what it remembers of tables.

    `on_accepted` is called after each accepted entry, to wake whoever publishes; it must not block.
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
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._on_accepted = on_accepted
        self._appending_since_s: dict[object, float] = {}
        self._bus = bus
        self._catalog = catalog
        self._barrier = barrier
        self._tables = tables
        self._settings = settings or IngestSettings()

    async def ingest(self, request: IngestRequest) -> IngestAnswer:
        """Makes the rows durable, and waits for them when asked.

        Raises Forbidden, TableNotFound, MalformedRequest, MalformedBody, UnsupportedMediaType,
        RowsInvalid, BodyTooLarge, IdempotencyConflict, IdempotencyExpired, Backpressure,
        Unavailable (nothing was stored), OutcomeUnknown, Quarantined (after `wait_visible`).
        """

        request.principal.require("ingest")
        receipt, replayed = await self._accept(request)
        if not request.wait_visible:
            return IngestAnswer(receipt, replayed=replayed)
        snapshot_id = await self._wait_visible(receipt, request.deadline_s)
        return IngestAnswer(
            receipt, replayed=replayed, visible=snapshot_id is not None, snapshot_id=snapshot_id
        )

    @property
    def oldest_append_s(self) -> float:
        """For how long the oldest append has been waiting for the bus; 0.0 when none does."""

        for since_s in self._appending_since_s.values():
            return self._clock.monotonic_s() - since_s
        return 0.0

    # --- acceptance -------------------------------------------------------------------------

    async def _accept(self, request: IngestRequest) -> tuple[Receipt, bool]:
        prepared: PreparedRows | None = None
        try:
            prepared, outcome = await self._append(request)
        except (OutcomeUnknown, Forbidden):
            raise
        except LakebusError as refusal:
            record = await self._known(request, refusal)
            if record is None:
                raise
        else:
            if isinstance(outcome, Accepted):
                if self._on_accepted is not None:
                    self._on_accepted()
                return outcome.receipt, False
            record = outcome.record
        async with self._in_time(request, "key"):
            await self._compare(request, record, prepared)
        return record.receipt, True

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
        fresh = False
        for _ in range(self._settings.schema_tries):
            async with self._in_time(request, "decode"):
                prepared = await self._prepare(request, fresh=fresh)
            outcome = await self._append_in_time(request, prepared)
            if isinstance(outcome, (Accepted, KeyTaken)):
                return prepared, outcome
            fresh = True
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
        bodies = None if request.table is not None else _split(request)
        names = [request.table] if request.table is not None else list(bodies or ())
        states = await self._states(request, names, fresh=fresh)
        try:
            prepared = self._decode(request, _schemas(states), bodies)
            if fresh or not prepared.rejects:
                return prepared
        except RowsInvalid:
            if fresh:
                raise
        # Rows that do not fit what is remembered may fit what the table is now.
        again = await self._states(request, names, fresh=True)
        return self._decode(request, _schemas(again), bodies)

    def _decode(
        self,
        request: IngestRequest,
        schemas: Mapping[str, TableSchema],
        bodies: Mapping[str, bytes] | None,
    ) -> PreparedRows:
        on_invalid, rows_max = request.on_invalid, self._settings.rows_max
        if bodies is not None:
            return prepare_several(schemas, bodies, on_invalid=on_invalid, rows_max=rows_max)
        assert request.table is not None
        return prepare_one(
            schemas[request.table],
            request.media_type,
            request.body,
            on_invalid=on_invalid,
            rows_max=rows_max,
        )

    async def _states(
        self, request: IngestRequest, names: Iterable[str], *, fresh: bool
    ) -> dict[str, TableState]:
        """The open tables of these names. Raises Forbidden, TableNotFound."""

        found: dict[str, TableState] = {}
        for name in names:
            if not request.principal.allows("ingest", name):
                request.principal.require_table("ingest", name, await self._tables.names())
            state = await (self._tables.fresh_state if fresh else self._tables.state)(name)
            if not fresh and (state is None or not state.open):
                state = await self._tables.fresh_state(name)
            if state is None:
                raise request.principal.table_not_found(name, await self._tables.names())
            if not state.open:
                raise TableNotFound(f"the table {name} is being dropped and takes no more rows")
            found[name] = state
        return found

    # --- replays --------------------------------------------------------------------------------

    async def _compare(
        self, request: IngestRequest, record: KeyRecord, prepared: PreparedRows | None
    ) -> None:
        """Raises IdempotencyConflict unless the payload is the one first accepted (A3, A4)."""

        if prepared is None or prepared.schema_versions != record.schema_versions:
            prepared = await self._prepare_as_first(request, record)
        if prepared is None or prepared.fingerprint != record.fingerprint:
            raise IdempotencyConflict(
                f"the idempotency key was used before with other rows, in batch "
                f"{record.receipt.batch_id}; nothing was stored. Use a new key for new rows",
                batch_id=record.receipt.batch_id,
            )

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
        # Diverted rows are part of the payload, so they are diverted here whatever was asked.
        rows_max = self._settings.rows_max
        try:
            if request.table is None:
                bodies = _split(request)
                if set(bodies) != set(schemas):
                    return None
                return prepare_several(schemas, bodies, on_invalid="quarantine", rows_max=rows_max)
            (schema,) = schemas.values()
            return prepare_one(
                schema,
                request.media_type,
                request.body,
                on_invalid="quarantine",
                rows_max=rows_max,
            )
        except (MalformedBody, MalformedRequest, RowsInvalid):
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


def _split(request: IngestRequest) -> dict[str, bytes]:
    if request.media_type != JSON:
        raise UnsupportedMediaType(
            f"rows for several tables are sent as {JSON}: {{table: [rows], …}}", supported=[JSON]
        )
    bodies = split_tables(request.body)
    for name in bodies:
        try:
            fold_table_name(name)
        except SchemaInvalid:
            raise request.principal.table_not_found(name[:80]) from None
    return bodies
