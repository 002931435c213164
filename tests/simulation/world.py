"""One run: a lake, its processes, clients and faults, from the seed to the verdict.

What is real: roles, door, barrier, watcher, resolver, manifest, the in-memory bus and catalog, and
the way of rows through segments and `encode_range`. What is simulated: time, network, processes,
Parquet, HTTP, the query engine, and Ray. Not simulated: torn disks of the database (its commits
are one step and durable), deadlocks inside it, restore and rewind, and the collector.

A run has three parts. First clients and faults run beside each other. Then the faults end, and what
was accepted must become terminal within `DRAIN_S`. Then everything is read once more, the roles are
told to stop, and must leave no task behind.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from actors.roles import Role
from actors.settings import RoleSettings
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile, Snapshot
from storage.bus.settings import BusSettings
from storage.files.parquet import EncodedFile
from storage.memory_lake import MemoryLake
from tests.history.recorder import Recorder
from tests.simulation.chance import SeededChance, stream
from tests.simulation.clients import Client, Shared
from tests.simulation.clock import SimulatedClock
from tests.simulation.database import Database
from tests.simulation.event_loop import SimulatedLoop, place_of
from tests.simulation.faults import Faults, roles_of
from tests.simulation.network import Endpoint, Network, Weather
from tests.simulation.replicas import Replica
from tests.simulation.roles import RoleProcess
from tests.simulation.store import Objects, encode_rows

#: After the last fault, everything accepted is terminal within this virtual time: 10 x ttl for an
#: entry that kills its worker (B8), restarts, and what clients still send.
DRAIN_S = 30.0
_STEPS_MAX = 400_000

ROLE_SETTINGS = RoleSettings(
    claim_poll_ms=500,
    linger_ms=20,
    linger_ms_load=0,  # what processor time makes of it would differ in each run of a seed
    backoff_ms=20,
    backoff_ms_max=400,
    publish_attempts=4,
    hold_s_min=3.0,
    supervisor_tick_ms=1_000,
    purge_every_s=1.0,
    stop_s_max=3.0,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the seed chose; `describe` tells people."""

    placement: str
    coordinators: int
    replicas: int
    clients: int
    operations: int
    think_s: float
    fault_every_s: float
    weather: Weather
    poison: float
    shards: int
    claim_entries_max: int

    @staticmethod
    def of(source: random.Random) -> Plan:
        draw = source.random
        rough = source.choice((0.0, 0.3, 1.0, 1.0))
        return Plan(
            placement=source.choice(("together", "spread", "spread")),
            coordinators=source.randint(1, 3),
            replicas=source.randint(1, 3),
            clients=source.randint(1, 4),
            operations=source.randint(3, 9),
            think_s=source.choice((0.02, 0.1, 0.3)),
            fault_every_s=source.choice((0.1, 0.3, 1.0)),
            weather=Weather(
                lost=rough * draw() * 0.15,
                twice=rough * draw() * 0.2,
                slow=rough * draw() * 0.3,
                slow_s=source.choice((0.05, 0.5, 2.0)),
            ),
            poison=source.choice((0.0, 0.0, 0.15)),
            shards=source.randint(1, 3),
            claim_entries_max=source.choice((2, 4, 100)),
        )

    def describe(self) -> str:
        return (
            f"{self.placement}, {self.coordinators} coordinators, {self.replicas} replicas, "
            f"{self.clients} clients x {self.operations}, {self.shards} shards, a fault every "
            f"{self.fault_every_s} s, {self.weather}"
        )


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.plan = Plan.of(stream(seed, "plan"))
        self.loop = SimulatedLoop(steps_max=_STEPS_MAX)
        self.chance = SeededChance(stream(seed, "product"))
        self._poison = stream(seed, "poison")
        self._clocks = stream(seed, "clocks")
        threads = stream(seed, "threads")
        self.loop.thread_s = lambda: threads.expovariate(200.0)
        self.network = Network(self.loop, stream(seed, "network"))
        self.network.weather = self.plan.weather
        self.recorder = Recorder.in_memory(
            process=f"s{seed}", now_ns=lambda: round(self.loop.time() * 1e9), seed=seed
        )
        bus_settings = BusSettings(
            shards=self.plan.shards,
            lease_ttl_ms=800,
            claim_entries_max=self.plan.claim_entries_max,
            quarantine_attempts=2,
            segment_ring_rotate_bytes=1,
        )
        self.ttl_s = bus_settings.lease_ttl_ms / 1e3
        self.role_settings = ROLE_SETTINGS
        self.database_clock = SimulatedClock(self.loop)
        self.lake = MemoryLake(
            settings=bus_settings,
            clock=self.database_clock,
            seed=stream(seed, "lake").getrandbits(64),
        )
        self.database = Database(self.loop, self.network, self.lake)
        self.objects = Objects()
        self.store_endpoint = Endpoint(self.loop, self.loop.new_process("object store"))
        self.shared = Shared()
        self.outcomes: Counter[str] = Counter()
        self._verdicts: set[int] = set()
        self._deadly: set[int] = set()
        self._role_sets = roles_of(self.plan.placement, self.plan.coordinators)
        self.roles: dict[str, RoleProcess] = {}
        self.twins: list[RoleProcess] = []
        self.directory: dict[Role, RoleProcess] = {}
        self.replicas: dict[str, Replica] = {}
        self.faults = Faults(self, stream(seed, "faults"))
        self.problems: list[str] = []
        self._newest = self.lake.head
        self.lake.watch_head(self._published)

    # --- processes ----------------------------------------------------------------------------

    def start_role(self, name: str) -> None:
        host = RoleProcess(self, name, self._role_sets[name])
        self.roles[name] = host
        for role in host.roles:
            self.directory[role] = host
        host.start()

    def start_replica(self, name: str) -> None:
        self.replicas[name] = replica = Replica(self, name)
        replica.start()

    def hosts(self) -> list[RoleProcess | Replica]:
        """Every process with roles or a replica that was started and may live."""

        return [*self.roles.values(), *self.twins, *self.replicas.values()]

    def some_replica(self, source: random.Random) -> Replica:
        return source.choice(list(self.replicas.values()))

    def new_clock(self) -> SimulatedClock:
        return SimulatedClock(
            self.loop,
            zero_s=self._clocks.random() * 1e5,
            wrong_s=self._clocks.uniform(-3_600, 3_600),
        )

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    # --- messages without an answer -----------------------------------------------------------

    def hint(self) -> None:
        for host in self.roles.values():
            if host.coordinator is not None:
                self.network.cast(host.process, host.wake)

    def _published(self, snapshot: Snapshot) -> None:
        """Looks at each snapshot at the moment of its publication, and tells the replicas."""

        before, self._newest = self._newest, snapshot
        if snapshot.published_at <= before.published_at:
            self.problems.append(f"C4: snapshot {snapshot.snapshot_id} is not later than the last")
        if any(mark < before.watermark[shard] for shard, mark in snapshot.watermark.items()):
            self.problems.append(f"C3: snapshot {snapshot.snapshot_id} has a lower watermark")
        for row in self.lake.state.files.values():
            if row.first_snapshot == snapshot.snapshot_id and not self.has_object(row.file):
                self.problems.append(f"C6: {row.file.object_key} was published and is not there")
        for replica in self.replicas.values():
            self.network.cast(replica.process, replica.notify)

    def has_object(self, file: DataFile) -> bool:
        return self.objects.has(file.object_key)

    def note(self, text: str) -> None:
        self.recorder.note(text)

    # --- poison -------------------------------------------------------------------------------

    def maybe_poison(self, request: int) -> None:
        """Some entries cannot be encoded, some kill whoever tries."""

        if self._poison.random() < self.plan.poison:
            self._poison.choice((self._verdicts, self._deadly)).add(request)

    def encode_for(self, host: RoleProcess) -> Callable[[TableSchema, pa.Table], EncodedFile]:
        def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
            if schema.table_id and (self._verdicts or self._deadly):
                requests = set(rows.column("1").to_pylist())
                if requests & self._deadly:
                    self.faults.died_of_poison(host.process)
                if requests & self._verdicts:
                    raise ValueError("the rows cannot be encoded")
            return encode_rows(schema, rows)

        return encode

    def owner_of(self, batch_id: str) -> int:
        _, shard, position = batch_id.split("-")
        return self.lake.state.shards[int(shard)].log[int(position)].principal_id

    # --- the run ------------------------------------------------------------------------------

    async def live(self) -> list[str]:
        """All three parts. Returns what did not hold, apart from the history."""

        for name in self._role_sets:
            self.start_role(name)
        for number in range(self.plan.replicas):
            self.start_replica(f"replica {number}")
        clients = [
            Client(self, number, stream(self.seed, f"client {number}"))
            for number in range(self.plan.clients)
        ]
        self.shared.tables_made = 2
        for name in ("t1", "t2"):
            await clients[0].create(name)
        nemesis = self.loop.spawn(self.loop.world, self.faults.run(), name="faults")
        work = [
            self.loop.spawn(client.process, client.run(self.plan.operations), name=client.name)
            for client in clients
        ]
        await asyncio.wait(work)
        self.faults.heal()
        nemesis.cancel()
        self.note("the faults are over")
        for task in work:
            task.result()
        problems = await self._drain()
        if not problems:
            problems += await self._look_at_everything(clients[0])
        return self.problems + problems + await self._stop()

    async def _look_at_everything(self, client: Client) -> list[str]:
        """The last read of each table. What a read joins may have been lost before the faults
        ended, and is noticed by timeouts only; after that every read must end well."""

        for _ in range(20):
            failed = [error for error in await client.read_everything() if error is not None]
            failed = [error for error in failed if error.code != "table_not_found"]
            if not failed:
                return []
            await asyncio.sleep(0.5)
        return [f"the last read failed on a healthy lake: {failed!r}"]

    async def _drain(self) -> list[str]:
        until_s = self.loop.time() + DRAIN_S
        while self.loop.time() < until_s:
            if self.is_drained():
                return []
            await asyncio.sleep(0.05)
        return [f"not drained {DRAIN_S} s after the last fault: {self._left()}"]

    def is_drained(self) -> bool:
        """Everything is terminal, no range is left that somebody could claim, no drop is open."""

        is_terminal = self.lake.watermark() == self.lake.ends()
        return is_terminal and not self.lake.state.ranges and not self._closing()

    def _closing(self) -> list[str]:
        tables = self.lake.state.tables.values()
        return [table.name for table in tables if table.live and table.ticket is not None]

    def _left(self) -> str:
        ranges = list(self.lake.state.ranges.values())
        return (
            f"watermark {self.lake.watermark()}, ends {self.lake.ends()}, ranges {ranges}, "
            f"drops begun {self._closing()}\n{self.loop.who_waits()}"
        )

    async def _stop(self) -> list[str]:
        """The polite end of every process; whatever still runs then is a leak."""

        living = [host for host in self.hosts() if host.process.alive]
        ends = [
            self.loop.spawn(host.process, host.stop(), name=f"stop {host.name}") for host in living
        ]
        await asyncio.wait(ends, timeout=20.0)
        await asyncio.sleep(10.0)  # calls under way end by their own timeouts
        problems = []
        for host, end in zip(living, ends, strict=True):
            if not host.process.alive:  # it gave itself up meanwhile
                continue
            if end.done() and end.exception() is not None:
                problems.append(f"the stop of {host.name} failed: {end.exception()!r}")
            for task in host.process.tasks:
                if not task.done():
                    problems.append(f"{host.name} left a task behind: {place_of(task)}")
        return problems
