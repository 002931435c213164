"""The life of a request as PostgreSQL tells it is the one that the in-memory lake tells."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster.migrate import upgrade
from storage.bus.memory_trace import MemoryTraces
from storage.bus.trace import Trace, Traces
from storage.postgres.trace import PostgresTraces
from tests.conformance.harness import SUITE_SETTINGS, LakeHarness, entry_of
from tests.conformance.memory import MemoryHarness
from tests.conformance.postgres import PostgresHarness

#: What differs between any two lakes.
_OWN = {"accepted_at", "idempotency_expires_at", "published_at", "created_at", "claimed_at",
        "expires_at", "owner", "commit_id", "file_id", "size_bytes", "epoch", "principal_id",
        "head_snapshot_id", "snapshot_id", "quarantine_id", "attempts"}  # fmt: skip


@pytest.fixture
async def postgres(database_dsn: str) -> AsyncIterator[PostgresHarness]:
    await upgrade(database_dsn)
    lake = PostgresHarness(SUITE_SETTINGS, database_dsn)
    await lake.start()
    yield lake
    await lake.stop()


async def life(lake: LakeHarness, traces: Traces) -> list[Trace]:
    """What is told at every step."""

    async def told(batch_id: str) -> Trace:
        found = await traces.trace(batch_id)
        assert found is not None
        return found

    table = await lake.create("t")
    first = (await lake.accept(entry_of(table, [1, 2], key="k"))).receipt.batch_id
    steps = [await told(first)]
    worker = lake.worker()
    claim = await lake.bus.claim(worker.owner)
    assert claim is not None
    steps.append(await told(first))
    await worker.publish(await worker.stage(claim))
    steps.append(await told(first))
    second = (await lake.accept(entry_of(table, [3]))).receipt.batch_id
    claim = await lake.bus.claim(worker.owner)
    assert claim is not None
    await worker.publish(
        await worker.stage(claim, quarantine=range(claim.lease.lo, claim.lease.hi))
    )
    steps.append(await told(second))
    for unknown in ("b1-0-999", "b999999-0-0", "b1-99999-0", "nothing"):
        assert await traces.trace(unknown) is None
    return steps


def facts(trace: Trace) -> dict[str, Any]:
    """What any two lakes must tell alike."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if name not in _OWN}
        return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    found: dict[str, Any] = plain(dataclasses.asdict(trace))
    return found


async def test_both_backends_tell_the_same_life(postgres: PostgresHarness) -> None:
    memory = MemoryHarness(SUITE_SETTINGS)
    told = await life(postgres, PostgresTraces(pool=postgres._lake.pools[0]))
    assert [facts(one) for one in told] == [
        facts(one) for one in await life(memory, MemoryTraces(memory.lake))
    ]
    accepted, claimed, published, set_aside = told
    assert (accepted.lease, accepted.publication, accepted.entry.rows) == (None, None, 2)
    assert claimed.lease is not None
    assert (claimed.lease.state, claimed.lease.attempt) == ("leased", 0)
    assert published.lease is None
    assert published.publication is not None
    assert published.publication.readable
    assert published.publication.commit_id is not None
    assert published.publication.snapshot_id == published.head_snapshot_id
    assert [(file.table, file.rows) for file in published.files] == [("t", 2)]
    assert published.watermark > published.position
    assert [(item.kind, item.rows) for item in set_aside.quarantine] == [("entry", 1)]
    assert set_aside.files == ()
