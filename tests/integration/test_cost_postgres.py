"""What the bus and the catalog ask of PostgreSQL, counted: no seconds, so every machine agrees.

`COSTS` says what each call takes and how much it may take at most. The calls are made by the
product's own classes on a small lake, then again after it was given the rows of thousands of
commits: what a commit costs must not depend on how many came before it (goal P9). The plans that
sessions keep are made while the tables are small, and their statistics are not renewed, which is
the worst that a real lake meets.

Each figure is the least of a few calls, because autovacuum and page images after a checkpoint can
only add. A bound that fails prints the whole table as it is measured now.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import asyncpg
import asyncpg.connection
import pyarrow as pa
import pytest

from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, Claim, ClaimedSegment, KeyTaken, NewEntry
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit
from storage.files.objects import MemoryObjectStore
from storage.postgres import PostgresLake
from storage.postgres.pool import PoolSettings
from storage.postgres.rewind import GuardSettings
from storage.reading.barrier import Barrier
from storage.reading.manifest import Manifest
from storage.reading.resolve import Resolver
from storage.reading.watcher import HeadWatcher
from storage.rows.segment import EntryPart
from tests.conformance.harness import COLUMNS, entry_of
from tests.conformance.worker import fake_file
from tests.postgres_server import drop_database, fresh_database, run_elsewhere


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call. `trips`: statements that the client sent, each a transaction. `commits`: those
    that wrote, each an fsync. `rows`: rows and index entries of ours that were read."""

    trips: float
    commits: float
    rows: float
    wal_bytes: float


#: On a young lake, and later.
Costs = tuple[dict[str, Cost], dict[str, Cost]]
NAMES = tuple(field.name for field in dataclasses.fields(Cost))

#: As measured on 2026-11-23 with PostgreSQL 18.6.
COSTS = {
    #                          trips, commits, rows, wal_bytes
    "append 1 entry":      Cost(1, 1, 10, 7_688),
    "append 8 entries":    Cost(1, 1, 10, 46_304),
    "append 64 entries":   Cost(1, 1, 10, 208_912),
    "append a taken key":  Cost(2, 0, 16, 0),
    "claim":               Cost(1, 1, 28, 576),
    "claim nothing":       Cost(1, 0, 10, 0),
    "read":                Cost(1, 0, 16, 0),
    "renew":               Cost(1, 1, 8, 184),
    "publish":             Cost(1, 1, 14, 1_872),
    "head":                Cost(1, 0, 3, 0),
    "advance":             Cost(2, 0, 8, 0),
    "resolve":             Cost(2, 0, 3, 0),
    "resolve again":       Cost(1, 0, 3, 0),
    "batch":               Cost(1, 0, 6, 0),
    "shard status":        Cost(1, 0, 9, 0),
    "purge":               Cost(11, 0, 38, 0),
    "a lone write":        Cost(3, 3, 46, 10_128),
}  # fmt: skip
#: How many times as much may be: where rows lie in their pages, and the version of PostgreSQL, move
#: the last two a little.
AIR = Cost(trips=1.0, commits=1.0, rows=1.25, wal_bytes=1.25)
#: So many more commits may not change what a call costs by more than this factor.
COMMITS_BEFORE = 2_000
GROWTH_MAX = 1.05
REPEATS = 3

#: Nothing but the test talks.
_QUIET = GuardSettings(marker_s=3_600, check_s=3_600)
_COUNTERS = """
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS commits,
       (SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))
          FROM pg_stat_user_tables WHERE schemaname = 'lakebus')
       + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = 'lakebus') AS rows,
       pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS wal_bytes"""
#: What an idle session has counted is not seen by others before it hands it in.
_HAND_IN = "SELECT pg_stat_force_next_flush()"
#: Table, its newest row, and in what each further one differs.
_COPIES = (
    ("bus_log", "hi", "'lo', c.lo + g, 'hi', c.hi + g, 'segment_id', nextval('segment_number')"),
    ("published_range", "hi", "'lo', c.lo + g, 'hi', c.hi + g, 'snapshot_id', c.snapshot_id + g"),
    (
        "snapshot",
        "snapshot_id",
        "'snapshot_id', c.snapshot_id + g, 'publication_id', gen_random_uuid(),"
        " 'published_at', c.published_at + g * interval '1 microsecond'",
    ),
    (
        "data_file",
        "first_snapshot",
        "'first_snapshot', c.first_snapshot + g, 'file_id', gen_random_uuid()",
    ),
    ("idem_0", "segment_id", "'key_hash', '\\x' || md5(g::text)"),
)
_MOVES = (
    "UPDATE bus_shard SET next_append = next_append + $1",
    "UPDATE bus_claim SET next_claim = next_claim + $1",
    """UPDATE lake SET snapshot_id = snapshot_id + $1, publish_count = publish_count + $1,
              published_at = published_at + $1 * interval '1 microsecond',
              watermark = ARRAY[watermark[1] + $1]""",
)


