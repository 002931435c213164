"""A PostgreSQL server of our own: made, started, watched and stopped by this class alone.

The server belongs to one data folder. What makes it safe to kill anything at any time:

- a new cluster is made in a draft folder and renamed (`postgres_cluster.py`), so a half-made
  one is never opened;
- `fsync`, `synchronous_commit` and `full_page_writes` are given on the command line, where neither
  a file nor ALTER SYSTEM can turn them off; checksums are on;
- a server that outlived its killed supervisor is found through its own `postmaster.pid` and only
  believed if it really runs in our data folder; it is stopped cleanly before the next start;
- the server listens on 127.0.0.1 only and asks for a SCRAM password that is kept in a 0600 file.

Stopping is SIGINT (fast shutdown), then SIGQUIT, to the recorded process only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import asyncpg

from cluster import postgres_binaries, processes
from cluster.ports import free_port, port_is_free
from cluster.postgres_binaries import Binaries, Identity, clean_environment
from cluster.postgres_cluster import SETTINGS, give, make_cluster, require_major
from cluster.private_files import write_private
from cluster.processes import ProcessMark
from lakebus.errors import StartRefused
from lakebus.settings_table import PostgresSettings

DATABASE = "lakebus"
_STOP_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
_POLL_S = 0.02
_TRANSIENT = ("pre-existing shared memory block", "is still in use", "lock file", "Address already")


@dataclass(frozen=True, slots=True)
class _Passwords:
    superuser: str
    owner: str


class EmbeddedPostgres:
    """The PostgreSQL of one stack.

    :param data_dir: the stack's folder; the cluster goes to `postgres/` below it, the log to
        `logs/postgres.log`, the passwords to `secrets/postgres.json` (0600).
    :param durable: False turns fsync off; for tests of things other than durability.
    :param sync_init: False skips the sync of a newly made cluster; for tests.
    :param port: 0 takes the port of the last start, or a free one.
    :param run_as_user: whom the server runs as when we are root.
    :param bin_dir: PostgreSQL's programs, instead of the ones that `find_binaries` finds.
    :param settings: server settings on top of `SETTINGS`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        durable: bool = True,
        sync_init: bool = True,
        port: int = 0,
        run_as_user: str = "nobody",
        bin_dir: Path | None = None,
        program_cache_dir: Path = postgres_binaries.CACHE_DIR,
        start_timeout_s: float = 30.0,
        settings: dict[str, str] | None = None,
    ) -> None:
        self._dir = data_dir.resolve()
        self._port_wanted = port
        self._run_as_user = run_as_user
        self._bin_dir = bin_dir
        self._program_cache_dir = program_cache_dir
        self._start_timeout_s = start_timeout_s
        self._sync_init = sync_init and durable
        self._settings = SETTINGS | (settings or {})
        if not durable:
            self._settings |= {"fsync": "off", "full_page_writes": "off"}
        self._popen: subprocess.Popen[bytes] | None = None
        self._mark: ProcessMark | None = None
        self._port: int | None = None
        self._passwords: _Passwords | None = None
        self.binaries: Binaries | None = None

    @classmethod
    def from_settings(cls, data_dir: Path, chosen: PostgresSettings) -> EmbeddedPostgres:
        """The server of a stack as its operator has set it."""
        return cls(
            data_dir,
            port=chosen.port,
            run_as_user=chosen.run_as_user,
            bin_dir=chosen.bin_dir,
            program_cache_dir=chosen.program_cache_dir,
            start_timeout_s=chosen.start_timeout_s,
        )

    # --- what it is ------------------------------------------------------------------------

    @property
    def dsn(self) -> str:
        """DSN of the database for lakebus, by the role that owns it (no superuser)."""
        return self._dsn("lakebus", self._secrets().owner, DATABASE)

    @property
    def superuser_dsn(self) -> str:
        """For backups and repairs only."""
        return self._dsn("postgres", self._secrets().superuser, DATABASE)

    @property
    def pid(self) -> int:
        return self.mark.pid

    @property
    def mark(self) -> ProcessMark:
        if self._mark is None:
            raise RuntimeError("PostgreSQL was not started")
        return self._mark

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError("PostgreSQL was not started")
        return self._port

    @property
    def cluster_dir(self) -> Path:
        return self._dir / "postgres" / "data"

    @property
    def log_path(self) -> Path:
        return self._dir / "logs" / "postgres.log"

    def _dsn(self, user: str, password: str, database: str) -> str:
        return f"postgresql://{user}:{quote(password)}@127.0.0.1:{self.port}/{database}"

    def _secrets(self) -> _Passwords:
        if self._passwords is None:
            raise RuntimeError("PostgreSQL was not started")
        return self._passwords

    # --- life ------------------------------------------------------------------------------

    async def start(self) -> str:
        """Make the cluster if there is none, start the server, and return the DSN.

        A server left over by a killed supervisor is stopped cleanly first. Raises StartRefused
        with what to change.
        """
        if self._mark is not None and self._mark.alive():
            return self.dsn
        home = self._dir / "postgres"
        self._make_folders(home)
        binaries, identity = await asyncio.to_thread(
            postgres_binaries.resolve,
            home,
            run_as_user=self._run_as_user,
            bin_dir=self._bin_dir,
            cache_dir=self._program_cache_dir,
        )
        self.binaries = binaries
        await self.stop_leftover()
        self._passwords = self._load_passwords()
        if not self.cluster_dir.exists():
            await asyncio.to_thread(
                make_cluster,
                self.cluster_dir,
                binaries,
                identity,
                password=self._passwords.superuser,
                sync=self._sync_init,
            )
        require_major(self.cluster_dir, binaries)
        give(self.cluster_dir, identity)
        await self._start_server(binaries, identity)
        await self._make_database()
        return self.dsn

    async def stop(self) -> None:
        """Stop the server cleanly; does nothing if it does not run."""
        if self._mark is not None:
            await processes.stop([self._mark], _STOP_STEPS)
        if self._popen is not None:
            self._popen.wait(timeout=5)
        self._popen = None
        self._mark = None

    async def wait_exit(self) -> int | None:
        """Return when the server has ended, whatever the reason; the exit code if we know it."""
        await processes.wait_gone(self.mark)
        return None if self._popen is None else self._popen.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    # --- making the cluster ----------------------------------------------------------------

    def _make_folders(self, home: Path) -> None:
        # Root's folders can be passed through, not listed, so that the server's user reaches its
        # own; an ordinary user's stay private.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            for folder in (self._dir, home):
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
            for name in ("logs", "secrets"):
                (self._dir / name).mkdir(mode=0o700, exist_ok=True)
                os.listdir(self._dir / name)
        except OSError as error:
            raise StartRefused(
                f"The data folder {self._dir} cannot be used by this user: {error.strerror}. Choose"
                " another with --data-dir, or start lakebus as the user who owns it."
            ) from error

    def _load_passwords(self) -> _Passwords:
        path = self._dir / "secrets" / "postgres.json"
        if not path.exists():
            if self.cluster_dir.exists():
                raise StartRefused(
                    f"The passwords of the database are gone ({path}). Put the file back from a"
                    " backup, or start with an empty --data-dir."
                )
            made = {"superuser": secrets.token_urlsafe(24), "owner": secrets.token_urlsafe(24)}
            write_private(path, json.dumps(made))
        try:
            return _Passwords(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StartRefused(
                f"{path} cannot be read as the passwords of the database: {error}. Put the file"
                " back from a backup."
            ) from error

    # --- starting --------------------------------------------------------------------------

    async def _start_server(self, binaries: Binaries, identity: Identity) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        port = self._port_wanted or self._remembered_port()
        while True:
            log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
            self._popen = self._spawn(binaries, identity, port)
            self._mark = ProcessMark.of(self._popen.pid)
            self._port = port
            if await self._answers(deadline):
                write_private(self._state_path, json.dumps(self._state()))
                return
            said = await self._end_failed_start(log_offset)
            if not any(words in said for words in _TRANSIENT) or time.monotonic() > deadline:
                raise StartRefused(
                    f"PostgreSQL does not start in {self.cluster_dir}. It says: {said.strip()}"
                )
            if not self._port_wanted and ("Address already" in said or "could not bind" in said):
                port = free_port()
            self._remove_stale_lock()
            await asyncio.sleep(0.2)

    def _spawn(self, binaries: Binaries, identity: Identity, port: int) -> subprocess.Popen[bytes]:
        command = [str(binaries.tool("postgres")), "-D", str(self.cluster_dir), "-p", str(port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with open(self.log_path, "ab") as log:
            return subprocess.Popen(
                identity.command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=clean_environment(),
                start_new_session=True,
                **identity.popen_arguments(),
            )

    async def _answers(self, deadline: float) -> bool:
        """Poll until the server takes a connection; False if it ended or time is up."""
        while time.monotonic() < deadline:
            if self._popen is None or self._popen.poll() is not None:
                return False
            try:
                connection = await asyncpg.connect(
                    self._dsn("postgres", self._secrets().superuser, "postgres"), timeout=5
                )
            except (OSError, asyncpg.CannotConnectNowError, TimeoutError):
                await asyncio.sleep(_POLL_S)
                continue
            except asyncpg.InvalidPasswordError:
                # Another server took our port between the choice and the bind: try elsewhere.
                return False
            await connection.close()
            return True
        return False

    async def _end_failed_start(self, log_offset: int) -> str:
        await self.stop()
        with open(self.log_path, "rb") as log:
            log.seek(log_offset)
            said = log.read(20_000).decode(errors="replace")
        lines = [line for line in said.splitlines() if "LOG:" not in line or "could not" in line]
        return "\n".join(lines) or f"nothing within {self._start_timeout_s:.0f} s"

    @property
    def _state_path(self) -> Path:
        return self._dir / "postgres" / "state.json"

    def _state(self) -> dict[str, Any]:
        version = None if self.binaries is None else self.binaries.version
        return {"port": self.port, "version": version, "process": self.mark.to_json()}

    def _remembered_port(self) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            port = int(json.loads(self._state_path.read_text())["port"])
            if port_is_free(port):
                return port
        return free_port()

    async def _make_database(self) -> None:
        """The role that lakebus works as and its database: both made once, on the first start."""
        connection = await asyncpg.connect(
            self._dsn("postgres", self._secrets().superuser, "postgres"), timeout=10
        )
        try:
            role = await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = 'lakebus'")
            if role is None:
                # DDL takes no parameters; the password is url-safe base64 of our own making.
                await connection.execute(
                    f"CREATE ROLE lakebus LOGIN CREATEDB PASSWORD '{self._secrets().owner}'"
                )
                await connection.execute("GRANT pg_monitor TO lakebus")
            known = await connection.fetchval(
                "SELECT 1 FROM pg_database WHERE datname = $1", DATABASE
            )
            if known is None:
                await connection.execute(f"CREATE DATABASE {DATABASE} OWNER lakebus")
        finally:
            await connection.close()

    # --- leftovers -------------------------------------------------------------------------

    async def stop_leftover(self) -> bool:
        """Stop a server that outlived its supervisor; True if there was one."""
        mark = self.leftover()
        if mark is None:
            return False
        if not await processes.stop([mark], _STOP_STEPS):
            raise StartRefused(
                f"An older PostgreSQL (process {mark.pid}) still uses {self.cluster_dir} and cannot"
                " be stopped by this user. Stop it as the user who started it."
            )
        return True

    def leftover(self) -> ProcessMark | None:
        """The server named in `postmaster.pid`, if it really runs in our data folder."""
        pid = self._locked_pid()
        if pid is None or processes.working_directory(pid) != self.cluster_dir:
            return None
        return ProcessMark.of(pid)

    def _locked_pid(self) -> int | None:
        try:
            return int((self.cluster_dir / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None

    def _remove_stale_lock(self) -> None:
        """Remove a lock file whose pid now belongs to a stranger (a container started again).

        Safe only when no server process, not even an orphaned backend, works in the folder.
        """
        pid = self._locked_pid()
        if pid is None or ProcessMark.of(pid) is None:
            return
        if not processes.working_in(self.cluster_dir):
            (self.cluster_dir / "postmaster.pid").unlink(missing_ok=True)
