"""Quarantine for people: look at what was set aside, fix it and send it again, or drop it (B9).

Why repeating a replay is safe: its entry carries a key derived from the quarantine id (with a space
in it, which no caller's key can have), so a second replay finds the first one's receipt, and other
fixed rows than the first time are a conflict. The successor is recorded after the append; if that
is lost, repeating the replay records it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from lakebus.errors import (
    Corrupt,
    IdempotencyConflict,
    IdempotencyExpired,
    MalformedRequest,
    NotFound,
    TableNotFound,
    Unavailable,
)
from lakebus.receipts import Receipt
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, IngestBus, KeyTaken, NewEntry, QuarantineItem
from storage.catalog.interface import Catalog
from storage.ingesting.grants import KeyStore, Principal
from storage.ingesting.plain_rows import rows_as_json
from storage.ingesting.prepared import PreparedRows, prepare_one, prepare_parts, prepare_several
from storage.ingesting.requests import SEVERAL_TABLES, IngestSettings
from storage.rows.decode import JSON, split_tables
from storage.rows.segment import decode_single_entry

_ROWS_SHOWN_MAX = 100


@dataclass(frozen=True, slots=True)
class FixedRows:
    """Rows to send instead of the quarantined ones."""

    media_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class ReplayAnswer:
    receipt: Receipt
    replayed: bool


class QuarantineService:
    def __init__(
        self,
        *,
        bus: IngestBus,
        catalog: Catalog,
        keys: KeyStore,
        settings: IngestSettings | None = None,
    ) -> None:
        self._bus = bus
        self._catalog = catalog
        self._keys = keys
        self._settings = settings or IngestSettings()

    async def items(
        self, principal: Principal, *, limit: int, before: int | None
    ) -> list[QuarantineItem]:
        """Newest first, those of tables that the caller administers."""

        principal.require("admin")
        names = await self._names()
        found = await self._bus.quarantine_items(limit=limit, before=before)
        return [item for item in found if _administers(principal, item, names)]

    async def item(self, principal: Principal, quarantine_id: int) -> QuarantineItem:
        """Raises Forbidden, NotFound."""

        principal.require("admin")
        item = await self._bus.quarantine_item(quarantine_id)
        if item is None or not _administers(principal, item, await self._names()):
            raise NotFound(f"there is nothing in quarantine under {quarantine_id}")
        return item

    async def shown(self, item: QuarantineItem) -> object:
        """The rows for people to read: a reject set's document, or the first rows of an entry by
        table; None when the stored bytes cannot be read."""

        if not item.payload:
            return None  # erased, or given up
        if item.kind == "rejects":
            return msgspec.Raw(item.payload)
        try:
            parts = decode_single_entry(item.payload)
        except Corrupt:
            return None
        shown: dict[str, list[dict[str, object]]] = {}
        for part in parts:
            schema = await self._catalog.schema_version(part.table_id, part.schema_version)
            if schema is not None:
                shown[schema.name] = rows_as_json(schema, part.batch, rows_max=_ROWS_SHOWN_MAX)
        return shown

    async def drop(self, principal: Principal, quarantine_id: int) -> None:
        """Forgets the rows for good. Raises Forbidden, NotFound."""

        item = await self.item(principal, quarantine_id)
        if not await self._bus.drop_quarantined(quarantine_id):
            raise NotFound(f"there is nothing in quarantine under {quarantine_id}")
        await self._record(principal, "quarantine.drop", item)

    async def replay(
        self, principal: Principal, quarantine_id: int, *, fixed: FixedRows | None
    ) -> ReplayAnswer:
        """Sends the rows again, as they are or fixed, for the principal they came from.

        Raises Forbidden, NotFound, TableNotFound, RowsInvalid, MalformedRequest,
        IdempotencyConflict (it was replayed with other rows), IdempotencyExpired.
        """

        item = await self.item(principal, quarantine_id)
        key = f"quarantine {quarantine_id}"
        if item.successor_batch_id is not None:
            await self._refuse_forgotten(item, key)
        for _ in range(self._settings.schema_tries):
            prepared = self._prepare(item, fixed, await self._schemas(item))
            outcome = await self._bus.append(
                NewEntry(
                    principal_id=item.principal_id,
                    target=item.target,
                    parts=prepared.parts,
                    fingerprint=prepared.fingerprint,
                    idempotency_key=key,
                )
            )
            if isinstance(outcome, Accepted):
                return await self._replayed(principal, item, outcome.receipt, replayed=False)
            if isinstance(outcome, KeyTaken):
                if outcome.record.fingerprint != prepared.fingerprint:
                    raise IdempotencyConflict(
                        f"this was replayed before with other rows, as batch "
                        f"{outcome.record.receipt.batch_id}; nothing was stored",
                        batch_id=outcome.record.receipt.batch_id,
                    )
                return await self._replayed(principal, item, outcome.record.receipt, replayed=True)
        raise Unavailable("the table changed again and again; nothing was stored, try again")

    async def _replayed(
        self, principal: Principal, item: QuarantineItem, receipt: Receipt, *, replayed: bool
    ) -> ReplayAnswer:
        await self._bus.mark_replayed(item.quarantine_id, receipt.batch_id)
        await self._record(principal, "quarantine.replay", item)
        return ReplayAnswer(receipt, replayed)

    async def _refuse_forgotten(self, item: QuarantineItem, key: str) -> None:
        if await self._bus.find_key(item.principal_id, item.target, key) is None:
            raise IdempotencyExpired(
                f"this was replayed as batch {item.successor_batch_id}, longer ago than keys are "
                "remembered; nothing was stored",
                batch_id=item.successor_batch_id,
            )

    # --- rows -------------------------------------------------------------------------------

    def _prepare(
        self, item: QuarantineItem, fixed: FixedRows | None, schemas: Mapping[str, TableSchema]
    ) -> PreparedRows:
        if fixed is not None:
            return self._prepare_fixed(item, fixed, schemas)
        if not item.payload:
            raise MalformedRequest(
                "its rows are gone: they were erased, or given up after their bytes were lost; "
                "send the rows in the body"
            )
        if item.kind == "rejects":
            (schema,) = schemas.values()
            return prepare_one(
                schema,
                JSON,
                rejected_rows(item.payload),
                on_invalid="reject",
                rows_max=self._settings.rows_max,
            )
        try:
            parts = decode_single_entry(item.payload)
        except Corrupt:
            raise MalformedRequest(
                "the stored rows cannot be read; send the fixed rows in the body"
            ) from None
        return prepare_parts({schema.table_id: schema for schema in schemas.values()}, parts)

    def _prepare_fixed(
        self, item: QuarantineItem, fixed: FixedRows, schemas: Mapping[str, TableSchema]
    ) -> PreparedRows:
        rows_max = self._settings.rows_max
        if item.kind == "entry" and item.target == SEVERAL_TABLES:
            bodies = split_tables(fixed.body)
            for name in bodies:
                if name not in schemas:
                    raise MalformedRequest(
                        f"the quarantined rows are of the tables {', '.join(schemas)}"
                    )
            return prepare_several(schemas, bodies, on_invalid="reject", rows_max=rows_max)
        (schema,) = schemas.values()
        return prepare_one(
            schema, fixed.media_type, fixed.body, on_invalid="reject", rows_max=rows_max
        )

    async def _schemas(self, item: QuarantineItem) -> dict[str, TableSchema]:
        """The open tables of the item as they are now, by name. Raises TableNotFound."""

        live = {s.schema.table_id: s for s in await self._catalog.tables() if s.open}
        missing = [table_id for table_id in item.table_ids if table_id not in live]
        if missing or not item.table_ids:
            raise TableNotFound("a table of these rows is dropped; they can only be dropped too")
        schemas = [live[table_id].schema for table_id in item.table_ids]
        return {schema.name: schema for schema in schemas}

    async def _names(self) -> dict[int, str]:
        return {s.schema.table_id: s.schema.name for s in await self._catalog.tables()}

    async def _record(self, principal: Principal, action: str, item: QuarantineItem) -> None:
        await self._keys.audit(
            principal=principal.name,
            action=action,
            subject=str(item.quarantine_id),
            detail={"batch_id": item.batch_id},
        )


def rejected_rows(document: bytes) -> bytes:
    """The rows of a reject set as a JSON array, each as it was sent."""

    stored = msgspec.json.decode(document, type=_RejectDocument)
    return b"[" + b",".join(bytes(row.value) for row in stored.rows) + b"]"


class _RejectedRow(msgspec.Struct):
    value: msgspec.Raw


class _RejectDocument(msgspec.Struct):
    rows: list[_RejectedRow]


def _administers(principal: Principal, item: QuarantineItem, names: Mapping[int, str]) -> bool:
    tables: Sequence[str] = [names[t] for t in item.table_ids if t in names]
    if item.target != SEVERAL_TABLES:
        tables = [*tables, item.target]
    # With no name left (all tables dropped) only an administrator of everything is sure to be one.
    return all(principal.allows("admin", table) for table in tables or ["*"])
