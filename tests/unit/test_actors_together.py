"""Roles in their loops, alone and several of each at once, against one lake."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pyarrow as pa
import pytest

from actors.hints import HintSender
from actors.role_host import RoleHost
from actors.roles import ALL_ROLES, Role
from lakebus.clock import SystemClock
from lakebus.errors import OutcomeUnknown, Unavailable
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, KeyTaken
from storage.files.parquet import EncodedFile, encode_data_file
from tests.unit.actors_rig import (
    ROLE_SETTINGS,
    Overlay,
    Rig,
    failing_encoder,
    new_entry,
    with_settings,
)

_PATIENCE_S = 20.0


@pytest.fixture
def rig() -> Rig:
    return Rig(clock=SystemClock(), shards=3, lease_ttl_ms=600)


def host(rig: Rig, **options: Any) -> RoleHost:
    return RoleHost(
        backend=rig.backend, on_fatal=rig.deaths, clock=rig.clock, metrics=rig.metrics, **options
    )


@asynccontextmanager
async def running(*hosts: RoleHost) -> AsyncIterator[None]:
    for each in hosts:
        await each.start()
    try:
        yield
    finally:
        for each in hosts:
            await each.stop()


async def published(rig: Rig) -> None:
    """Waits, snapshot by snapshot, until everything accepted is terminal."""
    changed = asyncio.Event()
    unsubscribe = rig.lake.watch_head(lambda _: changed.set())
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not await rig.drained():
                changed.clear()
                if not await rig.drained():
                    await changed.wait()
    finally:
        unsubscribe()


async def test_a_lone_row_is_visible_in_tens_of_milliseconds() -> None:
    rig = Rig(clock=SystemClock(), roles=with_settings(ROLE_SETTINGS, claim_poll_ms=60_000))
    events = await rig.create()
    clock = SystemClock()
    latencies = []
    each = host(rig)
    async with running(each):
        for i in range(20):
            began_s = clock.monotonic_s()
            await rig.append((events, [i]))
            each.wake()
            await published(rig)
            latencies.append(clock.monotonic_s() - began_s)
    assert sorted(latencies)[10] < 0.1
    assert await rig.ids() == dict.fromkeys(range(20), 1)


async def test_without_hints_the_poll_finds_rows(rig: Rig) -> None:
    events = await rig.create()
    async with running(host(rig)):
        await rig.append((events, [1]))
        await published(rig)
    assert await rig.ids() == {1: 1}


async def test_hints_wake_the_coordinator_long_before_the_poll() -> None:
    rig = Rig(
        clock=SystemClock(), roles=with_settings(ROLE_SETTINGS, claim_poll_ms=60_000), shards=1
    )
    events = await rig.create()
    sender = HintSender(
        stack="rig",
        directory=rig.hints,
        settings=rig.settings,
        clock=rig.clock,
        metrics=rig.metrics,
        on_fatal=rig.deaths,
    )
    async with running(host(rig)):
        while not (await sender.run_once()).addresses:
            await asyncio.sleep(0)
        await rig.append((events, [1]))
        sender.hint()
        await published(rig)
    await sender.stop()
    assert rig.metrics.value("lakebus_hints_received_total") == 1


async def test_a_flood_makes_few_large_files() -> None:
    rig = Rig(clock=SystemClock(), roles=with_settings(ROLE_SETTINGS, linger_ms=100), shards=1)
    events = await rig.create()
    began_s = time.monotonic()
    async with running(host(rig)):
        for i in range(500):
            await rig.append((events, [i]), ordering="a")
        await published(rig)
    # One a linger, however slowly a busy machine lets the rows come; the first does not wait.
    lingers = (time.monotonic() - began_s) / 0.1
    assert len(await rig.ids()) == 500
    assert len(await rig.files()) <= lingers + 5


class Weather:
    """Faults by chance: stores that fail, catalogs that are away or whose replies are lost."""

    def __init__(self, rig: Rig, chance: random.Random) -> None:
        self.rig = rig
        self.chance = chance

    def host(self) -> RoleHost:
        backend = dataclasses.replace(
            self.rig.backend,
            catalog=Overlay(self.rig.catalog, publish=self.publish),
            store=Overlay(self.rig.store, put_new=self.put_new),
        )
        return RoleHost(backend=backend, on_fatal=self.rig.deaths, metrics=self.rig.metrics)

    async def put_new(self, key: str, data: bytes) -> None:
        if self.chance.random() < 0.15:
            raise Unavailable("the store failed")
        await asyncio.sleep(self.chance.choice([0, 0, 0, 0.002]))
        await self.rig.store.put_new(key, data)

    async def publish(self, publication_id: Any, commits: Any) -> Any:
        fate = self.chance.random()
        if fate < 0.1:
            raise Unavailable("the catalog is away")
        if fate < 0.2:
            raise OutcomeUnknown("the connection broke before")
        done = await self.rig.catalog.publish(publication_id, commits)
        if fate < 0.3:
            raise OutcomeUnknown("the connection broke after")
        return done


async def produce(weather: Weather, tables: list[TableSchema], worker: int) -> list[int]:
    """Forty keyed requests to two tables, some of them sent twice; returns their ids."""
    ids = []
    for i in range(40):
        number = worker * 1_000 + i
        parts = [(tables[0], [number]), (tables[1], [-number - 1])]
        entry = new_entry(parts, key=f"k{number}", ordering=f"o{worker}")
        for _ in range(weather.chance.choice([1, 1, 2])):
            outcome = await weather.rig.bus.append(entry)
            assert isinstance(outcome, Accepted | KeyTaken)
        ids += [number, -number - 1]
        await asyncio.sleep(0)
    return ids


async def test_C2_A8_exactly_once_with_three_of_every_role_and_faults() -> None:
    """Three hosts, each with all roles, in bad weather, while requests are sent twice and one host
    after the other is stopped and replaced."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rig = Rig(clock=SystemClock(), shards=2, lease_ttl_ms=400, claim_entries_max=8)
    weather = Weather(rig, random.Random(seed))
    tables = [await rig.create("events"), await rig.create("notes")]
    hosts = [weather.host() for _ in range(3)]
    for each in hosts:
        await each.start()
    producers = [asyncio.create_task(produce(weather, tables, worker)) for worker in range(5)]
    for turn in range(3):
        await asyncio.sleep(0.05)
        await hosts[turn].stop()
        hosts[turn] = weather.host()
        await hosts[turn].start()
    sent = await asyncio.gather(*producers)
    await published(rig)
    for each in hosts:
        await each.stop()

    assert await rig.ids() == dict.fromkeys([i for ids in sent for i in ids], 1)
    by_entry: dict[tuple[int, int], set[int]] = {}
    for table_id, _, shard, position, _ in await rig.rows():
        by_entry.setdefault((shard, position), set()).add(table_id)
    assert all(found == {t.table_id for t in tables} for found in by_entry.values())
    assert rig.deaths.seen == []


