"""The listener: hints that may be lost, and come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import asyncpg
import pytest

from cluster.migrate import upgrade
from lakebus.schemas import Column
from lakebus.tokens import VisibilityToken
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from storage.reading.postgres_listener import PostgresHeadListener
from storage.reading.watcher import HeadWatcher

# --- the listener ---------------------------------------------------------------------------------

_HANG_S = 20.0
_LISTENERS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'lakebus listener'"


async def test_D4_a_publication_wakes_a_waiter_without_a_poll(database_dsn: str) -> None:
    await upgrade(database_dsn)
    opened = await PostgresLake.open(database_dsn, bus_settings=BusSettings())
    listener = PostgresHeadListener(database_dsn)
    watcher = HeadWatcher(opened.catalog, listen=listener.wake_ups, poll_s=3_600)
    watcher.start()
    try:
        head = await watcher.fresh_head()
        wanted = VisibilityToken(head.history, head.snapshot_id + 1)
        waiting = asyncio.create_task(
            watcher.wait_until_covered(wanted, deadline_s=time.monotonic() + _HANG_S)
        )
        change = await opened.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
        assert (await asyncio.wait_for(waiting, _HANG_S)).snapshot_id == change.snapshot_id
    finally:
        await watcher.stop()
        await opened.close()


async def test_D4_a_listener_that_is_cut_off_comes_back_and_looks_again(database_dsn: str) -> None:
    wake_ups = PostgresHeadListener(database_dsn, pause_min_s=0.01).wake_ups()
    connection = await asyncpg.connect(database_dsn)
    try:
        await _next(wake_ups)  # connected
        await connection.execute("NOTIFY lakebus_head, '2'")
        await _next(wake_ups)
        (row,) = await connection.fetch(_LISTENERS)
        await connection.execute("SELECT pg_terminate_backend($1)", row["pid"])
        await _next(wake_ups)  # something may have been missed
        while row in (rows := await connection.fetch(_LISTENERS)) or not rows:
            await _next(wake_ups)
        await connection.execute("NOTIFY lakebus_head, '3'")
        await _next(wake_ups)
    finally:
        await wake_ups.aclose()
        await connection.close()


async def test_a_listener_without_a_server_keeps_trying_and_ends_with_its_task() -> None:
    wake_ups = PostgresHeadListener("postgresql://x@127.0.0.1:1/x", pause_min_s=0.001).wake_ups()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await wake_ups.__anext__()
    await wake_ups.aclose()


async def _next(wake_ups: AsyncGenerator[None, None]) -> None:
    await asyncio.wait_for(wake_ups.__anext__(), _HANG_S)
