"""A real PostgreSQL for tests: one server a test session, a fresh database whenever one is wanted.

Its folder is in memory where there is room: with `fsync` on, which the product insists on, a test
waits half a second for the checkpoint that dropping its database asks for. No test of these can
tell, for none cuts the power; what is about durability has servers of its own, on the disk.

``LAKEBUS_TEST_POSTGRES_DSN`` names an external server instead (a role that may create databases).
Tests take the fixtures `postgres_dsn` (session) and `database_dsn` (a new empty database), which
`tests/conftest.py` re-exports, or use `running_postgres` and `fresh_database` themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from cluster.embedded_postgres import EmbeddedPostgres
from cluster.leftovers import clear
from cluster.postgres_binaries import BIN_DIR_VARIABLE
from cluster.processes import ProcessMark
from cluster.stack_files import StackFiles

EXTERNAL_VARIABLE = "LAKEBUS_TEST_POSTGRES_DSN"
_PREFIX, _OWNER = "lakebus-test-", "owner.json"
_MEMORY, _MEMORY_FREE_BYTES = Path("/dev/shm"), 4 << 30


@contextmanager
def running_postgres(*, durable: bool = True, fast_init: bool = True) -> Iterator[str]:
    """Yield the DSN of a server whose role may create databases.

    :param durable: fsync at run time, as in production; False for speed.
    :param fast_init: do not sync the freshly made cluster; only a power cut could tell.
    """
    external = os.environ.get(EXTERNAL_VARIABLE)
    if external:
        yield external
        return
    folder = new_data_dir(_quick_place())
    server = EmbeddedPostgres(
        folder, durable=durable, sync_init=not fast_init, bin_dir=programs_wanted()
    )
    try:
        run_elsewhere(server.start)
        yield server.dsn
    finally:
        run_elsewhere(server.stop)
        shutil.rmtree(folder, ignore_errors=True)


def programs_wanted() -> Path | None:
    """The PostgreSQL that the environment asks for, so that a run can be told to try another."""
    named = os.environ.get(BIN_DIR_VARIABLE)
    return Path(named) if named else None


def _quick_place() -> Path:
    """In memory where two servers and a Ray cluster have room, as they have not in a container with
    the usual 64 MiB; on the disk elsewhere."""
    with contextlib.suppress(OSError):
        if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _MEMORY_FREE_BYTES:
            return _MEMORY
    return Path(tempfile.gettempdir())


def new_data_dir(place: Path | None = None) -> Path:
    """A new folder for a stack, in a place that PostgreSQL's user can reach: on the disk, unless
    another place is named.

    It is marked with the process that made it, so that a later test run can clear away what a
    killed one left.
    """
    _clear_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    if os.geteuid() == 0:
        folder.chmod(0o711)
    mark = ProcessMark.of(os.getpid())
    assert mark is not None
    (folder / _OWNER).write_text(json.dumps(mark.to_json()))
    return folder


@functools.cache
def _clear_abandoned() -> None:
    """Once a run: stop and delete what test processes left that are dead."""
    for folder in (
        folder
        for place in (Path(tempfile.gettempdir()), _MEMORY)
        for folder in place.glob(f"{_PREFIX}*")
    ):
        with contextlib.suppress(OSError, ValueError):  # not ours, or somebody else clears it
            owner = ProcessMark.from_json(json.loads((folder / _OWNER).read_text()))
            if folder.stat().st_uid == os.geteuid() and owner is not None and not owner.alive():
                files = StackFiles(folder)
                run_elsewhere(functools.partial(clear, files.state(), files.stack_id()))
                run_elsewhere(EmbeddedPostgres(folder).stop_leftover)
                shutil.rmtree(folder)


def fresh_database(dsn: str) -> str:
    """Create an empty database on the server of `dsn`; return the DSN of it."""
    name = f"test_{secrets.token_hex(6)}"

    async def create() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()

    run_elsewhere(create)
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


async def copy_database(template: str) -> str:
    """Create a copy of the database of `template`, which nobody uses now; return the DSN of it."""
    parts = urlsplit(template)
    name = f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(urlunsplit(parts._replace(path="/postgres")))
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {parts.path.lstrip('/')}")
    finally:
        await connection.close()
    return urlunsplit(parts._replace(path=f"/{name}"))


def drop_database(dsn: str) -> None:
    """Drop the database of `dsn`, whoever is still connected to it."""
    parts = urlsplit(dsn)
    name = parts.path.lstrip("/")

    async def drop() -> None:
        connection = await asyncpg.connect(urlunsplit(parts._replace(path="/postgres")))
        try:
            await _drop_when_left(connection, name)
        finally:
            await connection.close()

    run_elsewhere(drop)


async def _drop_when_left(connection: asyncpg.Connection[asyncpg.Record], name: str) -> None:
    """An autovacuum worker belongs to the superuser and cannot be ended by our role; it leaves the
    database by itself, within moments."""
    deadline = time.monotonic() + 30.0
    while True:
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            return
        except asyncpg.InsufficientPrivilegeError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


def run_elsewhere(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine to its end on a loop and thread of its own.

    So the callers are plain functions that work inside and outside a running loop.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(work()))
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            failure.append(error)

    thread = threading.Thread(target=run, name="test-postgres")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """The session's server."""
    with running_postgres() as dsn:
        yield dsn


@pytest.fixture
def database_dsn(postgres_dsn: str) -> Iterator[str]:
    """A new empty database, dropped afterwards."""
    dsn = fresh_database(postgres_dsn)
    yield dsn
    drop_database(dsn)
