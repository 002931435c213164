"""M20: PostgreSQL is killed while an append or a publication commits.

A server of its own, durable as in production, is killed with all its processes (SIGKILL) at seeded
moments around a commit, again and again, and recovers from its write-ahead log. Whatever was under
way happened whole or not at all, and whatever had been answered is there.
`LAKEBUS_MATRIX_CRASHES` asks for more than the few of the usual suite, `LAKEBUS_MATRIX_SEED` for
others.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from cluster import processes
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.errors import LakebusError, OutcomeUnknown, RetryLater
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, KeyTaken, NewEntry
from storage.catalog.interface import Commit
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.faults.proxy import Act, Rule
from tests.matrix.connection_rig import FaultyLake, own_server

_CRASHES = int(os.environ.get("LAKEBUS_MATRIX_CRASHES", "3"))
_SEED = int(os.environ.get("LAKEBUS_MATRIX_SEED", "20"))
_HANG_S = 30.0


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedPostgres]:
    made = own_server()
    await made.start()
    yield made
    await made.stop()


def kill_everything(server: EmbeddedPostgres) -> None:
    """The postmaster first, so that it starts nothing anew; then whatever works in its folder."""

    os.kill(server.pid, signal.SIGKILL)
    for mark in processes.working_in(server.cluster_dir):
        if mark.alive():
            os.kill(mark.pid, signal.SIGKILL)


@dataclass(slots=True)
class Life:
    """What clients did between two crashes, and what they do not know."""

    unknown: list[NewEntry] = field(default_factory=list)
    publications: dict[uuid.UUID, Commit] = field(default_factory=dict)


async def write(lake: FaultyLake, table: TableSchema, life: Life, name: str) -> None:
    """Appends under keys until the server has gone."""

    n = 0
    while True:
        entry = entry_of(table, [n, n + 1], key=f"{name}-{n}", ordering_key=name)
        try:
            await lake.accept(entry)
        except OutcomeUnknown:
            life.unknown.append(entry)
            return
        except RetryLater:
            return
        n += 1


async def publish(lake: FaultyLake, life: Life) -> None:
    """Claims and publishes until the server has gone."""

    worker = lake.worker()
    while True:
        try:
            claim = await lake.bus.claim(worker.owner)
            if claim is None:
                await asyncio.sleep(0.001)
                continue
            commit = await worker.stage(claim)
        except RetryLater:
            return
        publication_id = new_uuid()
        life.publications[publication_id] = commit
        try:
            await lake.catalog.publish(publication_id, [commit])
        except LakebusError:
            return


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["append_group(", "FROM publish("])
async def test_M20_a_crash_during_a_commit_is_all_or_nothing(
    server: EmbeddedPostgres, statement: str
) -> None:
    dice = random.Random(f"{_SEED}/{statement}")
    await upgrade(server.dsn)
    lake = FaultyLake(SUITE_SETTINGS, server.dsn)
    await lake.start()
    table = await lake.create()
    happened = {"append": [0, 0], "publish": [0, 0]}
    for crash in range(_CRASHES):
        life = Life()
        wired = await lake.wired()
        working = FaultyLake(SUITE_SETTINGS, wired.proxy.dsn(server.dsn))
        working.files, working.acknowledged = lake.files, lake.acknowledged
        await working.start()
        # The n-th such statement passes, and a moment later there is no server any more.
        passing = wired.proxy.arm(
            Rule(act=Act.DELAY, delay_s=1e-9, sql=statement, skip=dice.randrange(3, 12))
        )
        writers = [write(working, table, life, f"{crash}-{n}") for n in range(3)]
        clients = [asyncio.create_task(work) for work in (*writers, publish(working, life))]
        await asyncio.wait_for(passing.struck(), _HANG_S)
        await asyncio.sleep(dice.random() * 0.006)
        kill_everything(server)
        await asyncio.wait_for(asyncio.gather(*clients), _HANG_S)
        await working.stop()
        await lake.stop()
        await server.stop()
        await server.start()
        lake = _opened_again(lake, server)
        await lake.start()
        await settle_appends(lake, life, happened["append"])
        await settle_publications(lake, life, happened["publish"])
        await lake.audited(drained=False)
        # Half of the time the next crash comes with work left over.
        if dice.random() < 0.5:
            await lake.audited()
    await lake.audited()
    print(f"M20 {statement} under way at the crash [not there, there]: {happened}")
    await lake.stop()


def _opened_again(before: FaultyLake, server: EmbeddedPostgres) -> FaultyLake:
    lake = FaultyLake(SUITE_SETTINGS, server.dsn)
    lake.files, lake.acknowledged = before.files, before.acknowledged
    return lake


async def settle_appends(lake: FaultyLake, life: Life, happened: list[int]) -> None:
    """Each unknown entry is there whole, or nowhere; its retry makes it one."""

    for entry in life.unknown:
        assert entry.idempotency_key is not None
        record = await lake.bus.find_key(entry.principal_id, entry.target, entry.idempotency_key)
        outcome = await lake.bus.append(entry)
        if record is None:
            assert isinstance(outcome, Accepted)
            lake.keep(entry, outcome.receipt)
        else:
            assert isinstance(outcome, KeyTaken)
            assert outcome.record.receipt == record.receipt
            lake.keep(entry, record.receipt)
        happened[record is not None] += 1


async def settle_publications(lake: FaultyLake, life: Life, happened: list[int]) -> None:
    """Each publication's snapshot, files, range, lease and intents tell the same story."""

    observer = await lake.connect()
    for publication_id, commit in life.publications.items():
        published = await lake.catalog.publish_outcome(publication_id)
        file_ids = [file.file_id for file in commit.files]
        found = await observer.fetchrow(
            "SELECT (SELECT count(*) FROM data_file WHERE file_id = ANY ($1)) AS files,"
            " (SELECT count(*) FROM write_intent WHERE file_id = ANY ($1)) AS intents,"
            " (SELECT count(*) FROM published_range WHERE commit_id = $2) AS ranges,"
            " (SELECT count(*) FROM bus_lease WHERE lease_id = $3) AS leases",
            file_ids,
            commit.commit_id,
            commit.lease.lease_id,
        )
        assert found is not None
        files = len(file_ids)
        if published is None:
            assert tuple(found) == (0, files, 0, 1)
        else:
            assert tuple(found) == (files, 0, 1, 0)
            head = await lake.catalog.head()
            assert head.snapshot_id >= (published.snapshot_id or 0)
        happened[published is not None] += 1
