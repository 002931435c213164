"""E3, F4: a catalog that went back in time, or a store that is not its own, deletes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

import pytest

from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.errors import HistoryRewound, Unavailable
from lakebus.schemas import Column
from storage.bus.settings import BusSettings
from storage.files.objects import MemoryObjectStore
from storage.maintenance.interface import Swap, SwapOperation, Upkeep
from storage.postgres import PostgresLake
from storage.postgres.rewind import GuardSettings
from storage.postgres.rewind_acceptance import connection_to
from storage.postgres.rewind_marker import PREFIX
from tests.conformance.contents import read_contents, write_contents
from tests.postgres_server import run_elsewhere

#: Nothing is judged but what is asked for.
_WHEN_TOLD = GuardSettings(marker_s=3_600, check_s=3_600, recheck_s=3_600)


@pytest.fixture
def dsn(database_dsn: str) -> str:
    run_elsewhere(lambda: upgrade(database_dsn))
    return database_dsn


async def _open(dsn: str, store: MemoryObjectStore) -> PostgresLake:
    return await PostgresLake.open(
        dsn, bus_settings=BusSettings(shards=2), object_store=store, guard_settings=_WHEN_TOLD
    )


def _calls(upkeep: Upkeep) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every call of the interface, with arguments that a good catalog would take."""

    one = new_uuid()
    swap = Swap(new_uuid(), 1, SwapOperation.COMPACT, (new_uuid(),), ())
    return {
        "live_files": lambda: upkeep.live_files(1),
        "file_counts": lambda: upkeep.file_counts(small_bytes=1),
        "register_intents": lambda: upkeep.register_intents(1, 1, owner=one, ttl_s=1),
        "register_canary": lambda: upkeep.register_canary(owner=one, ttl_s=1),
        "forget_canary": lambda: upkeep.forget_canary(one),
        "publish_swap": lambda: upkeep.publish_swap(swap),
        "swap_outcome": lambda: upkeep.swap_outcome(one),
        "expire_snapshots": lambda: upkeep.expire_snapshots(keep_s=0, keep_count=99, limit=1),
        "create_tag": lambda: upkeep.create_tag("a", 1, created_by="me"),
        "drop_tag": lambda: upkeep.drop_tag("a"),
        "tags": upkeep.tags,
        "pin": lambda: upkeep.pin(one, kind="x", floor=None, ttl_s=1),
        "release_pin": lambda: upkeep.release_pin(one),
        "pins": upkeep.pins,
        "condemn": lambda: upkeep.condemn(limit=1),
        "condemn_orphans": lambda: upkeep.condemn_orphans(older_than_s=0, limit=1),
        "begin_deletes": lambda: upkeep.begin_deletes(window_s=0, limit=1),
        "note_deleted": lambda: upkeep.note_deleted([one]),
        "condemned": upkeep.condemned,
        "intents": upkeep.intents,
        "known_names": lambda: upkeep.known_names([one]),
        "forget_deleted": lambda: upkeep.forget_deleted(older_than_s=0, limit=1),
    }


def _promised() -> set[str]:
    members = inspect.getmembers(Upkeep, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")}


async def test_E3_every_call_of_upkeep_is_refused_on_a_catalog_that_went_back(dsn: str) -> None:
    store = MemoryObjectStore()
    lake = await _open(dsn, store)
    try:
        calls = _calls(lake.upkeep)
        assert set(calls) == _promised()
        async with connection_to(dsn) as connection:
            earlier = await read_contents(connection)
        await lake.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
        for call in calls.values():
            await call()
        await lake.judge()  # the marker tells of the table now
        async with connection_to(dsn) as connection:
            await write_contents(connection, earlier)
        # Nobody has noticed yet; what cannot be undone is judged by itself, every time.
        with pytest.raises(HistoryRewound):
            await calls["begin_deletes"]()
        await lake.judge()
        for call in calls.values():
            with pytest.raises(HistoryRewound):
                await call()
    finally:
        await lake.close()


async def test_E3_nothing_is_deleted_from_a_store_that_lacks_the_marker(dsn: str) -> None:
    store = MemoryObjectStore()
    lake = await _open(dsn, store)
    try:
        await lake.upkeep.register_intents(1, 1, owner=new_uuid(), ttl_s=0)
        await lake.upkeep.condemn_orphans(older_than_s=-1, limit=1)
        for key in [key async for key, _ in store.list(PREFIX)]:
            await store.delete(key)
        with pytest.raises(Unavailable, match="holds no marker"):
            await lake.upkeep.begin_deletes(window_s=-1, limit=1)
        assert [one.state for one in await lake.upkeep.condemned()] == ["condemned"]
        assert len(await lake.upkeep.begin_deletes(window_s=-1, limit=1, dry_run=True)) == 1
    finally:
        await lake.close()


async def test_E3_nothing_is_deleted_from_the_store_of_another_lake(dsn: str) -> None:
    store = MemoryObjectStore()
    lake = await _open(dsn, store)
    try:
        keys = [key async for key, _ in store.list(PREFIX)]
        own = await store.get(keys[0])
        for key in keys:
            await store.delete(key)
        stranger = own.replace(str(lake.identity.lake_id).encode(), str(new_uuid()).encode())
        await store.put_new(f"{PREFIX}{new_uuid().hex}/{keys[0].rpartition('/')[2]}", stranger)
        with pytest.raises(HistoryRewound):
            await lake.upkeep.begin_deletes(window_s=0, limit=1)
    finally:
        await lake.close()