Call = Callable[[], Awaitable[None]]


class Workload:
    """Calls of one process on a lake of one shard, and what the last one left for the next."""

    def __init__(self, lake: PostgresLake, table: TableSchema) -> None:
        self._lake = lake
        self._table = table
        self._numbers = itertools.count()
        self._chance = random.Random(9)
        self._owner = uuid.UUID(int=1)
        self._claims: list[Claim] = []
        self._commits: list[Commit] = []
        self._last: tuple[NewEntry, Accepted] | None = None
        watcher = HeadWatcher(lake.catalog)
        self._barrier = Barrier(
            catalog=lake.catalog, bus=lake.bus, watcher=watcher, codec=lake.codec
        )
        self._resolver = Resolver(catalog=lake.catalog, barrier=self._barrier)
        self._manifest = Manifest(lake.catalog)

    def calls(self) -> dict[str, Call]:
        """One round: what is appended is published by its end."""

        return {
            "append 1 entry": lambda: self.append(1),
            "append 8 entries": lambda: self.append(8),
            "append 64 entries": lambda: self.append(64),
            "append a taken key": self.append_again,
            "claim": self.claim,
            "claim nothing": self.claim_nothing,
            "read": self.read,
            "renew": self.renew,
            "publish": self.publish,
            "head": self.head,
            "advance": self.advance,
            "resolve": self.resolve,
            "resolve again": self.resolve,
            "batch": self.batch,
            "shard status": self.shard_status,
            "purge": self.purge,
            "a lone write": self.lone_write,
        }

    def entry(self) -> NewEntry:
        """A hundred rows that do not compress, as a request brings them."""

        number = next(self._numbers)
        text = [self._chance.randbytes(24).hex() for _ in range(100)]
        batch = pa.record_batch({"1": pa.array(range(100), pa.int64()), "2": pa.array(text)})
        entry = entry_of(self._table, key=f"k{number}", ordering_key="one")
        part = EntryPart(self._table.table_id, self._table.version, batch)
        return dataclasses.replace(entry, parts=(part,))

    async def append(self, entries: int) -> None:
        group = [self.entry() for _ in range(entries)]
        outcomes = await asyncio.gather(*(self._lake.bus.append(entry) for entry in group))
        for entry, outcome in zip(group, outcomes, strict=True):
            assert isinstance(outcome, Accepted)
            self._last = entry, outcome

    async def append_again(self) -> None:
        assert self._last is not None
        assert isinstance(await self._lake.bus.append(self._last[0]), KeyTaken)

    async def claim(self) -> None:
        claim = await self._lake.bus.claim(self._owner)
        assert claim is not None
        self._claims.append(claim)

    async def claim_nothing(self) -> None:
        assert await self._lake.bus.claim(self._owner) is None

    async def read(self) -> None:
        claim = self._claims[-1]
        self._propose(claim, await self._lake.bus.read(claim))

    def _propose(self, claim: Claim, segments: Sequence[ClaimedSegment]) -> None:
        files = tuple(
            fake_file(file_id, table_id, self._table.version, 100)
            for table_id, file_id in claim.file_ids.items()
        )
        size = sum(sum(segment.entry_bytes) for segment in segments)
        self._commits.append(Commit(new_uuid(), claim.lease, files, size, self._owner))

    async def renew(self) -> None:
        assert len(await self._lake.bus.renew([claim.lease for claim in self._claims])) > 0

    async def publish(self) -> None:
        commits, self._commits, self._claims = self._commits, [], []
        published = await self._lake.catalog.publish(new_uuid(), commits)
        assert set(published.outcomes.values()) == {"published"}

    async def lone_write(self) -> None:
        """From the door to a snapshot; a coordinator that hears of nothing more asks no more."""

        await self.append(1)
        await self.claim()
        claim = self._claims[-1]
        assert claim.brought is not None
        assert not claim.more
        self._propose(claim, [claim.brought])
        await self.publish()

    async def head(self) -> None:
        await self._lake.catalog.head()

    async def advance(self) -> None:
        """What a process that reads does when it hears of a publication."""

        await self._manifest.at((head := await self._lake.catalog.head()).snapshot_id, head)

    async def resolve(self) -> None:
        """Which snapshot a query with the newest receipt reads, and what it consists of."""

        assert self._last is not None
        token = self._last[1].receipt.visibility_token
        found = await self._resolver.resolve(tokens=[token], deadline_s=time.monotonic() + 30)
        await self._manifest.at(found.snapshot_id, found.head)

    async def batch(self) -> None:
        assert self._last is not None
        assert await self._lake.bus.batch(self._last[1].receipt.batch_id) is not None

    async def shard_status(self) -> None:
        (status,) = await self._lake.bus.shard_status()
        assert status.backlog_entries == 0

    async def purge(self) -> None:
        await self._lake.bus.purge()

    async def close(self) -> None:
        await self._manifest.close()
        await self._barrier.close()


