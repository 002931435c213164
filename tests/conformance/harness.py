"""What a backend hands to the suite: a lake, time, and the faults it can make.

A backend writes one `Backend` (opens lakes) and one `LakeHarness` subclass. What a backend cannot
do is asked of the harness (`capabilities`), never decided by a backend's name; a test that needs
a missing capability is skipped with its name, so the report says what was not proved.
"""

from __future__ import annotations

import abc
import dataclasses
import datetime as dt
import enum
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import pyarrow as pa
import pytest

from lakebus.schemas import Column, TableSchema
from lakebus.tokens import TokenCodec, VisibilityToken
from storage.bus.interface import Accepted, Claim, IngestBus, NewEntry, RejectSet
from storage.bus.settings import BusSettings
from storage.catalog.interface import Catalog, Published
from storage.files.objects import ObjectStore
from storage.maintenance.erasing import Erasing
from storage.maintenance.interface import Upkeep
from storage.maintenance.jobs import JobStore
from storage.rows.segment import EntryPart
from tests.conformance.worker import StagedFiles, Worker

#: Short times, small budgets: what the suite opens lakes with unless a test says otherwise.
SUITE_SETTINGS = BusSettings(
    shards=3,
    lease_ttl_ms=300,
    claim_entries_max=1_000,
    idempotency_window_s=3_600.0,
    retry_backoff_ms=20,
    quarantine_attempts=3,
    quarantine_rate_max=50,
    segment_ring_rotate_bytes=64 * 1024,
    segment_ring_rotate_age_s=0.2,
)

#: How late an expired lease may become claimable (B5), and what a poll may take (B3).
CLAIMABLE_WITHIN_S = 2.0

COLUMNS = (Column(0, "id", "bigint"), Column(0, "note", "varchar"))


class Capability(enum.StrEnum):
    """What a backend may be able to do beyond the interface."""

    LOST_REPLIES = "lost_replies"
    ENDS_PAUSED_CLIENT = "ends_paused_client"
    FOREIGN_TRANSACTIONS = "foreign_transactions"
    REMOVE_INTENT = "remove_intent"
    EXPIRE_SNAPSHOTS = "expire_snapshots"
    RESTORE = "restore"
    CRASH_SERVER = "crash_server"


class Backend(Protocol):
    """Opens a new, empty lake; closing it leaves nothing behind."""

    def open(self, settings: BusSettings) -> AbstractAsyncContextManager[LakeHarness]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class LakeView:
    """One process's view of the lake: connections and caches of its own."""

    bus: IngestBus
    catalog: Catalog
    jobs: JobStore
    upkeep: Upkeep


