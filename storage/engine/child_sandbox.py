"""The locked process and the locked DuckDB: what holds even when the guard is wrong.

Process: no core dumps, an address space bound, killed with its parent, no secrets in its
environment (the parent passes none), no descriptors but its sockets. DuckDB: no external access
but reading below one folder and spilling to another, no extensions, no secrets, one time zone, one
collation, one null order, and a configuration that cannot change any more.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import duckdb

from storage.engine.settings import EngineSettings

FIXED = "$fixed"
CLOCK_VARIABLE = "$now"
_STACK_BYTES = 16 << 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38

_NOW = f"CAST(getvariable('{CLOCK_VARIABLE}') AS TIMESTAMPTZ)"
_LOCAL = f"CAST({_NOW} AS TIMESTAMP)"
_DATE = f"CAST({_NOW} AS DATE)"
_TIME = f"CAST({_LOCAL} AS TIME)"
_CLOCK_MACROS = {
    "now": _NOW,
    "current_timestamp": _NOW,
    "get_current_timestamp": _NOW,
    "transaction_timestamp": _NOW,
    "current_date": _DATE,
    "today": _DATE,
    "current_time": _TIME,
    "get_current_time": _TIME,
    "localtime": _TIME,
    "current_localtime": _TIME,
    "localtimestamp": _LOCAL,
    "current_localtimestamp": _LOCAL,
}
#: Words of SQL for who and where one is: the same for everybody. DuckDB would tell the name of the
#: scope, whose number counts what others asked (contract D10).
_PLACE_MACROS = {
    "current_catalog": "lakebus",
    "current_schema": "main",
    "current_user": "lakebus",
    "current_role": "lakebus",
    "session_user": "lakebus",
    "user": "lakebus",
}


def lock_process(parent_pid: int) -> None:
    """Ties this process to its parent and takes away what it never needs."""

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)  # the parent died before the line above
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    # Many threads wait on sockets here; short turns keep small queries from waiting on big ones.
    sys.setswitchinterval(0.001)
    # Parse trees are walked by recursion, and DuckDB lets expressions nest a thousand deep.
    sys.setrecursionlimit(20_000)
    threading.stack_size(_STACK_BYTES)


def bound_address_space(extra_bytes: int) -> None:
    """From now on the process can map `extra_bytes` more than it has mapped already."""

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def open_database(settings: EngineSettings, *, threads: int) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB, locked, with the clock macros in the catalog `$fixed`."""

    connection = duckdb.connect(
        ":memory:",
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "allow_unsigned_extensions": False,
            "allow_persistent_secrets": False,
            "python_enable_replacements": False,
            "errors_as_json": True,
            "memory_limit": f"{settings.memory_limit_bytes}B",
            "threads": threads,
            "temp_directory": settings.temp_directory,
            "max_temp_directory_size": f"{settings.temp_bytes_max}B",
            "default_null_order": "NULLS_LAST",
            "default_collation": "",
            "preserve_insertion_order": True,
        },
    )
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    connection.execute("SET GLOBAL Calendar = 'gregorian'")
    # Files never change under their name, so their footers may be kept, and need not be opened to
    # see whether they are still the same: 60 µs of CPU a file. Keeping their contents, too
    # (cache_local_files), took 15 to 25 % off point look-ups that nothing was pruned from, and
    # nothing certain off other queries, for memory that they need: the system's cache does it.
    connection.execute("SET GLOBAL parquet_metadata_cache = true")
    connection.execute("SET GLOBAL validate_external_file_cache = 'NO_VALIDATION'")
    # Who needs bytes reads them. Handing each read to one of eight more threads and waiting for it
    # was a tenth to a fifth of a small query over many small files (ADR 35), which the system's
    # cache has at hand anyway; and what nobody keeps needs no cache to be looked up in.
    connection.execute("SET GLOBAL async_threads = 0")
    connection.execute("SET GLOBAL enable_external_file_cache = false")
    connection.execute(f"ATTACH ':memory:' AS \"{FIXED}\"")
    _make_macros(connection)
    folder = settings.allowed_directory.rstrip("/") + "/"
    connection.execute(f"SET GLOBAL allowed_directories = [{quote_text(folder)}]")
    connection.execute("SET GLOBAL enable_external_access = false")
    connection.execute("SET GLOBAL lock_configuration = true")
    return connection


def quote_text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def quote_name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _make_macros(connection: duckdb.DuckDBPyConnection) -> None:
    """Contract D8: `now()` is the query's start by the database clock, in every spelling. And what
    else the session would say of itself."""

    for name, body in _CLOCK_MACROS.items():
        connection.execute(f'CREATE MACRO "{FIXED}".main."{name}"() AS {body}')
    for name, text in _PLACE_MACROS.items():
        connection.execute(f'CREATE MACRO "{FIXED}".main."{name}"() AS {quote_text(text)}')
    connection.execute(
        f'CREATE MACRO "{FIXED}".main.age(a) AS system.main.age(CAST({_DATE} AS TIMESTAMP), a), '
        "(a, b) AS system.main.age(a, b)"
    )
    connection.execute(f'CREATE MACRO "{FIXED}".main.ago(i) AS {_NOW} - CAST(i AS INTERVAL)')