class Meter:
    """Counts what calls do: trips at the connections, the rest by the server's own counters."""

    def __init__(self, lake: PostgresLake, observer: asyncpg.Connection[asyncpg.Record]) -> None:
        self._lake = lake
        self._observer = observer
        self._trips = 0
        self._last: list[float] = []

    async def start(self) -> None:
        for pool in self._lake.pools:
            async with pool.connection() as connection:
                connection.add_query_logger(self._sent)
        await self._step()

    def _sent(self, query: asyncpg.connection.LoggedQuery) -> None:
        self._trips += query.query != _HAND_IN

    async def cost(self, call: Call) -> Cost:
        """Of the call, if nothing else was done since the last one."""

        await call()
        return Cost(*await self._step())

    async def _step(self) -> list[float]:
        for pool in self._lake.pools:
            async with pool.connection() as connection:
                await connection.execute(_HAND_IN)
        found = await self._observer.fetchrow(_COUNTERS)
        assert found is not None
        now = [float(self._trips), *map(float, found)]
        step = [new - old for new, old in zip(now, self._last or now, strict=True)]
        self._last = now
        return step

    async def add_history(self, commits: int) -> None:
        """Gives the lake the rows of so many commits before the next one, all published."""

        async with self._observer.transaction():
            for table, newest, differs in _COPIES:
                await self._observer.execute(
                    f"INSERT INTO {table} SELECT n.*"
                    f"  FROM (SELECT t AS c, t.* FROM {table} t ORDER BY {newest} DESC LIMIT 1) c,"
                    f"  generate_series(1, $1) g,"
                    f"  jsonb_populate_record(c.c, jsonb_build_object({differs})) n",
                    commits,
                )
            for statement in _MOVES:
                await self._observer.execute(statement, commits)
        await self._step()


async def measured(meter: Meter, work: Workload) -> dict[str, Cost]:
    """The least of a few calls of each kind."""

    found: dict[str, list[Cost]] = {}
    for _ in range(REPEATS):
        for name, call in work.calls().items():
            found.setdefault(name, []).append(await meter.cost(call))
    return {
        name: Cost(*(min(getattr(cost, field) for cost in costs) for field in NAMES))
        for name, costs in found.items()
    }


async def measure(dsn: str) -> Costs:
    """On a small lake whose statistics are of now, in a process that has its plans; and later."""

    await upgrade(dsn)
    lake = await PostgresLake.open(
        dsn,
        bus_settings=BusSettings(shards=1),
        object_store=MemoryObjectStore(),
        pool_settings=PoolSettings(size_max=1),
        guard_settings=_QUIET,
    )
    observer = await asyncpg.connect(dsn, server_settings={"search_path": "lakebus"})
    try:
        table = (await lake.catalog.create_table(name="t", columns=COLUMNS)).schema
        work = Workload(lake, table)
        await round_of(work)
        for (name,) in await observer.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'lakebus'"
        ):
            await observer.execute(f"ANALYZE {name}")
        await round_of(work)
        meter = Meter(lake, observer)
        await meter.start()
        first = await measured(meter, work)
        await meter.add_history(COMMITS_BEFORE)
        then = await measured(meter, work)
        await work.close()
    finally:
        await lake.close()
        await observer.close()
    return first, then


@pytest.fixture(scope="module")
def costs(postgres_dsn: str) -> Iterator[Costs]:
    """Of each call on a young lake, and after thousands of commits."""

    dsn = fresh_database(postgres_dsn)
    try:
        yield run_elsewhere(lambda: measure(dsn))
    finally:
        drop_database(dsn)


async def round_of(work: Workload) -> None:
    for call in work.calls().values():
        await call()


def table_of(costs: dict[str, Cost]) -> str:
    """The measured costs, as the lines of `COSTS` have them."""

    return "\n".join(
        f"    {json.dumps(name) + ':':23}Cost("
        + ", ".join(f"{getattr(cost, field):_.0f}" for field in NAMES)
        + "),"
        for name, cost in costs.items()
    )


def test_P26_a_call_asks_no_more_of_the_database_than_it_did(costs: Costs) -> None:
    found, _ = costs
    over = []
    for name, cost in found.items():
        for field in NAMES:
            most = getattr(COSTS[name], field) * getattr(AIR, field)
            if getattr(cost, field) > most:
                over.append(f"{name}: {field} {getattr(cost, field):,.0f}, at most {most:,.0f}")
    assert not over, "\n".join([*over, "", "measured now:", table_of(found)])


def test_P9_a_call_costs_the_same_after_thousands_of_commits(costs: Costs) -> None:
    first, then = costs
    over = [
        f"{name}: {field} {getattr(first[name], field):,.0f}, then {getattr(cost, field):,.0f}"
        for name, cost in then.items()
        for field in NAMES
        if getattr(cost, field) > GROWTH_MAX * getattr(first[name], field)
    ]
    assert not over, "\n".join(
        [*over, "", "first:", table_of(first), f"after {COMMITS_BEFORE:,}:", table_of(then)]
    )
