"""Creating, changing and dropping tables: grants, definitions, and the two steps of a drop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lakebus.clock import Clock, SystemClock
from lakebus.errors import (
    RetryLater,
    SchemaInvalid,
    SchemaVersionMismatch,
    TableExists,
    Unavailable,
    VisibilityTimeout,
)
from lakebus.schemas import TableSchema, fold_table_name
from lakebus.tokens import VisibilityToken
from storage.catalog.interface import Catalog, DropTicket, TableState
from storage.ingesting.definitions import TableChangeRequest, TableDefinition
from storage.ingesting.grants import KeyStore, Principal
from storage.ingesting.table_cache import TableCache
from storage.reading.barrier import Barrier

_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class TableAnswer:
    """`created` is False when the table was there already; `replayed` when this very call, told
    by its idempotency key, seems to have made it before. The snapshot is 0 when none was made."""

    schema: TableSchema
    snapshot_id: int
    created: bool = True
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class DropAnswer:
    """`snapshot_id` is None while entries accepted before the drop are not terminal: the table
    is closed, and the drop is finished in the background (A12)."""

    name: str
    snapshot_id: int | None


class TableService:
    def __init__(
        self,
        *,
        catalog: Catalog,
        barrier: Barrier,
        tables: TableCache,
        keys: KeyStore,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._catalog = catalog
        self._barrier = barrier
        self._tables = tables
        self._keys = keys

    async def create(
        self,
        principal: Principal,
        definition: TableDefinition,
        *,
        if_not_exists: bool = False,
        keyed: bool = False,
    ) -> TableAnswer:
        """Raises Forbidden, SchemaInvalid, TableExists.

        With a key (`keyed`), a table that looks exactly like the definition counts as made by an
        earlier try of the same call.
        """

        principal.require("create")
        checked = definition.checked()
        if not principal.allows("create", checked.name):
            principal.require_table("create", checked.name)
        try:
            change = await self._catalog.create_table(
                name=checked.name,
                columns=checked.columns,
                partition_by=checked.partition_by,
                sort_by=checked.sort_by,
                retention=checked.retention,
                if_not_exists=if_not_exists,
                actor=principal.name,
            )
        except TableExists:
            state = await self._tables.fresh_state(checked.name)
            if keyed and state is not None and state.open and checked.describes(state.schema):
                return TableAnswer(state.schema, 0, created=False, replayed=True)
            raise
        self._tables.forget(checked.name)
        if change.created:
            await self._record(principal, "table.create", checked.name, change.schema.version)
        return TableAnswer(change.schema, change.snapshot_id, created=change.created)

    async def alter(
        self,
        principal: Principal,
        name: str,
        change: TableChangeRequest,
        *,
        expected_version: int | None,
    ) -> TableAnswer:
        """Raises Forbidden, TableNotFound, SchemaInvalid, SchemaChangeInvalid,
        SchemaVersionMismatch."""

        schema = (await self.open_table(principal, "create", name)).schema
        if expected_version is not None and expected_version != schema.version:
            raise SchemaVersionMismatch(
                f"the table {schema.name} is at schema version {schema.version}, and If-Match asks "
                f"for {expected_version}; look at the table again",
                schema_version=schema.version,
            )
        changed = change.applied_to(schema)
        done = await self._catalog.alter_table(
            schema=changed, expected_version=schema.version, actor=principal.name
        )
        self._tables.forget(schema.name)
        await self._record(principal, "table.alter", schema.name, done.schema.version)
        return TableAnswer(done.schema, done.snapshot_id)

    async def drop(self, principal: Principal, name: str, *, deadline_s: float) -> DropAnswer:
        """Closes the table, waits until the entries accepted before are terminal, and publishes
        the drop (A12). Raises Forbidden, TableNotFound."""

        schema = (await self.table(principal, "create", name)).schema
        ticket = await self._catalog.begin_drop(name=schema.name, actor=principal.name)
        self._tables.forget(schema.name)
        await self._record(principal, "table.drop", schema.name, schema.version)
        return DropAnswer(schema.name, await self._finish(ticket, deadline_s))

    async def _finish(self, ticket: DropTicket, deadline_s: float) -> int | None:
        history = (await self._catalog.identity()).history
        token = VisibilityToken(history, 0, dict(ticket.positions))
        while self._clock.monotonic_s() < deadline_s:
            try:
                await self._barrier.wait_for([token], deadline_s=deadline_s)
                return await self._catalog.finish_drop(ticket)
            except VisibilityTimeout:
                break
            except RetryLater:
                # The drop is begun and durable; whether it can be finished is asked again.
                await asyncio.sleep(_PAUSE_S)
        return None

    # --- looking --------------------------------------------------------------------------------

    async def table(self, principal: Principal, scope: str, name: str) -> TableState:
        """The live table of this name. Raises Forbidden, TableNotFound."""

        principal.require(scope)
        try:
            folded = fold_table_name(name)
        except SchemaInvalid:
            raise principal.table_not_found(name[:80]) from None
        if not principal.allows(scope, folded):
            principal.require_table(scope, folded, await self._tables.names())
        state = await self._tables.fresh_state(folded)
        if state is None:
            raise principal.table_not_found(folded, await self._tables.names())
        return state

    async def open_table(self, principal: Principal, scope: str, name: str) -> TableState:
        state = await self.table(principal, scope, name)
        if not state.open:
            raise Unavailable(f"the table {state.schema.name} is being dropped", retry_after_s=1.0)
        return state

    async def tables(self, principal: Principal) -> list[TableState]:
        """The live tables that the caller may see, by name."""

        return [s for s in await self._catalog.tables() if principal.sees(s.schema.name)]

    async def _record(self, principal: Principal, action: str, name: str, version: int) -> None:
        await self._keys.audit(
            principal=principal.name,
            action=action,
            subject=name,
            detail={"schema_version": version},
        )
