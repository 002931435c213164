"""What a claim brings along, and what it says of the rest: as reading and claiming would tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, Claim
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from tests.conformance.harness import entry_of


@pytest.fixture
async def lake(database_dsn: str) -> AsyncIterator[PostgresLake]:
    await upgrade(database_dsn)
    made = await PostgresLake.open(database_dsn, bus_settings=BusSettings(shards=1))
    yield made
    await made.close()


@pytest.fixture
async def table(lake: PostgresLake) -> TableSchema:
    columns = (Column(0, "id", "bigint"), Column(0, "note", "varchar"))
    return (await lake.catalog.create_table(name="t", columns=columns)).schema


async def claimed(lake: PostgresLake) -> Claim:
    async with asyncio.timeout(20):
        while (claim := await lake.bus.claim(new_uuid())) is None:
            await asyncio.sleep(0.01)
    return claim


async def append_group(lake: PostgresLake, table: TableSchema, count: int) -> None:
    """What arrives at once is one group."""

    await asyncio.gather(*(lake.bus.append(entry_of(table, [n])) for n in range(count)))


async def test_B8_what_a_claim_brings_is_what_it_would_read(
    lake: PostgresLake, table: TableSchema
) -> None:
    """Halves of a group too: they have some of its entries and lie in the same bytes."""

    await append_group(lake, table, 1)
    await claimed(lake)  # the first is appended by itself
    await append_group(lake, table, 9)
    whole = []
    for _ in range(9):
        claim = await claimed(lake)
        whole.append(claim)
        assert claim.brought is not None
        assert list(await lake.bus.read(claim)) == [claim.brought]
        assert len(claim.brought.entry_indexes) == claim.lease.hi - claim.lease.lo
        if claim.lease.hi - claim.lease.lo == 1:
            break
        await lake.bus.nack(claim.lease, error="halve it", delay_s=0)
    later = [await claimed(lake) for _ in range(2)]
    for claim in later:  # not the first ones of their group
        assert claim.brought is not None
        assert list(await lake.bus.read(claim)) == [claim.brought]
    assert len({claim.lease.lo for claim in (*whole, *later)}) > 1


async def test_B3_a_range_of_two_groups_is_read(lake: PostgresLake, table: TableSchema) -> None:
    await lake.bus.append(entry_of(table, [1]))
    await lake.bus.append(entry_of(table, [2]))
    claim = await claimed(lake)
    assert claim.lease.hi - claim.lease.lo == 2
    assert claim.brought is None
    assert len(await lake.bus.read(claim)) == 2


async def test_B11_a_large_range_is_not_brought(lake: PostgresLake, table: TableSchema) -> None:
    await lake.bus.append(entry_of(table, [*range(40_000)]))
    claim = await claimed(lake)
    assert claim.brought is None
    (segment,) = await lake.bus.read(claim)
    assert len(segment.payload) > 32 * 1024


async def test_B2_a_claim_says_whether_there_is_more(
    lake: PostgresLake, table: TableSchema
) -> None:
    await append_group(lake, table, 1)
    assert not (await claimed(lake)).more
    await lake.bus.append(entry_of(table, [2]))
    await lake.bus.append(entry_of(table, [3]))
    claim = await claimed(lake)
    assert not claim.more
    await lake.bus.nack(claim.lease, error="halve it", delay_s=0)
    assert (await claimed(lake)).more  # the other half, which waits to be claimed again
    await claimed(lake)
    assert await lake.bus.claim(new_uuid()) is None


async def test_B2_a_claim_says_what_other_shards_have(database_dsn: str) -> None:
    await upgrade(database_dsn)
    lake = await PostgresLake.open(database_dsn, bus_settings=BusSettings(shards=2))
    try:
        columns = (Column(0, "id", "bigint"), Column(0, "note", "varchar"))
        table = (await lake.catalog.create_table(name="t", columns=columns)).schema
        taken = set()
        for number in range(20):
            entry = entry_of(table, [number], ordering_key=str(number))
            outcome = await lake.bus.append(entry)
            assert isinstance(outcome, Accepted)
            taken.add(outcome.shard)
        assert taken == {0, 1}
        claims = [await claimed(lake) for _ in range(2)]
        assert [claim.more for claim in claims] == [True, False]
        for claim in claims:
            await lake.bus.nack(claim.lease, error="halve it", delay_s=0)
        # Four halves, of which two end where their shard does: what is left was given back.
        assert [(await claimed(lake)).more for _ in range(3)] == [True] * 3
    finally:
        await lake.close()