async def test_B5_a_worker_that_vanishes_in_the_middle_is_taken_over_after_its_lease() -> None:
    rig = Rig(clock=SystemClock(), shards=1, lease_ttl_ms=300)
    events = await rig.create()
    await rig.append((events, [1]))
    reached, never = asyncio.Event(), asyncio.Event()

    async def put_new(key: str, data: bytes) -> None:
        reached.set()
        await never.wait()

    publisher = rig.publisher()
    vanishing = rig.coordinator(publisher=publisher, store=Overlay(rig.store, put_new=put_new))
    task = asyncio.create_task(vanishing.run_once())  # without its loops: nobody renews
    await reached.wait()
    clock = SystemClock()
    began_s = clock.monotonic_s()
    async with running(host(rig)):
        await published(rig)
    assert 0.2 < clock.monotonic_s() - began_s < 0.3 + 2.0
    assert await rig.ids() == {1: 1}
    never.set()  # the paused one goes on, and must change nothing
    publisher.start()
    report = await task
    assert report is not None
    assert report.end.value == "lease_lost"
    await publisher.stop()
    assert await rig.ids() == {1: 1}


async def test_B4_renewals_go_on_while_parquet_is_being_written() -> None:
    rig = Rig(
        clock=SystemClock(),
        roles=with_settings(ROLE_SETTINGS, hold_ttls_max=20),
        shards=1,
        lease_ttl_ms=250,
    )
    events = await rig.create()
    await rig.append((events, [1] * 20_000))
    slow = 0.9

    def encode(schema: TableSchema, rows: pa.Table) -> EncodedFile:
        time.sleep(slow)  # as native code does: it holds its thread and lets the loop run
        return encode_data_file(schema, rows)

    stranger = host(rig)
    async with running(host(rig, encode=encode)):
        while not rig.lake.state.ranges:
            await asyncio.sleep(0.005)
        async with running(stranger):
            await published(rig)
    assert await rig.ids() == {1: 20_000}
    assert rig.metrics.value("lakebus_ranges_claimed_total", attempt="0") == 1
    assert rig.metrics.value("lakebus_leases_lost_total") == 0


