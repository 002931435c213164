"""The database: a process with the lake's state, reached over the network.

Its state is durable: a restart loses the calls under way and nothing that was committed. Each
process has a bus and a catalog of its own here, as each replica has its own group commit. Effects
are those of the in-memory backend, one step of the loop each; what is simulated is the way there
and back. Errors are those of `storage.postgres.failures`: a lost read is Unavailable, a lost write
is OutcomeUnknown, a refused connection is Unavailable.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from lakebus.errors import OutcomeUnknown, Unavailable
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import Snapshot
from storage.bus.interface import (
    AppendOutcome,
    BatchStatus,
    Claim,
    ClaimedSegment,
    EmptiedBus,
    KeyRecord,
    LeaseRef,
    NewEntry,
    PurgeReport,
    QuarantineItem,
    ShardStatus,
    TableNumbers,
)
from storage.bus.memory import MemoryBus
from storage.catalog.interface import (
    Commit,
    DropTicket,
    Head,
    LakeIdentity,
    ManifestDelta,
    Published,
    PublishedRange,
    TableChange,
    TableState,
)
from storage.catalog.memory import MemoryCatalog
from storage.memory_lake import MemoryLake
from tests.simulation.event_loop import Process, SimulatedLoop
from tests.simulation.network import Endpoint, Network

T = TypeVar("T")
_Queued = tuple[NewEntry, "asyncio.Future[AppendOutcome]"]

#: `command_timeout` of a connection.
_CALL_S = 4.0


class Database:
    """`lake` is what is on its disk."""

    def __init__(self, loop: SimulatedLoop, network: Network, lake: MemoryLake) -> None:
        self._loop = loop
        self.network = network
        self.lake = lake
        self.starts = 0
        self.endpoint = Endpoint(loop, self._new_process())
        self.catalog = MemoryCatalog(lake)
        self._buses: dict[Process, MemoryBus] = {}
        #: How long a publish waits for its lock; it takes effect only then.
        self.lock_s: Callable[[], float] | None = None

    async def publish(self, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        if self.lock_s is not None:
            await asyncio.sleep(self.lock_s())
        return await self.catalog.publish(publication_id, commits)

    def bus_of(self, process: Process) -> MemoryBus:
        found = self._buses.get(process)
        if found is None:
            found = self._buses[process] = MemoryBus(self.lake)
        return found

    def crash(self) -> None:
        self.endpoint.process.kill()
        self.endpoint.abandon()

    def start(self) -> None:
        """Comes up again with what was committed, and nobody's half-sent groups."""

        self._buses.clear()
        self.endpoint.become(self._new_process())

    def _new_process(self) -> Process:
        self.starts += 1
        return self._loop.new_process(f"database {self.starts}")

    async def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await self.network.call(
            self.endpoint, work, lost=_unanswered, refused=_unreached, timeout_s=_CALL_S
        )

    async def write(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await self.network.call(
            self.endpoint, work, lost=_unknown, refused=_unreached, timeout_s=_CALL_S
        )


def _unreached() -> Exception:
    return Unavailable("the catalog cannot be reached now")


def _unanswered() -> Exception:
    return Unavailable("the catalog did not answer")


def _unknown() -> Exception:
    return OutcomeUnknown("the connection broke before the answer came")


class RemoteBus:
    """One process's `IngestBus`."""

    def __init__(self, database: Database, process: Process) -> None:
        self._db = database
        self._process = process
        self._queue: list[_Queued] = []
        self._flushing: asyncio.Task[None] | None = None

    @property
    def _bus(self) -> MemoryBus:
        return self._db.bus_of(self._process)

    @property
    def shards(self) -> int:
        return len(self._db.lake.state.shards)

    def shard_of(self, principal_id: int, ordering: str) -> int:
        return self._bus.shard_of(principal_id, ordering)

    async def append(self, entry: NewEntry) -> AppendOutcome:
        """Group commit: what arrives while one group is under way goes with the next."""

        answer: asyncio.Future[AppendOutcome] = asyncio.get_running_loop().create_future()
        self._queue.append((entry, answer))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush(), name="group commit")
        return await answer

    async def _flush(self) -> None:
        while self._queue:
            group, self._queue = self._queue, []
            entries = [entry for entry, _ in group]
            verdicts: Sequence[AppendOutcome | BaseException]
            try:
                verdicts = await self._db.write(functools.partial(self._append_all, entries))
            except (OutcomeUnknown, Unavailable) as error:
                verdicts = [error] * len(group)
            for (_, answer), verdict in zip(group, verdicts, strict=True):
                if answer.done():
                    continue
                if isinstance(verdict, BaseException):
                    answer.set_exception(verdict)
                else:
                    answer.set_result(verdict)
        self._flushing = None

    async def _append_all(
        self, entries: Sequence[NewEntry]
    ) -> Sequence[AppendOutcome | BaseException]:
        appends = (self._bus.append(entry) for entry in entries)
        return await asyncio.gather(*appends, return_exceptions=True)

    async def number_tables(self, count: int) -> TableNumbers:
        return await self._db.read(lambda: self._bus.number_tables(count))

    async def find_key(self, principal_id: int, target: str, key: str) -> KeyRecord | None:
        return await self._db.read(lambda: self._bus.find_key(principal_id, target, key))

    async def claim(self, owner: uuid.UUID) -> Claim | None:
        return await self._db.read(lambda: self._bus.claim(owner))

    async def read(self, claim: Claim) -> Sequence[ClaimedSegment]:
        return await self._db.read(lambda: self._bus.read(claim))

    async def renew(self, leases: Sequence[LeaseRef]) -> Sequence[LeaseRef]:
        return await self._db.read(lambda: self._bus.renew(leases))

    async def release(self, lease: LeaseRef) -> None:
        await self._db.write(lambda: self._bus.release(lease))

    async def nack(self, lease: LeaseRef, *, error: str, delay_s: float) -> None:
        await self._db.write(lambda: self._bus.nack(lease, error=error, delay_s=delay_s))

    async def note_canary(self, lease: LeaseRef) -> None:
        await self._db.read(lambda: self._bus.note_canary(lease))

    async def ends(self) -> Mapping[int, int]:
        return await self._db.read(lambda: self._bus.ends())

    async def shard_status(self) -> Sequence[ShardStatus]:
        return await self._db.read(lambda: self._bus.shard_status())

    async def batch(self, batch_id: str) -> BatchStatus | None:
        return await self._db.read(lambda: self._bus.batch(batch_id))

    async def quarantined_of(self, entries: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
        return await self._db.read(lambda: self._bus.quarantined_of(entries))

    async def quarantine_items(
        self, *, limit: int = 100, before: int | None = None
    ) -> Sequence[QuarantineItem]:
        return await self._db.read(lambda: self._bus.quarantine_items(limit=limit, before=before))

    async def quarantine_item(self, quarantine_id: int) -> QuarantineItem | None:
        return await self._db.read(lambda: self._bus.quarantine_item(quarantine_id))

    async def mark_replayed(self, quarantine_id: int, successor_batch_id: str) -> None:
        await self._db.write(lambda: self._bus.mark_replayed(quarantine_id, successor_batch_id))

    async def drop_quarantined(self, quarantine_id: int) -> bool:
        return await self._db.write(lambda: self._bus.drop_quarantined(quarantine_id))

    async def erase_quarantined(self, quarantine_id: int, *, reason: str) -> bool:
        return await self._db.write(
            lambda: self._bus.erase_quarantined(quarantine_id, reason=reason)
        )

    async def empty(self, positions: Mapping[int, int]) -> EmptiedBus:
        return await self._db.read(lambda: self._bus.empty(positions))

    async def purge(self) -> PurgeReport:
        return await self._db.read(lambda: self._bus.purge())


class RemoteCatalog:
    """One process's `Catalog`."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._catalog = database.catalog

    async def identity(self) -> LakeIdentity:
        return await self._db.read(self._catalog.identity)

    async def head(self) -> Head:
        return await self._db.read(self._catalog.head)

    async def snapshot(self, snapshot_id: int) -> Snapshot:
        return await self._db.read(lambda: self._catalog.snapshot(snapshot_id))

    async def snapshot_at(self, time: dt.datetime) -> Snapshot:
        return await self._db.read(lambda: self._catalog.snapshot_at(time))

    async def snapshots(self, *, limit: int, before: int | None = None) -> Sequence[Snapshot]:
        return await self._db.read(lambda: self._catalog.snapshots(limit=limit, before=before))

    async def create_table(
        self,
        *,
        name: str,
        columns: Sequence[Column],
        partition_by: Sequence[str] = (),
        sort_by: Sequence[str] = (),
        retention: Mapping[str, object] | None = None,
        if_not_exists: bool = False,
        actor: str = "",
    ) -> TableChange:
        return await self._db.write(
            lambda: self._catalog.create_table(
                name=name,
                columns=columns,
                partition_by=partition_by,
                sort_by=sort_by,
                retention=retention,
                if_not_exists=if_not_exists,
                actor=actor,
            )
        )

    async def alter_table(
        self, *, schema: TableSchema, expected_version: int, actor: str = ""
    ) -> TableChange:
        return await self._db.write(
            lambda: self._catalog.alter_table(
                schema=schema, expected_version=expected_version, actor=actor
            )
        )

    async def begin_drop(self, *, name: str, actor: str = "") -> DropTicket:
        return await self._db.write(lambda: self._catalog.begin_drop(name=name, actor=actor))

    async def finish_drop(self, ticket: DropTicket) -> int:
        return await self._db.write(lambda: self._catalog.finish_drop(ticket))

    async def closing_tables(self) -> Sequence[DropTicket]:
        return await self._db.read(self._catalog.closing_tables)

    async def table(self, name: str) -> TableState | None:
        return await self._db.read(lambda: self._catalog.table(name))

    async def schema_version(self, table_id: int, version: int) -> TableSchema | None:
        return await self._db.read(lambda: self._catalog.schema_version(table_id, version))

    async def tables(self) -> Sequence[TableState]:
        return await self._db.read(self._catalog.tables)

    async def publish(self, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        return await self._db.write(lambda: self._db.publish(publication_id, commits))

    async def publish_outcome(self, publication_id: uuid.UUID) -> Published | None:
        return await self._db.read(lambda: self._catalog.publish_outcome(publication_id))

    async def published_ranges(
        self, *, after: int, until: int, shard: int = 0, position: int = 0, limit: int = 1_000
    ) -> Sequence[PublishedRange]:
        return await self._db.read(
            lambda: self._catalog.published_ranges(
                after=after, until=until, shard=shard, position=position, limit=limit
            )
        )

    async def removed_rows(self, table_id: int, *, after: int, until: int) -> bool:
        return await self._db.read(
            lambda: self._catalog.removed_rows(table_id, after=after, until=until)
        )

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        return await self._db.read(lambda: self._catalog.manifest_delta(after=after, until=until))
