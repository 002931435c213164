"""The roles as Ray actors over PostgreSQL: killed at any time, they go on.

One small cluster for the module; every test has a namespace and a database of its own.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # on purpose, and before the first import

import ray

from actors import runtime
from actors.handles import RoleHandle
from actors.roles import Role
from actors.runtime_settings import RuntimeSettings
from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.errors import StartRefused, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, KeyTaken
from storage.files.objects import LocalObjectStore
from storage.postgres.lake import PostgresLake
from tests.integration.ray_backend import FACTORY, LEASE_TTL_S, open_lake, write_config
from tests.unit.actors_rig import new_entry

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_REPOSITORY = str(Path(__file__).parents[2])
_PATIENCE_S = 60.0
#: Ray starts a process anew in about two seconds on a quiet machine; the lease runs meanwhile.
_RESTART_S = 15.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_REPOSITORY, before]))
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 1024 * 1024,
        namespace="lakebus-tests",
    )
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@dataclass(frozen=True, slots=True)
class Stack:
    """One lake, and the front that a test uses in place of ingest and query."""

    settings: RuntimeSettings
    lake: PostgresLake
    store: LocalObjectStore
    table: TableSchema
    published: asyncio.Event
    dsn: str
    objects: Path

    async def append(self, ids: list[int], *, key: str, ordering: str = "") -> None:
        entry = new_entry([(self.table, ids)], key=key, ordering=ordering)
        outcome = await self.lake.bus.append(entry)
        assert isinstance(outcome, Accepted | KeyTaken)

    async def drained(self) -> None:
        """Waits, snapshot by snapshot, until everything accepted is terminal."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                self.published.clear()
                if all(s.watermark == s.end for s in await self.lake.bus.shard_status()):
                    return
                await self.published.wait()

    async def ids(self) -> Counter[int]:
        head = await self.lake.catalog.head()
        delta = await self.lake.catalog.manifest_delta(after=0, until=head.snapshot_id)
        found: Counter[int] = Counter()
        for file in delta.files:
            data = await self.store.get(file.object_key)
            found.update(pq.read_table(io.BytesIO(data))["id"].to_pylist())
        return found

    async def pid(self, role: str) -> int:
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                for status in await runtime.status(self.settings):
                    if status.role == role and status.ping is not None and status.ping.ready:
                        return status.ping.process_id
                await asyncio.sleep(0.05)


