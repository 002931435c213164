"""`lakebus doctor`: is this machine fit to run a stack, and if not, what to do about it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import components, history_command, postgres_binaries, ray_environment
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.ports import port_is_free
from cluster.stack_files import StackFiles
from lakebus.__main__ import installation_problem
from lakebus.errors import LakebusError, Unavailable
from lakebus.settings import Settings
from storage.postgres.rewind import ACCEPT_COMMAND
from storage.postgres.server import look_at_server
from storage.rows import compiled_json

_GIB = 1024**3
OK, WARNING, FAILURE = "ok", "warning", "failure"
_NEEDED = (
    *("ray", "duckdb", "pyarrow", "asyncpg", "pydantic", "pydantic-settings", "sqlalchemy"),
    *("alembic", "msgspec", "uvloop", "httptools", "uvicorn", "starlette", "click", "obstore"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    result: str
    detail: str
    hint: str = ""

    def line(self) -> str:
        hint = f"\n{'':13}{self.hint}" if self.hint and self.result != OK else ""
        return f"{self.result:8} {self.name:12} {self.detail}{hint}"


def examine(settings: Settings) -> list[Finding]:
    """All findings, in the order in which a start would meet them."""
    checks: list[Callable[[Settings], Finding]] = [
        _python,
        _packages,
        _json_reader,
        _system,
        _folder,
        _disk,
        _memory,
        _shared_memory,
        _descriptors,
        _postgres,
        _object_store,
        _history,
        _haproxy,
        _run_dir,
        _port,
    ]
    return [check(settings) for check in checks]


def _python(_: Settings) -> Finding:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - somebody may run an installed copy by hand
        return Finding("python", FAILURE, version, "lakebus needs Python 3.11 or newer.")
    return Finding("python", OK, f"{version} ({sys.executable})")


def _packages(_: Settings) -> Finding:
    problem = installation_problem()
    if problem is not None:
        return Finding("packages", FAILURE, problem, "See docs: one installation.")
    missing = []
    for name in _NEEDED:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "packages",
            FAILURE,
            f"missing: {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _NEEDED[:3])
    return Finding("packages", OK, versions)


def _json_reader(_: Settings) -> Finding:
    if compiled_json.READER is None:
        return Finding(
            "json",
            WARNING,
            "read without compiled code, so ingest of JSON takes more processor time",
            "Install a C compiler, then lakebus again (make clean demo in a checkout).",
        )
    return Finding("json", OK, "read by compiled code")


def _system(_: Settings) -> Finding:
    if sys.platform != "linux":
        return Finding(
            "system", FAILURE, sys.platform, "lakebus runs on Linux; elsewhere use a container."
        )
    return Finding("system", OK, f"{platform.system()} {platform.release()} {platform.machine()}")


def _folder(settings: Settings) -> Finding:
    files = StackFiles(settings.data_dir)
    existing = next(path for path in [files.root, *files.root.parents] if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            "data folder",
            FAILURE,
            f"{existing} cannot be written by this user",
            "Choose another with --data-dir, or change its owner.",
        )
    detail = str(files.root) if existing == files.root else f"{files.root} (will be made)"
    return Finding("data folder", OK, detail)


def _disk(settings: Settings) -> Finding:
    files = StackFiles(settings.data_dir)
    existing = next(path for path in [files.root, *files.root.parents] if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / _GIB:.1f} GiB free"
    if free < 1 * _GIB:
        return Finding("disk", FAILURE, detail, "A stack needs 1 GiB free at least; make room.")
    if free < 5 * _GIB:
        return Finding("disk", WARNING, detail, "WAL, data files and logs want 5 GiB or more.")
    return Finding("disk", OK, detail)


def _memory(_: Settings) -> Finding:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            detail = f"{available / _GIB:.1f} GiB available"
            if available < 2.5 * _GIB:
                return Finding("memory", WARNING, detail, "A local stack takes about 2 GiB.")
            return Finding("memory", OK, detail)
    return Finding("memory", WARNING, "unknown", "/proc/meminfo says nothing.")


def _shared_memory(settings: Settings) -> Finding:
    needed = settings.ray.object_store_bytes
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    detail = f"{free / _GIB:.1f} GiB in /dev/shm"
    if free < needed:
        hint = (
            "Ray then keeps objects on disk. In a container: --shm-size=1g, or lower"
            " LAKEBUS_RAY_OBJECT_STORE_BYTES."
        )
        return Finding("shm", WARNING, detail, hint)
    return Finding("shm", OK, detail)


def _descriptors(_: Settings) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Finding(
            "open files",
            WARNING,
            f"at most {soft}",
            f"Raise it before the start: ulimit -n {min(hard, 65536)}",
        )
    return Finding("open files", OK, f"at most {soft}")


def _postgres(settings: Settings) -> Finding:
    if settings.postgres.dsn is not None:
        return external_postgres(settings)
    files = StackFiles(settings.data_dir)
    parent = next(path for path in [files.root, *files.root.parents] if path.exists())
    try:
        binaries, identity = postgres_binaries.resolve(
            parent,
            run_as_user=settings.postgres.run_as_user,
            bin_dir=settings.postgres.bin_dir,
            cache_dir=settings.postgres.program_cache_dir,
        )
    except LakebusError as error:
        return Finding("postgres", FAILURE, "cannot run here", str(error))
    ways = {
        "self": "as this user",
        "setuid": f"as user {settings.postgres.run_as_user}",
        "namespace": "in a user namespace",
    }
    return Finding("postgres", OK, f"{binaries.version} ({binaries.source}), {ways[identity.kind]}")


def external_postgres(settings: Settings) -> Finding:
    """Reachable, fit, and which promise its version does not keep."""
    try:
        found = asyncio.run(look_at_server(components.dsn_of(settings)))
    except Unavailable:
        return Finding("postgres", FAILURE, "external, by DSN: cannot be reached")
    except LakebusError as error:
        return Finding("postgres", FAILURE, "external, by DSN: cannot be used", str(error))
    words = f"{found.version}, external, by DSN"
    if found.gap:
        return Finding("postgres", WARNING, words, found.gap)
    return Finding("postgres", OK, words)


def _object_store(settings: Settings) -> Finding:
    """A folder is made at the start; a store by URL is asked whether it keeps its word."""
    words = components.object_store_words(settings)
    if components.keeps_files_here(settings):
        return Finding("store", OK, words)
    try:
        asyncio.run(components.check_object_store(components.object_store(settings)))
    except Unavailable as error:
        return Finding("store", FAILURE, f"{words} does not answer", str(error))
    except LakebusError as error:
        return Finding("store", FAILURE, f"{words} cannot be used", str(error))
    return Finding("store", OK, words)


def _history(settings: Settings) -> Finding:
    """Only of a database that runs: the doctor starts nothing."""
    files = StackFiles(settings.data_dir)
    if settings.postgres.dsn is None and EmbeddedPostgres(files.root).leftover() is None:
        return Finding("history", OK, "no database runs; the next start compares it")
    try:
        found = asyncio.run(history_command.show(settings))
    except LakebusError as error:
        return Finding("history", WARNING, f"cannot be compared: {error}")
    if found.verdict == "behind":
        return Finding(
            "history",
            FAILURE,
            f"the database went back in time: {'; '.join(found.losses)}",
            f"See docs/operations.md; to go on without: {ACCEPT_COMMAND}",
        )
    return Finding("history", OK, f"snapshot {found.snapshot_id}, not behind its marker")


def _haproxy(_: Settings) -> Finding:
    try:
        program = ray_environment.haproxy_program()
    except LakebusError as error:
        return Finding("haproxy", FAILURE, "not found", str(error))
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        return Finding(
            "haproxy", FAILURE, f"{program} does not run", "Install haproxy of your system."
        )
    return Finding("haproxy", OK, said.stdout.splitlines()[0])


def _run_dir(settings: Settings) -> Finding:
    parent = settings.ray.temp_dir or Path("/tmp")
    try:
        ray_environment.run_dir_of(settings, "0" * 16)
    except LakebusError as error:
        return Finding("sockets", FAILURE, str(parent), str(error))
    if not os.access(parent, os.W_OK | os.X_OK):
        return Finding(
            "sockets", FAILURE, f"{parent} cannot be written", "Set LAKEBUS_RAY_TEMP_DIR."
        )
    return Finding("sockets", OK, f"{parent}/lakebus-…")


def _port(settings: Settings) -> Finding:
    port = settings.http.port
    if port == 0 or port_is_free(port, settings.http.host):
        return Finding("port", OK, str(port or "a free one"))
    state = StackFiles(settings.data_dir).state()
    if state is not None and state.http_port == port and state.supervisor.alive():
        return Finding("port", OK, f"{port} (this stack runs)")
    return Finding(
        "port", WARNING, f"{port} is taken", "lakebus takes another unless --port names one."
    )