class LakeHarness(abc.ABC):
    """One lake under test, with helpers that every test may use."""

    capabilities: frozenset[Capability] = frozenset()

    def __init__(self, settings: BusSettings) -> None:
        self.settings = settings
        self.files = StagedFiles()

    # --- what a backend supplies --------------------------------------------------------------

    @property
    @abc.abstractmethod
    def bus(self) -> IngestBus: ...

    @property
    @abc.abstractmethod
    def catalog(self) -> Catalog: ...

    @property
    @abc.abstractmethod
    def upkeep(self) -> Upkeep: ...

    @property
    @abc.abstractmethod
    def erasing(self) -> Erasing: ...

    @property
    @abc.abstractmethod
    def jobs(self) -> JobStore: ...

    @abc.abstractmethod
    async def second(self) -> LakeView:
        """A second process's view of the same lake, with connections of its own."""

    @abc.abstractmethod
    async def advance_s(self, seconds: float) -> None:
        """Returns once at least so much time has passed by the database's clock."""

    @abc.abstractmethod
    async def restart(self) -> None:
        """Drops everything that lives in the process, as a crash does, and opens the lake again."""

    async def lose_next_reply(self, operation: str) -> None:
        """LOST_REPLIES: the next "append", "publish" or "swap" of `bus`, `catalog`, `upkeep` takes
        effect unheard."""

        raise NotImplementedError

    def paused_client(
        self, *, chunks: int, withhold_bytes: int
    ) -> AbstractAsyncContextManager[LakeView]:
        """ENDS_PAUSED_CLIENT (the backend bounds what such a client holds): a process that stops
        while it sends. Of each connection so many chunks arrive whole, then one without its last
        bytes, then nothing."""

        raise NotImplementedError

    @asynccontextmanager
    async def foreign_transaction(self) -> Any:
        """FOREIGN_TRANSACTIONS: holds an idle transaction of somebody else open in the database:
        it has a transaction id, an old snapshot, and has read the bus. Elsewhere: nothing."""

        yield

    async def remove_intent(self, file_id: uuid.UUID) -> None:
        """REMOVE_INTENT: what collection does first with a file nobody referred to in time (C6)."""

        raise NotImplementedError

    async def expire_snapshots(self, *, before: int) -> None:
        """EXPIRE_SNAPSHOTS"""

        raise NotImplementedError

    async def condemn_regardless(self, file_id: uuid.UUID, object_key: str) -> None:
        """Writes the record of a condemned file as if a condemnation had been wrong, one of long
        ago: only the re-check at the deletion stands between it and the file."""

        raise NotImplementedError

    def keep_records_in(self, store: ObjectStore) -> None:
        """RESTORE: the object store that a restored lake asks for records of erasures."""

        raise NotImplementedError

    async def take_backup(self) -> Any:
        """RESTORE"""

        raise NotImplementedError

    async def restore(self, backup: Any) -> None:
        """RESTORE: rewinds the lake to a backup and begins a new history."""

        raise NotImplementedError

    async def crash_server(self) -> None:
        """CRASH_SERVER: kills the database without warning and starts it again."""

        raise NotImplementedError

    # --- helpers ------------------------------------------------------------------------------

    def needs(self, *capabilities: Capability) -> None:
        missing = set(capabilities) - self.capabilities
        if missing:
            pytest.skip(f"this backend lacks: {', '.join(sorted(missing))}")

    async def create(self, name: str = "t") -> TableSchema:
        return (await self.catalog.create_table(name=name, columns=COLUMNS)).schema

    async def accept(self, entry: NewEntry) -> Accepted:
        outcome = await self.bus.append(entry)
        assert isinstance(outcome, Accepted), outcome
        return outcome

    async def accept_many(
        self, table: TableSchema, count: int, *, ordering_key: str | None = "one"
    ) -> list[Accepted]:
        """`count` entries of one row each, one after the other, on one shard."""

        return [
            await self.accept(entry_of(table, [n], ordering_key=ordering_key)) for n in range(count)
        ]

    def worker(self, view: LakeView | None = None, owner: uuid.UUID | None = None) -> Worker:
        bus = self.bus if view is None else view.bus
        catalog = self.catalog if view is None else view.catalog
        return Worker(bus=bus, catalog=catalog, files=self.files, owner=owner)

    async def drain(self, *, within_s: float = 10.0) -> list[Published]:
        """Claims, stages and publishes until every accepted entry is terminal."""

        worker = self.worker()
        published = []
        step_s, waited_s = 0.02, 0.0
        while True:
            claim = await self.bus.claim(worker.owner)
            if claim is not None:
                published.append(await worker.publish(await worker.stage(claim)))
                continue
            if (await self.catalog.head()).watermark == dict(await self.bus.ends()):
                return published
            assert waited_s < within_s, "entries were left behind"
            await self.advance_s(step_s)
            waited_s += step_s

    async def claim_within(self, bound_s: float, worker: Worker) -> Claim:
        """A claim, at the latest `bound_s` from now by the database's clock."""

        deadline = (await self.catalog.head()).now.timestamp() + bound_s
        while True:
            claim = await worker.bus.claim(worker.owner)
            if claim is not None:
                return claim
            now = (await self.catalog.head()).now.timestamp()
            assert now < deadline, f"nothing was claimable within {bound_s} s"
            await self.advance_s(min(0.02, deadline - now))

    async def wait_expired(self) -> None:
        """Lets every lease taken so far expire."""

        await self.advance_s(self.settings.lease_ttl_ms / 1000 + 0.001)

    async def token_of(self, accepted: Accepted) -> VisibilityToken:
        identity = await self.catalog.identity()
        return TokenCodec(identity.token_secret).decode(accepted.receipt.visibility_token)

    async def rows_by_entry(self, *, table_id: int | None = None) -> dict[tuple[int, int], int]:
        """Rows of every (shard, position) in the newest snapshot, out of the files it names."""

        head = await self.catalog.head()
        return await self.files.rows_at(self.catalog, head.snapshot_id, table_id=table_id)


def entry_of(
    table: TableSchema | Sequence[TableSchema],
    ids: Sequence[int] = (1,),
    *,
    key: str | None = None,
    principal_id: int = 1,
    ordering_key: str | None = None,
    target: str | None = None,
    schema_version: int | None = None,
    note: str = "x",
    rejects: Sequence[RejectSet] = (),
    first_attempt_at: dt.datetime | None = None,
) -> NewEntry:
    """An entry with the same rows for each of the tables. `fingerprint` stands for the payload's
    identity: equal rows, equal fingerprint."""

    tables = [table] if isinstance(table, TableSchema) else list(table)
    batch = rows_of(ids, note=note)
    identity = repr((list(ids), note, [t.table_id for t in tables])).encode()
    parts = tuple(EntryPart(t.table_id, schema_version or t.version, batch) for t in tables)
    return NewEntry(
        principal_id=principal_id,
        target=target or (tables[0].name if len(tables) == 1 else "*"),
        parts=parts if ids else (),
        fingerprint=hashlib.sha256(identity).digest(),
        idempotency_key=key,
        ordering_key=ordering_key,
        rejects=tuple(rejects),
        first_attempt_at=first_attempt_at,
    )


def rows_of(ids: Sequence[int], *, note: str = "x") -> pa.RecordBatch:
    """Fields are named by column id; created tables number theirs 1, 2."""

    return pa.record_batch(
        {"1": pa.array(list(ids), pa.int64()), "2": pa.array([note] * len(ids), pa.string())}
    )


def total(ends: Mapping[int, int]) -> int:
    return sum(ends.values())
