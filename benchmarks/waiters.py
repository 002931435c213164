"""P17 and P18: the wait for a token, against a real PostgreSQL.

P17: the wait phase of a token that is visible already. P18: 1,000 waiters in one process, from the
return of COMMIT (in another thread with connections of its own, on the same clock) to the last
waiter's wake-up; measured at the watcher, as the goal says, and at the barrier, which adds the
question whether one's own entry was quarantined.

`python -m benchmarks.waiters [--dsn an-empty-database]`; without a DSN a server is made and
removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import uvloop

from benchmarks.machine import describe
from benchmarks.measures import percentile
from benchmarks.own_postgres import own_postgres
from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.schemas import Column, TableSchema
from lakebus.tokens import VisibilityToken
from storage.bus.interface import Accepted, NewEntry
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit
from storage.postgres import PostgresLake
from storage.reading.barrier import Barrier
from storage.reading.postgres_listener import PostgresHeadListener
from storage.reading.watcher import HeadWatcher
from storage.rows.segment import EntryPart

SETTINGS = BusSettings(shards=4, claim_entries_max=4_096)
WAIT_S = 60.0


class Publisher:
    """Publishes from a thread of its own; says when COMMIT had returned."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="publisher")
        self._thread.start()
        self._lake: PostgresLake = self._call(PostgresLake.open(dsn, bus_settings=SETTINGS))

    async def publish_everything(self) -> float:
        """Everything on the bus in one transaction; the time of its return."""

        work = asyncio.run_coroutine_threadsafe(self._publish(), self._loop)
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        self._call(self._lake.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _publish(self) -> float:
        owner, commits = new_uuid(), []
        while (claim := await self._lake.bus.claim(owner)) is not None:
            size = sum(
                s for segment in await self._lake.bus.read(claim) for s in segment.entry_bytes
            )
            commits.append(Commit(new_uuid(), claim.lease, (), size, owner))
        await self._lake.catalog.publish(new_uuid(), commits)
        return time.perf_counter()


async def measure(dsn: str, *, waiters: int, rounds: int) -> dict[str, object]:
    await upgrade(dsn)
    lake = await PostgresLake.open(dsn, bus_settings=SETTINGS)
    listener = PostgresHeadListener(dsn)
    watcher = HeadWatcher(lake.catalog, listen=listener.wake_ups)
    barrier = Barrier(catalog=lake.catalog, bus=lake.bus, watcher=watcher, codec=lake.codec)
    watcher.start()
    publisher = Publisher(dsn)
    try:
        change = await lake.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
        at_watcher, at_barrier = [], []
        for _ in range(rounds):
            tokens = await _append(lake, change.schema, waiters)
            at_watcher.append(await _round(publisher, watcher, barrier, tokens, whole=False))
            tokens = await _append(lake, change.schema, waiters)
            at_barrier.append(await _round(publisher, watcher, barrier, tokens, whole=True))
        schema = change.schema
        return {
            "P17 covered token, one caller, ms": await _covered(barrier, tokens[0], 1),
            "P17 covered token, first time, ms": await _first_time(
                barrier, lake, publisher, schema
            ),
            "P17 covered token, 16 callers, ms": await _covered(barrier, tokens[1], 16),
            f"P18 {waiters} waiters, last wake-up at the watcher, ms": _summary(at_watcher),
            f"P18 {waiters} waiters, last answer of the barrier, ms": _summary(at_barrier),
        }
    finally:
        publisher.close()
        await watcher.stop()
        await barrier.close()
        await lake.close()


async def _append(lake: PostgresLake, schema: TableSchema, count: int) -> list[str]:
    batch = pa.record_batch({"1": pa.array([1], pa.int64())})

    def entry(n: int) -> NewEntry:
        identity = hashlib.sha256(str(n).encode()).digest()
        parts = (EntryPart(schema.table_id, schema.version, batch),)
        return NewEntry(1, "t", parts, identity, ordering_key=str(n % 64))

    outcomes = await asyncio.gather(*(lake.bus.append(entry(n)) for n in range(count)))
    return [o.receipt.visibility_token for o in outcomes if isinstance(o, Accepted)]


async def _round(
    publisher: Publisher,
    watcher: HeadWatcher,
    barrier: Barrier,
    tokens: Sequence[str],
    *,
    whole: bool,
) -> float:
    decoded = barrier.decode(tokens)

    async def wait(text: str, token: VisibilityToken) -> float:
        deadline_s = time.monotonic() + WAIT_S
        if whole:
            await barrier.wait_for([text], deadline_s=deadline_s)
        else:
            await watcher.wait_until_covered(token, deadline_s=deadline_s)
        return time.perf_counter()

    waits = [asyncio.create_task(wait(*pair)) for pair in zip(tokens, decoded, strict=True)]
    while watcher.waiting < len(tokens):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    committed = await publisher.publish_everything()
    return (max(await asyncio.gather(*waits)) - committed) * 1000


async def _covered(barrier: Barrier, token: str, callers: int) -> dict[str, float]:
    waited: list[float] = []

    async def ask() -> None:
        for _ in range(2_000 // callers):
            covered = await barrier.wait_for([token], deadline_s=time.monotonic() + WAIT_S)
            waited.append(covered.waited_ms)

    await asyncio.gather(*(ask() for _ in range(callers)))
    return _summary(waited)


async def _first_time(
    barrier: Barrier, lake: PostgresLake, publisher: Publisher, schema: TableSchema
) -> dict[str, float]:
    tokens = await _append(lake, schema, 500)
    await publisher.publish_everything()
    waited = []
    for token in tokens:
        covered = await barrier.wait_for([token], deadline_s=time.monotonic() + WAIT_S)
        waited.append(covered.waited_ms)
    return _summary(waited)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {f"p{round(100 * q)}": percentile(values, q) for q in (0.5, 0.9, 0.99)} | {
        "max": round(max(values), 3)
    }


@contextlib.contextmanager
def _server(dsn: str | None) -> Iterator[str]:
    if dsn is not None:
        yield dsn
        return
    with own_postgres() as own:
        yield own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dsn")
    parser.add_argument("--waiters", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    machine = describe()
    with _server(arguments.dsn) as dsn:
        gc.freeze()
        found = uvloop.run(measure(dsn, waiters=arguments.waiters, rounds=arguments.rounds))
    print(json.dumps({"machine": machine, **found}, indent=2))


if __name__ == "__main__":
    main()
