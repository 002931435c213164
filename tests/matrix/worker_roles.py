"""A commit worker: what one process of the product holds, over a lake of its own.

`WorkerSettings` says everything about it and can travel to a child process. Its faults are the
worker's own: at which step it ends or stops itself, how long its encoder is busy, which row kills
it. Faults of what it stands on are given to `open_worker` as a store or a clock.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from actors.coordinator import CommitCoordinator
from actors.lease_manager import LeaseManager
from actors.publisher import SnapshotPublisher
from actors.range_files import EncodeFile
from actors.settings import RoleSettings
from actors.staging import Staged, Stager
from lakebus.clock import Clock, SystemClock, new_uuid
from lakebus.schemas import TableSchema
from lakebus.telemetry import NO_TRACING, MemoryMetrics
from storage.bus.interface import Claim
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit
from storage.files.objects import LocalObjectStore, ObjectStore
from storage.files.parquet import EncodedFile, encode_data_file
from storage.postgres import PostgresLake
from tests.faults.clocks import WRONG_CLOCKS
from tests.faults.disks import DiskPoint
from tests.faults.store import FaultyStore, Operation, StoreFault

_LOOK_S = 0.005

#: What a process does to itself: nothing is flushed, closed or said after it.
Fate = Literal["kill", "stop"]


@dataclass(frozen=True, slots=True)
class DiskFate:
    """What becomes of the process at a step of its first put into this part of the store."""

    point: DiskPoint
    fate: Fate
    part: str = "tables"


@dataclass(frozen=True, slots=True)
class FailpointFate:
    """What becomes of the process when it reaches a failpoint for the first time."""

    name: str
    fate: Fate


@dataclass(frozen=True, slots=True)
class Busy:
    """The encoder is busy for so long at its first file. `how`: it releases the interpreter's lock,
    or it is Python code that gives the lock up when asked to, or it never gives it up."""

    seconds: float
    how: Literal["released", "python", "held"]


@dataclass(frozen=True, slots=True)
class Poison:
    """A row with this id ends the process, so long after its encoding began."""

    row_id: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Everything a worker is made of; travels to a child. `clock` names one of `WRONG_CLOCKS`."""

    dsn: str
    root: Path
    bus: BusSettings
    roles: RoleSettings
    clock: str = ""
    failpoint: FailpointFate | None = None
    disk: DiskFate | None = None
    unnamed_files: bool = True
    #: Each put takes so much longer.
    put_s: float = 0.0
    busy: Busy | None = None
    poison: Poison | None = None


class Worker:
    """The roles of one process over a lake of its own."""

    def __init__(
        self,
        *,
        lake: PostgresLake,
        store: ObjectStore,
        roles: RoleSettings,
        clock: Clock,
        encode: EncodeFile,
    ) -> None:
        self.owner = new_uuid()
        self.lake = lake
        self.metrics = MemoryMetrics()
        self.deaths: list[str] = []
        self.leases = LeaseManager(bus=lake.bus, metrics=self.metrics)
        shared: dict[str, Any] = {"settings": roles, "clock": clock, "metrics": self.metrics}
        role: dict[str, Any] = {**shared, "tracing": NO_TRACING, "on_fatal": self._on_fatal}
        self.publisher = SnapshotPublisher(catalog=lake.catalog, **role)
        self.stager = Stager(
            catalog=lake.catalog,
            store=store,
            encode=encode,
            intents=lake.upkeep,
            owner=self.owner,
            **shared,
        )
        self.coordinator = CommitCoordinator(
            instance=self.owner,
            leases=self.leases,
            bus=lake.bus,
            stager=self.stager,
            publisher=self.publisher,
            **role,
        )

    async def start(self) -> None:
        self.publisher.start()
        await self.coordinator.start()

    async def stop(self) -> None:
        await self.coordinator.stop()
        await self.publisher.stop()
        await self.leases.stop()
        await self.lake.close()

    def ended(self, outcome: str) -> float:
        """How many ranges have ended so."""

        return self.metrics.value("lakebus_ranges_ended_total", outcome=outcome)

    async def until_ended(self, outcome: str, *, times: int = 1, within_s: float = 30.0) -> None:
        """Waits until ranges have ended so; a counter tells nobody that it counted."""

        async with asyncio.timeout(within_s):
            while self.ended(outcome) < times:
                await asyncio.sleep(_LOOK_S)

    def _on_fatal(self, role: str, _error: BaseException) -> None:
        self.deaths.append(role)

    # --- by hand, without the keeper that renews -----------------------------------------------

    async def stage_one(self) -> tuple[Claim, Staged]:
        claim = await self.leases.acquire(self.owner)
        assert claim is not None, "nothing was claimable"
        return claim, await self.stager.stage(claim, await self.lake.bus.read(claim))

    def commit_of(self, claim: Claim, staged: Staged) -> Commit:
        return Commit(
            commit_id=new_uuid(),
            lease=claim.lease,
            files=staged.files,
            range_bytes=staged.range_bytes,
            owner=self.owner,
            quarantined=staged.quarantined,
        )


async def open_worker(
    settings: WorkerSettings,
    *,
    store: ObjectStore | None = None,
    clock: Clock | None = None,
    encode: EncodeFile = encode_data_file,
) -> Worker:
    store = store or LocalObjectStore(settings.root)
    if settings.put_s:
        store = FaultyStore(store, slow_puts, slow_s=settings.put_s)
    lake = await PostgresLake.open(settings.dsn, bus_settings=settings.bus, object_store=store)
    named = WRONG_CLOCKS[settings.clock]() if settings.clock else SystemClock()
    return Worker(lake=lake, store=store, roles=settings.roles, clock=clock or named, encode=encode)


def slow_puts(operation: Operation, key: str) -> StoreFault | None:
    """Of files and of canaries."""

    slow = operation is Operation.PUT and key.startswith(("tables/", "canary/"))
    return StoreFault.SLOW if slow else None


def busy_encoder(busy: Busy) -> EncodeFile:
    """The encoder, with a first file that takes long."""

    left = [busy]

    def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
        if schema.name != "canary" and left:
            _be_busy(left.pop())
        return encode_data_file(schema, rows)

    return encode


def _be_busy(busy: Busy) -> None:
    until_s = time.monotonic() + busy.seconds
    if busy.how == "held":
        ctypes.PyDLL(None).usleep(int(busy.seconds * 1e6))  # PyDLL: the lock is not given up
    elif busy.how == "released":
        time.sleep(busy.seconds)
    else:
        while time.monotonic() < until_s:
            pass