@pytest.fixture
async def stack(cluster: None, database_dsn: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with opened(database_dsn, tmp_path) as made:
        yield made


@asynccontextmanager
async def opened(dsn: str, folder: Path) -> AsyncIterator[Stack]:
    await upgrade(dsn)
    objects = folder / "objects"
    objects.mkdir()
    config = {"dsn": dsn, "objects": str(objects), "stack": new_uuid().hex}
    lake = await open_lake(config)
    listener = await asyncpg.connect(dsn)
    published = asyncio.Event()
    await listener.add_listener("lakebus_head", lambda *_: published.set())
    columns = [Column(0, "id", "bigint"), Column(0, "note", "varchar")]
    table = (await lake.catalog.create_table(name="events", columns=columns)).schema
    settings = RuntimeSettings(
        job_idle_s=5.0,
        namespace=f"test-{config['stack']}",
        factory=FACTORY,
        config=str(write_config(folder, **config)),
        stop_s_max=10.0,
    )
    made = Stack(settings, lake, LocalObjectStore(objects), table, published, dsn, objects)
    try:
        yield made
    finally:
        await runtime.stop(settings)
        await listener.close()
        await lake.close()


async def test_F1_a_killed_core_goes_on_within_its_lease(stack: Stack) -> None:
    running = await runtime.start(stack.settings)
    assert [(s.role, s.ping and s.ping.roles) for s in running.statuses] == [
        ("core", ("coordinator", "lease_manager", "maintenance", "publisher", "supervisor"))
    ]
    await stack.append([0], key="first")
    await stack.drained()

    sent = 1
    for round_number in range(2):
        pid = await stack.pid("core")
        for _ in range(20):
            await stack.append([sent], key=f"k{sent}", ordering=f"o{sent % 5}")
            sent += 1
            if sent % 20 == 10:
                os.kill(pid, signal.SIGKILL)
                killed_s = time.monotonic()
        await stack.drained()
        assert time.monotonic() - killed_s < LEASE_TTL_S + 2.0 + _RESTART_S, round_number
        assert await stack.pid("core") != pid
    assert await stack.ids() == dict.fromkeys(range(sent), 1)


async def test_F1_spread_roles_are_killed_one_by_one_under_load(stack: Stack) -> None:
    stack = replace(stack, settings=replace(stack.settings, placement="spread", coordinators=2))
    running = await runtime.start(stack.settings, timeout_s=120)
    assert [status.role for status in running.statuses] == [
        "supervisor",
        "lease_manager",
        "publisher",
        "maintenance",
        "coordinator-0",
        "coordinator-1",
    ]
    stopping = asyncio.Event()
    sent = 0

    async def produce() -> None:
        nonlocal sent
        while not stopping.is_set():
            await stack.append([sent], key=f"k{sent}", ordering=f"o{sent % 7}")
            sent += 1
            await asyncio.sleep(0.005)

    load = asyncio.create_task(produce())
    for role in ("coordinator-0", "publisher", "lease_manager", "supervisor"):
        pid = await stack.pid(role)
        os.kill(pid, signal.SIGKILL)
        before = (await stack.lake.catalog.head()).snapshot_id
        while await stack.pid(role) == pid:
            await asyncio.sleep(0.05)
        async with asyncio.timeout(_PATIENCE_S):
            while (await stack.lake.catalog.head()).snapshot_id <= before:
                stack.published.clear()
                await stack.published.wait()
    stopping.set()
    await load
    await stack.drained()
    assert await stack.ids() == dict.fromkeys(range(sent), 1)

    # What is gone for good, the supervisor makes again.
    gone = stack.settings.handle("coordinator-1")
    before_pid = await stack.pid("coordinator-1")
    await gone.kill(restart=False)
    assert await stack.pid("coordinator-1") != before_pid


async def test_B7_stop_gives_leases_back_and_leaves_no_actor(stack: Stack) -> None:
    await runtime.start(stack.settings)
    for i in range(50):
        await stack.append([i], key=f"k{i}")
    await runtime.stop(stack.settings)
    statuses = await runtime.status(stack.settings)
    assert [(s.role, s.ping) for s in statuses] == [("core", None)]
    assert sum(s.leases for s in await stack.lake.bus.shard_status()) == 0
    await runtime.start(stack.settings)
    await stack.drained()
    assert await stack.ids() == dict.fromkeys(range(50), 1)


async def test_actors_of_older_code_are_ended_and_starting_again_changes_nothing(
    stack: Stack,
) -> None:
    old = replace(stack.settings, version="0.0.1-old")
    await runtime.start(old)
    old_pid = await stack.pid("core")
    assert await runtime.tend(stack.settings) is None  # the old root is in charge until `start`

    await runtime.start(stack.settings)
    statuses = await runtime.status(stack.settings)
    assert [s.version for s in statuses] == [stack.settings.version]
    pid = await stack.pid("core")
    assert pid != old_pid
    await runtime.start(stack.settings)
    assert await stack.pid("core") == pid
    assert await runtime.tend(stack.settings) is None

    await stack.settings.handle("core").kill(restart=False)
    assert await runtime.tend(stack.settings) == "created core"
    await stack.append([1], key="k")
    await stack.drained()


async def test_a_backend_that_refuses_tells_why(stack: Stack, tmp_path: Path) -> None:
    folder = tmp_path / "refusing"
    folder.mkdir()
    config = write_config(folder, refuse="run `lakebus migrate`")
    with pytest.raises(StartRefused, match="lakebus migrate"):
        await runtime.start(replace(stack.settings, config=str(config)))


async def test_what_ray_says_is_mapped(stack: Stack) -> None:
    missing = RoleHandle(stack.settings.handle("nobody").address)
    assert not await missing.exists()
    with pytest.raises(Unavailable, match="no actor"):
        await missing.ping(timeout_s=5)
    await missing.stop(timeout_s=1)

    settings = replace(stack.settings, placement="spread", coordinators=1)
    assert next(iter(settings.roles())) == settings.root == Role.SUPERVISOR
