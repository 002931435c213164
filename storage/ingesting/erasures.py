"""Erasures at the door: who may, what is meant, and the wait for the job that does it (E7).

Everything is as with deletes, which this is built on: the key, the grants, the predicate judged in
the cage, the record of the job as the truth. What differs: it takes `admin` on the table beside
`query`, and it is about entries and not about a snapshot. The authoritative ends of all shards are
read here, so whatever was accepted before the erasure lies below them, published or not, and a row
is erased if its position does. What is accepted later is never touched.

The shape of the table goes along whole, because a restore may bring a catalog that has not seen it.
"""

from __future__ import annotations

from typing import Any

from lakebus.clock import Clock
from lakebus.schemas import TableSchema
from lakebus.tokens import TokenCodec
from storage.bus.interface import IngestBus
from storage.ingesting.deletes import DeleteService
from storage.ingesting.grants import KeyStore
from storage.ingesting.table_cache import TableCache
from storage.maintenance.jobs import JobKind, JobStore
from storage.reading.resolve import Resolver

SCOPES = ("admin", "query")


class ErasureService(DeleteService):
    """One per process. The `deleted_rows` of its answers are those of the snapshot that has lost
    most of them; the report tells of all snapshots."""

    kind = JobKind.ERASE
    scopes = SCOPES
    action = "table.erase_rows"

    def __init__(
        self,
        *,
        jobs: JobStore,
        tables: TableCache,
        resolver: Resolver,
        codec: TokenCodec,
        keys: KeyStore,
        bus: IngestBus,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(
            jobs=jobs, tables=tables, resolver=resolver, codec=codec, keys=keys, clock=clock
        )
        self._bus = bus

    async def _more(self, schema: TableSchema) -> dict[str, Any]:
        ends = await self._bus.ends()
        return {
            "table_id": schema.table_id,
            "schema_version": schema.version,
            "shape": [[c.name, c.column_id, c.type] for c in schema.columns],
            "ends": [ends[shard] for shard in sorted(ends)],
        }
