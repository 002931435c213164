"""What the chaos run found, made small: each is a fault that once was answered wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from actors import runtime
from actors.runtime_settings import RuntimeSettings
from cluster import migrate, ray_host, schema_state
from cluster.host_link import HostFailed, HostLink
from cluster.private_files import write_private
from cluster.processes import ProcessMark
from cluster.stack import Stack
from cluster.stack_files import StackState
from lakebus.errors import LakebusError, OutcomeUnknown, StartRefused, Unavailable
from lakebus.settings import Settings
from storage.postgres.failures import connecting, reading, writing


@pytest.mark.parametrize(
    ("edge", "meaning"),
    [(connecting, Unavailable), (reading, Unavailable), (writing, OutcomeUnknown)],
)
def test_B7_a_session_that_the_server_ended_is_never_the_fault_of_an_entry(
    edge: Callable[[], AbstractContextManager[None]], meaning: type[LakebusError]
) -> None:
    """asyncpg calls this an internal error; it was given to clients as ours, and counted against
    the range that was being worked on."""

    with pytest.raises(meaning), edge():
        raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is …")


async def test_F1_a_database_that_is_full_of_connections_is_away_and_not_a_surprise(
    database_dsn: str,
) -> None:
    """A role that met this while it opened its backend stayed without work for ever."""

    parts = urlsplit(database_dsn)
    name = f"crowded_{parts.path.strip('/')}"
    owner = await asyncpg.connect(database_dsn)
    try:
        await owner.execute(f"CREATE DATABASE {name} CONNECTION LIMIT 0")
        with pytest.raises(Unavailable):
            await schema_state.current(urlunsplit(parts._replace(path=f"/{name}")))
    finally:
        await owner.execute(f"DROP DATABASE {name}")
        await owner.close()


async def test_F1_a_connection_cut_during_the_look_at_the_schema_is_away(database_dsn: str) -> None:
    await migrate.upgrade(database_dsn)
    killer = await asyncpg.connect(database_dsn)
    try:
        # Its lock keeps the other's look waiting until it is ended.
        async with killer.transaction():
            await killer.execute("LOCK TABLE lakebus.schema_version IN ACCESS EXCLUSIVE MODE")
            looking = asyncio.create_task(schema_state.current(database_dsn))
            while not await killer.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
            ):
                await asyncio.sleep(0.01)
            await killer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            with pytest.raises(Unavailable):
                await looking
    finally:
        await killer.close()


async def test_F1_a_role_that_imports_for_long_is_not_taken_for_one_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine each new process was ended by its own watch before it had begun to work,
    and the next one started over: a storm that did not end by itself."""

    class Unwatched:
        """The real watch would end the process of the tests some time after this test."""

        def __init__(self, **_: object) -> None: ...

        def start(self) -> None: ...

    remote: Any = runtime.RoleActor
    plain = remote.__ray_metadata__.modified_class
    settings = RuntimeSettings(
        namespace="nobody",
        factory="tests.chaos.slow_backend:open_backend",
        config="opened",
        tick_age_s_max=2.0,
    )
    with monkeypatch.context() as patched:
        patched.setattr("actors.runtime.threading.Thread", Unwatched)
        role = plain(settings, "core")
    opened = asyncio.Event()

    def look() -> float:
        """What the watch sees, from a thread of its own as it is."""
        oldest_s = 0.0
        while not opened.is_set():
            oldest_s = max(oldest_s, role._age_s())
            time.sleep(0.01)
        return oldest_s

    looking = asyncio.create_task(asyncio.to_thread(look))
    try:
        async with asyncio.timeout(30):
            while role._refused is None:
                await asyncio.sleep(0.02)
    finally:
        opened.set()
        await role._close()
        for task in role._tasks:
            task.cancel()
    assert role._refused == "opened"
    assert await looking < settings.tick_age_s_max


@pytest.mark.parametrize(
    ("dead", "lost"),
    [([], None), (["dashboard"], None), (["raylet"], "raylet"), (["gcs_server"], "gcs_server")],
)
def test_F1_the_host_ends_when_its_ray_is_not_whole(
    monkeypatch: pytest.MonkeyPatch, dead: list[str], lost: str | None
) -> None:
    """A killed raylet went unnoticed: what ran below it served on, and nothing that ended later
    was ever started again."""

    class Node:
        def dead_processes(self) -> list[tuple[str, object]]:
            return [(kind, object()) for kind in dead]

    monkeypatch.setattr("ray._private.worker._global_node", Node())
    with contextlib.nullcontext() if lost is None else pytest.raises(RuntimeError, match=lost):
        ray_host._require_ray()


