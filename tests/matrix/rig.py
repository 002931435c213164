"""The lake of the matrix: a real PostgreSQL whose functions hold failpoints, and its ledger.

A `MatrixLake` is the suite's PostgreSQL harness that also remembers every entry a client got a
receipt for. `audit` compares what was promised with what the database holds. Leases are long and
made to expire by the test, so that no row depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import pytest

from actors.publisher import SnapshotPublisher
from actors.settings import RoleSettings
from lakebus.clock import SystemClock
from lakebus.errors import Unavailable
from lakebus.schemas import TableSchema
from lakebus.telemetry import NO_TRACING, MemoryMetrics
from storage.bus.interface import Accepted, AppendOutcome, Claim, KeyTaken, NewEntry
from storage.bus.receipting import parse_batch_id
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit
from tests.conformance.harness import SUITE_SETTINGS, LakeView, entry_of
from tests.conformance.postgres import PostgresHarness
from tests.conformance.worker import Worker
from tests.failpoints.sql import SqlFailpoints, SqlTerminate
from tests.matrix.auditor import (
    Books,
    check_books,
    check_drained,
    difference,
    read_books,
    read_everything,
)
from tests.postgres_server import copy_database, drop_database

MATRIX_SETTINGS = dataclasses.replace(SUITE_SETTINGS, lease_ttl_ms=60_000, retry_backoff_ms=0)
ROLE_SETTINGS = RoleSettings(linger_ms=0, backoff_ms=1, backoff_ms_max=4, publish_attempts=4)
Outcome = AppendOutcome | BaseException


class MatrixLake(PostgresHarness):
    """`sql` arms failpoints in this lake's functions; `promised` is what clients were told."""

    def __init__(self, settings: BusSettings, dsn: str) -> None:
        super().__init__(settings, dsn)
        self.sql = SqlFailpoints(dsn)
        self.promised: list[tuple[NewEntry, Accepted]] = []

    async def accept(self, entry: NewEntry) -> Accepted:
        accepted = await super().accept(entry)
        self.promised.append((entry, accepted))
        return accepted

    async def offer(
        self, entries: Iterable[NewEntry], view: LakeView | None = None
    ) -> list[Outcome]:
        """All at once, as one group (as far as its limits go); receipts are remembered."""
        bus = self.bus if view is None else view.bus
        given = list(entries)
        outcomes = await asyncio.gather(
            *(bus.append(entry) for entry in given), return_exceptions=True
        )
        for entry, outcome in zip(given, outcomes, strict=True):
            if isinstance(outcome, Accepted):
                self.promised.append((entry, outcome))
        return outcomes

    async def offer_again(self, entries: Iterable[NewEntry]) -> None:
        """Entries that are on the bus already, unheard of: each is answered with its receipt."""
        given = list(entries)
        for entry, outcome in zip(given, await self.offer(given), strict=True):
            assert isinstance(outcome, KeyTaken), repr(outcome)
            parsed = parse_batch_id(outcome.record.receipt.batch_id)
            assert parsed is not None
            self.promised.append((entry, Accepted(outcome.record.receipt, parsed[1], parsed[2])))

    async def expire_leases(self) -> None:
        """Every lease is over now, by the database's clock."""
        observer = await self._observing()
        await observer.execute(
            "UPDATE lakebus.bus_lease SET expires_at = clock_timestamp() WHERE state = 'leased'"
        )

    async def execute(self, statement: str, *arguments: object) -> None:
        """As an operator would at the database's prompt."""
        await (await self._observing()).execute(statement, *arguments)

    async def value(self, statement: str, *arguments: object) -> Any:
        return await (await self._observing()).fetchval(statement, *arguments)

    async def everything(self) -> dict[str, list[str]]:
        return await read_everything(self.dsn)

    async def unchanged_since(self, before: dict[str, list[str]]) -> None:
        changed = difference(before, await self.everything())
        assert not changed, f"these tables are not as they were: {', '.join(changed)}"

    async def staged(self, worker: Worker) -> list[Commit]:
        """Commits of all that is claimable now."""
        commits = []
        while (claim := await worker.bus.claim(worker.owner)) is not None:
            commits.append(await worker.stage(claim))
        return commits

    async def audit(
        self, *, others: int = 0, drained: bool = True, keys: bool = True, purged: bool = False
    ) -> Books:
        """Everything that must hold. `others` are entries that are on the bus although nobody
        holds a receipt for them (a reply was lost); `drained` asks that nothing waits; `keys`
        asks the bus for each key, which takes a while where there are many. `purged` says that
        the window of terminal entries is over, so that the log and the keys may have let go of
        them: of them, and of nothing else."""
        books = await read_books(self.dsn)
        check_books(books, self.files.contents)
        if drained:
            check_drained(books)
        entries, terminal = books.entries(), books.terminal()
        places = {(a.shard, a.position) for _, a in self.promised}
        assert len(places) == len(self.promised), "two receipts name one place"
        lost = places - set(entries) - (set(terminal) if purged else set())
        assert not lost, f"acknowledged and lost: {lost}"
        unasked = set(entries) - places
        assert len(unasked) == others, f"an entry that nobody sent, or sent once: {unasked}"
        for entry, accepted in self.promised:
            place = (accepted.shard, accepted.position)
            if place in entries:
                row, n = entries[place]
                kept = (row["principals"][n], row["targets"][n], row["row_counts"][n])
                assert kept == (entry.principal_id, entry.target, entry.rows)
            if keys and not (purged and place in terminal):
                await self._key_answers(entry, accepted)
        return books

    async def _key_answers(self, entry: NewEntry, accepted: Accepted) -> None:
        if entry.idempotency_key is None:
            return
        record = await self.bus.find_key(entry.principal_id, entry.target, entry.idempotency_key)
        assert record is not None, "a key was forgotten"
        assert record.receipt == accepted.receipt
        assert record.fingerprint == entry.fingerprint

    async def replays(self) -> None:
        """Every acknowledged entry with a key, sent again, gets its receipt and nothing else."""
        keyed = [(e, a) for e, a in self.promised if e.idempotency_key is not None]
        assert keyed
        for entry, accepted in keyed:
            outcome = await self.bus.append(entry)
            assert isinstance(outcome, KeyTaken), outcome
            assert outcome.record.receipt == accepted.receipt

    def publisher(self, view: LakeView | None = None) -> SnapshotPublisher:
        """The product's publisher over this lake; a test calls its `run_once`."""
        return SnapshotPublisher(
            catalog=self.catalog if view is None else view.catalog,
            settings=ROLE_SETTINGS,
            clock=SystemClock(),
            metrics=MemoryMetrics(),
            tracing=NO_TRACING,
            on_fatal=_no_end,
        )