async def test_B8_a_poison_entry_does_not_stop_the_others(rig: Rig) -> None:
    events = await rig.create()
    encode = failing_encoder(lambda ids: pa.ArrowInvalid("no") if 666 in ids else None)
    async with running(host(rig, encode=encode), host(rig, encode=encode)):
        for i in [*range(20), 666, *range(20, 40)]:
            await rig.append((events, [i]), ordering="a")
        await published(rig)
    assert set(await rig.ids()) == set(range(40))
    assert len(await rig.bus.quarantine_items()) == 1


async def test_B7_stop_gives_every_lease_back(rig: Rig) -> None:
    rig.settings = with_settings(rig.settings, stop_s_max=0.01)
    events = await rig.create()
    await rig.append((events, [1]))
    reached, never = asyncio.Event(), asyncio.Event()

    async def put_new(key: str, data: bytes) -> None:
        reached.set()
        await never.wait()

    stuck = dataclasses.replace(rig.backend, store=Overlay(rig.store, put_new=put_new))
    each = RoleHost(backend=stuck, on_fatal=rig.deaths, metrics=rig.metrics)
    async with running(each):
        await reached.wait()
    assert [row.leased for row in rig.lake.state.ranges.values()] == [False]
    assert [row.attempt for row in rig.lake.state.ranges.values()] == [0]


async def test_B7_a_start_that_is_cancelled_leaves_nothing_running(rig: Rig) -> None:
    begun = asyncio.Event()
    made = host(rig)
    assert made.coordinator is not None

    async def warm_up_for_ever() -> None:
        begun.set()
        await asyncio.Event().wait()

    made.coordinator._stager.warm_up = warm_up_for_ever  # type: ignore[method-assign]
    starting = asyncio.create_task(made.start())
    await asyncio.wait_for(begun.wait(), _PATIENCE_S)
    assert any(loop.running for loop in made.status().loops)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(loop.running for loop in made.status().loops)


async def test_roles_spread_over_hosts_work_as_together(rig: Rig) -> None:
    events = await rig.create()
    leases = host(rig, roles=frozenset({Role.LEASE_MANAGER}))
    publisher = host(rig, roles=frozenset({Role.PUBLISHER, Role.SUPERVISOR}))
    coordinators = [
        host(
            rig,
            roles=frozenset({Role.COORDINATOR}),
            leases=leases.lease_manager,
            publisher=publisher.publisher,
        )
        for _ in range(2)
    ]
    async with running(leases, publisher), running(*coordinators):
        for i in range(30):
            await rig.append((events, [i]))
        await published(rig)
        status = publisher.status()
        assert status.roles == ("publisher", "supervisor")
        assert [loop.running for loop in status.loops] == [True, True]
        assert status.age_s < 5
    assert await rig.ids() == dict.fromkeys(range(30), 1)


def test_a_coordinator_needs_somebody_to_ask(rig: Rig) -> None:
    with pytest.raises(ValueError, match="needs a lease manager"):
        host(rig, roles=frozenset({Role.COORDINATOR}))
    assert frozenset(Role) == ALL_ROLES
