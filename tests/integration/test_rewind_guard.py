"""F4 on one server: what notices a rewind, what the marker is, and the operator's command.

The database is put back with the server running, so no connection breaks and each judgement is
asked for; databases that are rolled back or promoted for real are in `tests/matrix/test_rewind.py`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster import components, doctor
from cluster.cli import cli
from cluster.migrate import upgrade
from lakebus.errors import Corrupt, HistoryRewound, OutcomeUnknown, Unavailable
from lakebus.schemas import Column, TableSchema
from lakebus.settings import Settings
from lakebus.tokens import VisibilityToken
from storage.bus.interface import Accepted, KeyTaken
from storage.bus.settings import BusSettings
from storage.files.objects import LocalObjectStore, MemoryObjectStore, ObjectStore
from storage.postgres import PostgresLake
from storage.postgres.rewind import GuardSettings, examine, settle
from storage.postgres.rewind_acceptance import connection_to
from storage.postgres.rewind_marker import PREFIX, read_marker, write_marker
from storage.reading.watcher import HeadWatcher
from tests.conformance.contents import Contents, read_contents, write_contents
from tests.conformance.harness import entry_of
from tests.postgres_server import run_elsewhere

_BUS = BusSettings(shards=2)
_WHEN_TOLD = GuardSettings(marker_s=3_600, check_s=3_600, recheck_s=3_600)
_COLUMNS = (Column(0, "id", "bigint"), Column(0, "note", "varchar"))
_HANG_S = 20.0


@pytest.fixture
def dsn(database_dsn: str) -> str:
    run_elsewhere(lambda: upgrade(database_dsn))
    return database_dsn


@asynccontextmanager
async def process(
    dsn: str, store: ObjectStore | None, guard: GuardSettings = _WHEN_TOLD
) -> AsyncIterator[PostgresLake]:
    lake = await PostgresLake.open(dsn, bus_settings=_BUS, object_store=store, guard_settings=guard)
    try:
        yield lake
    finally:
        await lake.close()


async def contents_of(dsn: str) -> Contents:
    async with connection_to(dsn) as connection:
        return await read_contents(connection)


async def put_back(dsn: str, contents: Contents) -> None:
    async with connection_to(dsn) as connection:
        await write_contents(connection, contents)


async def create(lake: PostgresLake, name: str = "t") -> TableSchema:
    return (await lake.catalog.create_table(name=name, columns=_COLUMNS)).schema


async def keys_of(store: ObjectStore) -> list[str]:
    return [key async for key, _ in store.list(PREFIX)]


# --- noticing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["a publication", "an accepted request"])
async def test_F4_what_only_a_living_process_saw_stops_everybody(dsn: str, lost: str) -> None:
    """Younger than the marker; whoever has given the answer out remembers it."""

    store = MemoryObjectStore()
    async with process(dsn, store) as witness, process(dsn, store) as other:
        table = await create(witness)
        await witness.judge()
        before = await contents_of(dsn)
        if lost == "a publication":
            await create(witness, "lost")
            await witness.catalog.head()
        else:
            await witness.bus.append(entry_of(table, [1], key="k"))
        await put_back(dsn, before)
        await other.judge()
        await other.catalog.head()  # nobody has told it
        assert (await witness.judge()).verdict == "behind"
        with pytest.raises(HistoryRewound):
            await witness.catalog.head()
        await other.judge()
        with pytest.raises(HistoryRewound):
            await other.bus.append(entry_of(table, [2]))
    async with process(dsn, store) as newcomer:
        with pytest.raises(HistoryRewound):
            await newcomer.catalog.head()
    async with connection_to(dsn) as connection:
        found = await examine(connection, store=store)
        assert found.verdict == "behind"
        assert found.state is not None
        began = await settle(
            connection,
            store=store,
            bus_settings=_BUS,
            accept=uuid.UUID(found.state["history_id"]),
            reason="accepted",
        )
    async with process(dsn, store) as newcomer:
        assert began.state is not None
        assert str((await newcomer.catalog.head()).history) == began.state["history_id"]


async def test_F4_a_database_without_a_lake_is_not_filled_beside_the_objects_of_one(
    dsn: str,
) -> None:
    store = MemoryObjectStore()
    empty = await contents_of(dsn)
    async with process(dsn, store) as lake:
        await create(lake)
    await put_back(dsn, empty)
    with pytest.raises(HistoryRewound, match="object store belongs to the lake"):
        await PostgresLake.open(dsn, bus_settings=_BUS, object_store=store)
    async with connection_to(dsn) as connection:
        assert await connection.fetchval("SELECT count(*) FROM lake") == 0


async def test_F4_the_objects_of_another_lake_are_refused(dsn: str) -> None:
    mine, other = MemoryObjectStore(), MemoryObjectStore()
    state = {"lake_id": str(uuid.uuid4()), "history_id": str(uuid.uuid4())}
    await write_marker(other, state | {"publish_count": 7, "wal": 1})
    async with process(dsn, mine) as lake:
        await create(lake)
    async with process(dsn, other) as lake:
        with pytest.raises(HistoryRewound, match="object store belongs to the lake"):
            await lake.catalog.head()


async def test_F4_a_store_that_is_away_delays_a_new_process_and_not_an_old_one(dsn: str) -> None:
    store = _Away()
    async with process(dsn, store) as lake:
        await create(lake)
        store.away = True
        with pytest.raises(Unavailable):
            await lake.judge()
        assert (await lake.catalog.head()).snapshot_id == 2
        with pytest.raises(Unavailable):
            await PostgresLake.open(dsn, bus_settings=_BUS, object_store=store)
        store.away = False


class _Away(MemoryObjectStore):
    away = False

    async def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        if self.away:
            raise Unavailable("the store is away")
        async for item in super().list(prefix):
            yield item


async def test_F4_a_full_store_keeps_nobody_from_working(dsn: str) -> None:
    class Full(MemoryObjectStore):
        full = False

        async def put_new(self, key: str, data: bytes) -> None:
            if self.full:
                raise Unavailable("no space left")
            await super().put_new(key, data)

    store = Full()
    async with process(dsn, store) as lake:
        await create(lake)
        store.full = True
        async with process(dsn, store) as newcomer:
            table = await create(newcomer, "u")
            assert isinstance(await newcomer.bus.append(entry_of(table, [1])), Accepted)
        store.full = False
        await lake.judge()
        marker = await read_marker(store, lake.identity.lake_id)
        assert marker is not None
        assert marker["snapshot_id"] == (await lake.catalog.head()).snapshot_id


async def test_F4_the_gate_opens_by_itself_and_waiters_are_told(dsn: str) -> None:
    store = MemoryObjectStore()
    quick = GuardSettings(marker_s=0.01, check_s=3_600, recheck_s=0.05)
    async with process(dsn, store, quick) as lake:
        await create(lake)
        await lake.judge()
        before = await contents_of(dsn)
        await create(lake, "lost")
        await lake.judge()
        watcher = HeadWatcher(lake.catalog, poll_s=0.02, refuse=lake.guard.refuse)
        watcher.start()
        try:
            head = await watcher.fresh_head()
            waiting = asyncio.create_task(
                watcher.wait_until_covered(
                    VisibilityToken(head.history, head.snapshot_id + 1),
                    deadline_s=time.monotonic() + _HANG_S,
                )
            )
            await put_back(dsn, before)
            await lake.judge()
            with pytest.raises(HistoryRewound):
                await asyncio.wait_for(waiting, _HANG_S)
            with pytest.raises(HistoryRewound):
                watcher.head_within(3_600)  # not even an old head is served
            async with connection_to(dsn) as connection:
                await settle(
                    connection, store=store, bus_settings=_BUS, accept=head.history, reason="test"
                )
            async with asyncio.timeout(_HANG_S):
                while lake.guard.rewound:
                    await asyncio.sleep(0.01)
            assert (await watcher.fresh_head()).history != head.history
        finally:
            await watcher.stop()


async def test_A6_a_line_that_began_behind_a_process_makes_its_answer_unknown_once(
    dsn: str,
) -> None:
    store = MemoryObjectStore()
    async with process(dsn, store) as lake:
        table = await create(lake)
        line = (await lake.catalog.identity()).history
        async with connection_to(dsn) as connection:
            await settle(connection, store=store, bus_settings=_BUS, accept=line, reason="test")
        entry = entry_of(table, [1], key="k")
        with pytest.raises(OutcomeUnknown):
            await lake.bus.append(entry)
        await lake.judge()
        again = await lake.bus.append(entry)
        assert isinstance(again, KeyTaken)
        token = lake.codec.decode(again.record.receipt.visibility_token)
        assert token.history == (await lake.catalog.identity()).history != line
        other = await lake.bus.append(entry_of(table, [2]))
        assert isinstance(other, Accepted)


async def test_F4_a_line_is_begun_once_however_many_notice(dsn: str) -> None:
    store = MemoryObjectStore()
    async with process(dsn, store) as lake:
        await create(lake)
    async with connection_to(dsn) as connection:
        await connection.execute("UPDATE history SET timeline = timeline + 1")
    lakes = await asyncio.gather(
        *(PostgresLake.open(dsn, bus_settings=_BUS, object_store=store) for _ in range(5))
    )
    try:
        identities = [await lake.catalog.identity() for lake in lakes]
        assert {len(identity.histories) for identity in identities} == {2}
        assert len({identity.history for identity in identities}) == 1
    finally:
        for lake in lakes:
            await lake.close()


async def test_F4_a_server_that_does_not_tell_its_timeline_is_no_new_line(dsn: str) -> None:
    """Some hosted servers keep the functions to themselves; publications and ends still count."""

    store = MemoryObjectStore()
    async with connection_to(dsn) as connection:
        await connection.execute(
            "CREATE OR REPLACE FUNCTION server_line(OUT system_identifier bigint,"
            " OUT timeline integer, OUT wal bigint) LANGUAGE sql AS"
            " 'SELECT NULL::bigint, NULL::integer, NULL::bigint'"
        )
    for _ in range(2):
        async with process(dsn, store) as lake:
            assert len((await lake.catalog.identity()).histories) == 1
    before = await contents_of(dsn)
    async with process(dsn, store) as lake:
        await create(lake)
    await put_back(dsn, before)
    async with process(dsn, store) as lake:
        with pytest.raises(HistoryRewound):
            await lake.catalog.head()


async def test_F4_a_process_without_a_store_begins_no_line(dsn: str) -> None:
    """It cannot know what is missing: a process that can has to decide."""

    store = MemoryObjectStore()
    async with process(dsn, store) as lake:
        await create(lake)
    async with connection_to(dsn) as connection:
        await connection.execute("UPDATE history SET timeline = timeline + 1")
    async with process(dsn, None) as lake:
        await create(lake, "u")
        assert len((await lake.catalog.identity()).histories) == 1
    async with process(dsn, store) as lake:
        assert len((await lake.catalog.identity()).histories) == 2


# --- the marker ---------------------------------------------------------------------------------


async def test_F4_the_marker_follows_publications_by_itself_and_stays_one_object(
    dsn: str,
) -> None:
    store = MemoryObjectStore()
    async with process(dsn, store, GuardSettings(marker_s=0.05)) as lake:
        for n in range(5):
            change = (await lake.catalog.create_table(name=f"t{n}", columns=_COLUMNS)).snapshot_id
        async with asyncio.timeout(_HANG_S):
            while True:
                marker = await read_marker(store, lake.identity.lake_id)
                if marker is not None and marker["snapshot_id"] == change:
                    break
                await asyncio.sleep(0.01)
    assert len(await keys_of(store)) == 1


async def test_F4_the_marker_is_exact_after_a_stop_in_order(dsn: str) -> None:
    store = MemoryObjectStore()
    async with process(dsn, store) as lake:
        await create(lake)
        head = await lake.catalog.head()
    marker = await read_marker(store, lake.identity.lake_id)
    assert marker is not None
    assert marker["snapshot_id"] == head.snapshot_id


async def test_F4_the_greatest_marker_counts_whoever_comes_late(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    lake_id = uuid.uuid4()
    base = {"lake_id": str(lake_id), "history_id": str(uuid.uuid4()), "wal": 5}
    await write_marker(store, base | {"publish_count": 1_000_007})
    await write_marker(store, base | {"publish_count": 12})  # a zombie of the lost line
    marker = await read_marker(store, lake_id)
    assert marker is not None
    assert marker["publish_count"] == 1_000_007
    await write_marker(store, base | {"publish_count": 1_000_008})
    assert len(await keys_of(store)) == 1
    store.close()


async def test_F4_a_marker_that_is_replaced_while_it_is_read_is_read_again() -> None:
    store = _Replaced()
    lake_id = uuid.uuid4()
    base = {"lake_id": str(lake_id), "history_id": str(uuid.uuid4()), "wal": 5}
    for count in range(3):
        await write_marker(store, base | {"publish_count": count})
    store.next_state = base | {"publish_count": 99}
    marker = await read_marker(store, lake_id)
    assert marker is not None
    assert marker["publish_count"] == 99


class _Replaced(MemoryObjectStore):
    next_state: dict[str, object] | None = None

    async def get(self, key: str) -> bytes:
        if self.next_state is not None:
            state, self.next_state = self.next_state, None
            await write_marker(self, state)
        return await super().get(key)


async def test_F4_a_damaged_marker_is_said_and_not_passed_over() -> None:
    store = MemoryObjectStore()
    lake_id = uuid.uuid4()
    await store.put_new(f"{PREFIX}{lake_id.hex}/{1:020d}-{1:020d}-x.json", b'{"lake_id": 7')
    with pytest.raises(Corrupt, match="marker"):
        await read_marker(store, lake_id)


# --- what an operator does ------------------------------------------------------------------------


def test_F4_the_command_shows_asks_and_begins_a_line(dsn: str, tmp_path: Path) -> None:
    settings = Settings.load(
        environ={}, flags={"data_dir": tmp_path, "postgres.dsn": dsn, "bus.shards": _BUS.shards}
    )
    store = components.object_store(settings)

    async def lose() -> None:
        async with process(dsn, store) as lake:
            table = await create(lake)
            before = await contents_of(dsn)
            await create(lake, "lost")
            await lake.bus.append(entry_of(table, [1], key="k"))
        await put_back(dsn, before)

    run_elsewhere(lose)

    def command(*arguments: str, answer: str | None = None) -> tuple[int, str]:
        done = CliRunner().invoke(
            cli,
            ["history", *arguments, "--data-dir", str(tmp_path)],
            input=answer,
            env={"LAKEBUS_POSTGRES_DSN": dsn, "LAKEBUS_BUS_SHARDS": str(_BUS.shards)},
            standalone_mode=False,
        )
        return done.return_value, done.output

    code, said = command("show")
    assert code == 1
    assert "1 snapshots, 3 to 3" in said
    assert "1 accepted requests of shard" in said
    finding = doctor._history(settings)
    assert finding.result == doctor.FAILURE
    assert "1 snapshots, 3 to 3" in finding.detail

    _, said = command("accept-loss", answer="n\n")
    assert "Go on without it" in said
    assert command("show")[0] == 1, "a no is a no"
    code, said = command("accept-loss", "--yes")
    assert code == 0
    assert "A new line of history began" in said
    code, said = command("show")
    assert code == 0
    assert "nothing is lost" in said
    code, said = command("accept-loss", "--yes")
    assert "A new line" not in said, "there was nothing to accept"
    assert doctor._history(settings).result == doctor.OK

    async def look() -> None:
        async with process(dsn, store) as lake:
            (_, began) = (await lake.catalog.identity()).histories
            assert began.snapshot_id == 2
        async with connection_to(dsn) as connection:
            reason = await connection.fetchval(
                "SELECT reason FROM history WHERE parent_serial IS NOT NULL"
            )
            assert reason == "accepted"

    run_elsewhere(look)


def test_F4_the_command_says_what_it_needs(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["history", "show", "--data-dir", str(tmp_path)])
    assert "There is no database in" in str(done.exception)
    assert not (tmp_path / "postgres").exists()