_LOST_WHILE_STARTING = """
import time
import ray
from cluster import ray_host

class Node:
    def dead_processes(self):
        return [("raylet", object())]

ray_host._LOOK_S = 0.01
with ray_host._ended_without_ray():
    ray._private.worker._global_node = Node()
    time.sleep(60.0)
"""


def test_F1_a_host_that_loses_its_ray_while_starting_ends() -> None:
    """Ray's agent was killed while the application started, and its raylet ended with it: the host
    waited for actors of a node that was gone, and the stack never served again."""
    done = subprocess.run(
        [sys.executable, "-c", _LOST_WHILE_STARTING], capture_output=True, text=True, timeout=50.0
    )
    assert (done.returncode, done.stdout) == (1, "lakebus: Ray has lost its raylet\n")


async def test_F1_a_host_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    link = HostLink(tmp_path, wiring="nothing:to_deploy", environment=dict(os.environ))
    try:
        with pytest.raises(HostFailed, match=r"do not start within 0 s \(ray.start_timeout_s\)"):
            await link.wait_for("serve_started", timeout_s=0.1)
    finally:
        await link.stop()


async def test_F1_a_full_disk_does_not_end_the_watch_over_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`lakebus up` ended when it could not write down that Ray runs again."""

    class Gone:
        mark = ProcessMark(pid=2**22 + 1, started_ticks=0, boot_id="another")

    class Enough(Exception):
        pass

    outcomes: list[Exception | None] = [OSError(28, "No space left on device"), None, Enough()]
    said: list[str] = []

    async def restarted() -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    stack = Stack.__new__(Stack)
    monkeypatch.setattr(stack, "_host", Gone(), raising=False)
    monkeypatch.setattr(stack, "_say", said.append, raising=False)
    monkeypatch.setattr(stack, "_restart_host", restarted)
    with pytest.raises(Enough):
        await asyncio.wait_for(stack._watch_host(), 30.0)
    again = "Ray ended; starting it again"
    assert said == [again, "Ray runs again", again]


async def test_F1_a_full_disk_does_not_end_the_watch_over_postgresql() -> None:
    outcomes: list[Exception | None] = [OSError(28, "No space left on device"), None]
    said: list[str] = []

    class Enough(Exception):
        pass

    class Postgres:
        async def wait_exit(self) -> int:
            if not outcomes:
                raise Enough
            return -9

        async def start(self) -> None:
            if (outcome := outcomes.pop(0)) is not None:
                raise outcome

    stack = Stack.__new__(Stack)
    stack._say = said.append
    with pytest.raises(Enough):
        await asyncio.wait_for(stack._watch_postgres(cast(Any, Postgres())), 30.0)
    assert said == ["PostgreSQL ended (-9); starting it again", "PostgreSQL runs again"]


async def test_F1_a_start_on_a_full_disk_says_so_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lakebus up` ended in a traceback, and before it had stopped Ray and PostgreSQL, because it
    could not write down that it was stopping."""
    ended: list[str] = []

    class Process:
        def __init__(self, name: str) -> None:
            self.name = name

        async def stop(self) -> None:
            ended.append(self.name)

    async def started() -> None:
        own = ProcessMark.of(os.getpid())
        assert own is not None
        stack._state = StackState(supervisor=own, stack_id="of-no-process")
        stack._host, stack._postgres = cast(Any, Process("ray")), cast(Any, Process("postgresql"))
        stack._write_state(phase="starting")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    stack = Stack(Settings(data_dir=tmp_path))
    monkeypatch.setattr(stack, "_start", started)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartRefused, match=f"No space left on device. Free space for {tmp_path}"):
        await stack.run()
    assert ended == ["ray", "postgresql"]
    assert not list(tmp_path.glob(".*"))  # nor drafts that keep the disk full


async def test_F1_a_file_that_cannot_be_written_keeps_its_earlier_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "state.json"
    write_private(path, "earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_private(path, "later")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [
        (path.name, "earlier")
    ]