def _no_end(role: str, error: BaseException) -> None:
    raise AssertionError(f"{role} wanted to end its process") from error


class MatrixBackend:
    """Copies a database that was upgraded and given failpoints once."""

    def __init__(self, template: str) -> None:
        self.template = template

    @asynccontextmanager
    async def open(self, settings: BusSettings) -> AsyncIterator[MatrixLake]:
        dsn = await copy_database(self.template)
        try:
            lake = MatrixLake(settings, dsn)
            await lake.start()
            try:
                async with lake.sql:
                    yield lake
            finally:
                await lake.stop()
        finally:
            await asyncio.to_thread(drop_database, dsn)


def keyed_entries(
    table: TableSchema, ids: Sequence[int], *, ordering_key: str = "one"
) -> list[NewEntry]:
    """One entry of one row for each id, each under a key of its own."""
    return [entry_of(table, [n], key=f"key-{n}", ordering_key=ordering_key) for n in ids]


async def reclaimed(lake: MatrixLake, worker: Worker) -> list[Claim]:
    """All leases expire and `worker` takes what it can get."""
    await lake.expire_leases()
    claims = []
    while (claim := await worker.bus.claim(worker.owner)) is not None:
        claims.append(claim)
    return claims


@contextmanager
def named(turn: str) -> Iterator[None]:
    """A failure inside says in which turn of a loop it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the turn of {turn}")
        raise


async def locks_waited_for(dsn: str) -> int:
    """How many sessions of this database wait for a lock now."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(
            await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )
    finally:
        connection.terminate()


async def killed_at_each(
    lake: MatrixLake,
    places: Sequence[str],
    call: Callable[[], Awaitable[object]],
    error: type[Exception] = Unavailable,
) -> None:
    """A call whose session ends at each of its statements changes nothing; then it changes
    something."""
    assert places
    for place in places:
        with named(place):
            before = await lake.everything()
            await lake.sql.arm(place, SqlTerminate())
            with pytest.raises(error):
                await call()
            await lake.unchanged_since(before)
            await lake.sql.disarm(place)
    before = await lake.everything()
    await call()
    assert await lake.everything() != before
