"""Pins on PostgreSQL with real files: what a query reads is there until its last byte (E3)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.migrate import upgrade
from lakebus.errors import SnapshotExpired, Unavailable
from storage.files.objects import LocalObjectStore
from storage.reading.changes import ChangesRequest, Window
from storage.reading.holds import Unpinned
from storage.reading.resolve import SnapshotChoice
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.conformance.postgres import PostgresHarness
from tests.conformance.sql import FileWriter
from tests.integration.pinned_reader import begin, open_reader
from tests.matrix.collecting import collect_now, deleted_keys

FILES, ROWS = 6, 2_000
_WITHIN_S = 60.0


class World:
    """A lake with a table of several files, and maintenance with windows of no length."""

    def __init__(self, lake: PostgresHarness, folder: Path) -> None:
        self.lake = lake
        self.dsn = lake.dsn
        self.objects, self.temporary = folder / "objects", folder / "temporary"
        self.objects.mkdir()
        self.snapshot_id = 0

    async def fill(self) -> None:
        table = await self.lake.create("t")
        writer = FileWriter(self.lake, self.objects)
        for number in range(FILES):
            ids = range(number * ROWS, (number + 1) * ROWS)
            await self.lake.accept(entry_of(table, ids, ordering_key="one"))
            await writer.publish_one()
        self.snapshot_id = (await self.lake.catalog.head()).snapshot_id

    @property
    def files(self) -> set[str]:
        found = self.objects.rglob("*.parquet")
        return {path.relative_to(self.objects).as_posix() for path in found}

    async def end_and_expire(self) -> None:
        """The table is dropped, and every snapshot but the newest expires."""
        ticket = await self.lake.catalog.begin_drop(name="t")
        await self.lake.catalog.finish_drop(ticket)
        while True:  # times of publications may run a little ahead of the clock
            await self.lake.upkeep.expire_snapshots(keep_s=0, keep_count=1, limit=1_000)
            head = await self.lake.catalog.head()
            if head.oldest_snapshot_id == head.snapshot_id:
                return

    async def collect(self) -> set[str]:
        store = LocalObjectStore(self.objects)
        return deleted_keys(await collect_now(self.lake._lake, store, self.temporary))

    async def collected(self, keys: set[str]) -> None:
        """Waits until a collection finds that nobody needs these any more."""
        async with asyncio.timeout(_WITHIN_S):
            while not self.files.isdisjoint(keys):
                await self.collect()


@pytest.fixture
async def world(database_dsn: str, tmp_path: Path) -> AsyncIterator[World]:
    await upgrade(database_dsn)
    lake = PostgresHarness(SUITE_SETTINGS, database_dsn)
    await lake.start()
    try:
        made = World(lake, tmp_path)
        await made.fill()
        yield made
    finally:
        await lake.stop()


async def test_E3_a_long_answer_at_an_old_snapshot_misses_no_file_while_all_is_collected(
    world: World,
) -> None:
    files = world.files
    assert len(files) == FILES
    async with open_reader(world.dsn, world.objects, world.temporary) as (replica, keeper, _):
        answer = await begin(replica, world.snapshot_id - 1)
        await world.end_and_expire()
        until = asyncio.get_running_loop().time() + 3.0  # longer than the pin lives unrenewed
        needed = FILES - 1
        while asyncio.get_running_loop().time() < until:
            await world.collect()
            assert len(world.files) >= needed
        parts = [part async for part in answer]
        assert len(parts) > 3
        assert answer.row_count == needed * ROWS
        assert keeper.held == 0
        await world.collected(files)
        with pytest.raises(SnapshotExpired):
            await begin(replica, world.snapshot_id - 1)


@pytest.mark.parametrize("pinned", [True, False])
async def test_E3_files_are_held_from_before_the_engine_hears_of_them(
    world: World, pinned: bool
) -> None:
    """Everything is expired and collected between the plan of a query and its first file. Without
    a pin it ends in a typed error: a missing file is never a shorter answer (E6, D9)."""
    pins = None if pinned else Unpinned()
    reader = open_reader(world.dsn, world.objects, world.temporary, pins=pins)
    async with reader as (replica, keeper, gated):
        gated.gate.clear()
        answering = asyncio.create_task(begin(replica, world.snapshot_id))
        await gated.reached.wait()
        files = world.files
        if pinned:
            await world.end_and_expire()
            await world.collect()
            assert world.files == files
        else:
            await keeper.stop()
            await world.end_and_expire()
            await world.collected(files)
        gated.gate.set()
        if pinned:
            answer = await answering
            await answer.read_all()
            assert answer.row_count == FILES * ROWS
            await world.collected(files)
        else:
            with pytest.raises(Unavailable, match="lakebus maintain validate"):
                await answering


async def test_E3_the_change_feed_holds_what_its_window_reads(world: World) -> None:
    async with open_reader(world.dsn, world.objects, world.temporary) as (replica, keeper, _):
        window = Window(1, world.snapshot_id)
        page = await replica.changes.page(ChangesRequest("t", window, limit=10))
        assert page.row_count == 10
        assert page.cursor is not None
        assert keeper.held == 0
        assert keeper.floor == 1  # it held the whole window, from its beginning on
        files = world.files
        await world.end_and_expire()
        await world.collected(files)
        after = Window.decode(page.cursor, 1)
        with pytest.raises(SnapshotExpired):
            await replica.changes.page(ChangesRequest("t", after, limit=10))


async def test_E3_a_pin_is_refused_for_a_snapshot_that_expired_after_it_was_resolved(
    world: World,
) -> None:
    async with open_reader(world.dsn, world.objects, world.temporary) as (replica, keeper, _):
        choice = SnapshotChoice(snapshot_id=world.snapshot_id - 1)
        resolved, _ = await replica.service.view(choice)
        await world.end_and_expire()
        with pytest.raises(SnapshotExpired):
            await keeper.hold(resolved.snapshot_id)


async def test_E3_a_reader_that_was_stopped_past_its_pin_sends_no_byte_more(world: World) -> None:
    reader = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.pinned_reader",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    told = {
        "dsn": world.dsn,
        "objects": str(world.objects),
        "temporary": str(world.temporary),
        "snapshot_id": world.snapshot_id,
    }
    try:
        async with asyncio.timeout(_WITHIN_S):
            reader.stdin.write(json.dumps(told).encode() + b"\n")
            assert await reader.stdout.readline() == b"first\n"
            os.kill(reader.pid, signal.SIGSTOP)
            files = world.files
            await world.end_and_expire()
            assert await world.collect() == set()
            await world.collected(files)
            assert await world.lake.upkeep.pins() == []
            reader.stdin.write(b"go\n")
            os.kill(reader.pid, signal.SIGCONT)
            outcome = json.loads(await reader.stdout.readline())
        assert (outcome["parts"], outcome["code"]) == (0, "unavailable")
        assert "lost its claim" in outcome["detail"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            reader.kill()
        await reader.wait()
