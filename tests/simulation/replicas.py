"""Replicas: the real door, barrier, resolver and manifest, as one process serves them.

What HTTP adds is left out: a call brings the request's objects and takes the answer's, or the typed
error. Queries read whole tables out of the files that the manifest names; the engine is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lakebus.clock import format_time
from lakebus.errors import Corrupt, TableNotFound
from lakebus.schemas import POSITION_COLUMN, ROW_COLUMN, SHARD_COLUMN
from lakebus.tokens import VisibilityToken
from storage.ingesting.batches import BatchService
from storage.ingesting.grants import Grant, Principal
from storage.ingesting.memory_keys import MemoryKeyStore
from storage.ingesting.quarantine import QuarantineService
from storage.ingesting.requests import IngestSettings
from storage.ingesting.service import IngestService
from storage.ingesting.table_cache import TableCache
from storage.ingesting.table_service import TableService
from storage.reading.barrier import Barrier
from storage.reading.manifest import Manifest, SnapshotView
from storage.reading.resolve import Resolver, SnapshotChoice
from storage.reading.watcher import HeadWatcher
from tests.history.record import Groups
from tests.history.rows import groups_of_rows
from tests.simulation.database import RemoteBus, RemoteCatalog
from tests.simulation.event_loop import Process
from tests.simulation.network import Endpoint
from tests.simulation.store import RemoteStore, decode_rows

if TYPE_CHECKING:
    from tests.simulation.world import World

_GRANTS = tuple(Grant(scope) for scope in ("ingest", "query", "create", "admin"))
_INGEST = IngestSettings(table_cache_age_s=0.5)
#: Column ids of `tests.history.rows.COLUMNS` in a table that was created with them.
_REQUEST, _CHECK = "1", "3"


def principal(number: int) -> Principal:
    return Principal(number, f"p{number}", _GRANTS)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query tells."""

    snapshot_id: int
    snapshot_time: str
    token: VisibilityToken
    tables: dict[str, Groups]


class Replica:
    """One life of one replica's process."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self._world = world
        self.process: Process = world.loop.new_process(name)
        self.endpoint = Endpoint(world.loop, self.process)
        self.clock = world.new_clock()
        bus = RemoteBus(world.database, self.process)
        catalog = RemoteCatalog(world.database)
        codec = world.lake.codec
        self._store = RemoteStore(world.network, world.store_endpoint, world.objects)
        self._news = asyncio.Event()
        self._manifest = Manifest(catalog)
        self._watcher = HeadWatcher(
            catalog,
            listen=self._listen,
            poll_s=0.25,
            clock=self.clock,
            on_head=self._manifest.prefetch,
            chance=world.chance,
        )
        self._barrier = Barrier(
            catalog=catalog, bus=bus, watcher=self._watcher, codec=codec, clock=self.clock
        )
        self._resolver = Resolver(catalog=catalog, barrier=self._barrier, clock=self.clock)
        self._codec = codec
        tables = TableCache(catalog, clock=self.clock, age_s=_INGEST.table_cache_age_s)
        keys = MemoryKeyStore(clock=self.clock)
        self.ingest = IngestService(
            bus=bus,
            catalog=catalog,
            barrier=self._barrier,
            tables=tables,
            settings=_INGEST,
            on_accepted=world.hint,
            clock=self.clock,
        )
        self.tables = TableService(
            catalog=catalog, barrier=self._barrier, tables=tables, keys=keys, clock=self.clock
        )
        self.batches = BatchService(bus=bus, watcher=self._watcher)
        self.quarantine = QuarantineService(bus=bus, catalog=catalog, keys=keys, settings=_INGEST)

    def start(self) -> None:
        self._world.loop.spawn(self.process, self._start(), name="start")

    async def _start(self) -> None:
        self._watcher.start()

    async def stop(self) -> None:
        """The polite end, in the order of the composition root."""

        await self._barrier.close()
        await self._watcher.stop()
        await self._manifest.close()

    def notify(self) -> None:
        """A notification of the database."""

        self._news.set()

    async def _listen(self) -> AsyncIterator[None]:
        while True:
            await self._news.wait()
            self._news.clear()
            yield

    # --- reading ----------------------------------------------------------------------------

    async def wait(
        self, tokens: Sequence[VisibilityToken], *, timeout_s: float
    ) -> tuple[int, VisibilityToken]:
        covered = await self._barrier.wait_for(
            [self._codec.encode(token) for token in tokens], deadline_s=self._deadline_s(timeout_s)
        )
        head = covered.head
        return head.snapshot_id, VisibilityToken(head.history, head.snapshot_id)

    async def query(
        self,
        tables: Sequence[str],
        *,
        choice: SnapshotChoice,
        tokens: Sequence[VisibilityToken],
        timeout_s: float,
        staleness_s: float = 0.0,
    ) -> Answer:
        resolved = await self._resolver.resolve(
            choice,
            tokens=[self._codec.encode(token) for token in tokens],
            deadline_s=self._deadline_s(timeout_s),
            staleness_s=staleness_s,
        )
        view = await self._manifest.at(resolved.snapshot_id, resolved.head)
        found = {table: await self._rows(view, table) for table in tables}
        return Answer(
            resolved.snapshot_id, format_time(resolved.published_at), resolved.token, found
        )

    async def _rows(self, view: SnapshotView, table: str) -> Groups:
        schema = view.schema(table)
        if schema is None:
            raise TableNotFound(f"there is no table {table}")
        rows: list[tuple[int, int]] = []
        places: set[tuple[object, ...]] = set()
        for file in view.files(schema.table_id).files:
            columns = decode_rows(await self._store.get(file.object_key))
            origins = [columns[name] for name in (SHARD_COLUMN, POSITION_COLUMN, ROW_COLUMN)]
            for place in zip(*origins, strict=True):
                if place in places:
                    raise Corrupt(f"{table} has the row {place} twice in one snapshot")
                places.add(place)
            rows += zip(columns[_REQUEST], columns[_CHECK], strict=True)  # type: ignore[arg-type]
            if len(columns[_REQUEST]) != file.rows:
                raise Corrupt(f"the file {file.object_key} has not as many rows as recorded")
        return groups_of_rows(rows)

    def deadline_s(self, timeout_s: float) -> float:
        return self._deadline_s(timeout_s)

    def _deadline_s(self, timeout_s: float) -> float:
        return self.clock.monotonic_s() + timeout_s
