"""`lakebus status`: what runs and what is wrong, found from outside.

Reads the data folder and asks the processes and ports themselves, so that it works exactly when
things are broken; it starts nothing and needs neither Ray nor the database's schema.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field
from typing import Any

import asyncpg

from cluster import components
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.leftovers import leftovers
from cluster.maintain_command import job_words
from cluster.stack import answers
from cluster.stack_files import StackFiles
from lakebus.client import connect
from lakebus.errors import LakebusError
from lakebus.settings import Settings

_JOBS_SHOWN, _ASK_S = 3, 3.0
RUNNING, BROKEN, STOPPED = 0, 1, 3
"""Exit codes, as init scripts have them: running, running badly, not running."""


@dataclass(frozen=True, slots=True)
class StackStatus:
    """The answer of `lakebus status --json`."""

    state: str
    data_dir: str
    url: str | None = None
    ingest_url: str | None = None
    query_url: str | None = None
    supervisor_pid: int | None = None
    ray_pid: int | None = None
    postgres_pid: int | None = None
    postgres: str = "unknown"
    http: str = "unknown"
    direct: str = "unknown"
    queries: str = "unknown"
    store: str = "unknown"
    restarts: int = 0
    memory_bytes: int | None = None
    last_jobs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if self.state == "stopped":
            return STOPPED
        return BROKEN if self.problems or self.state != "running" else RUNNING

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"stack      {self.state} ({self.data_dir})"]
        if self.state != "stopped":
            lines += [
                f"url        {self.url or 'not yet'}",
                f"http       {self.http}",
                f"direct     {self.direct}",
                f"queries    {self.queries}",
                f"postgres   {self.postgres}",
                f"store      {self.store}",
                f"processes  up {self.supervisor_pid}, ray {self.ray_pid},"
                f" postgres {self.postgres_pid}",
                f"restarts   {self.restarts}",
            ]
        if self.memory_bytes:
            lines.append(f"memory     {self.memory_bytes // 2**20} MiB (proportional)")
        lines += [f"job        {job}" for job in self.last_jobs]
        return lines + [f"problem    {problem}" for problem in self.problems]


async def status(settings: Settings) -> StackStatus:
    """Look at the stack in the data folder of these settings."""
    files = StackFiles(settings.data_dir)
    state = files.state()
    if state is None:
        return StackStatus("stopped", str(files.root))
    problems: list[str] = []
    postgres = EmbeddedPostgres(files.root)
    server = postgres.leftover()
    living = await asyncio.to_thread(leftovers, state, state.stack_id)
    if not state.supervisor.alive():
        remains = len(living) + (1 if server else 0)
        if not remains:
            return StackStatus("stopped", str(files.root))
        problems.append(
            f"`lakebus up` ended without cleaning up and {remains} of its processes remain;"
            " `lakebus up` starts again, `lakebus down` clears away"
        )
    ray_lives = state.host is not None and state.host.alive()
    if state.phase == "ready" and not ray_lives:
        problems.append("Ray does not run; it is being started again if `lakebus up` lives")
    database = await _database_words(settings, files, problems, embedded_lives=server is not None)
    http = await _http_words(state.url, problems) if state.url else "not started yet"
    return StackStatus(
        state={"ready": "running"}.get(state.phase, state.phase)
        if state.supervisor.alive()
        else "killed",
        data_dir=str(files.root),
        url=state.url,
        ingest_url=state.ingest_url,
        query_url=state.query_url,
        supervisor_pid=state.supervisor.pid,
        ray_pid=state.host.pid if state.host else None,
        postgres_pid=server.pid if server else None,
        postgres=database,
        http=http,
        direct=await asyncio.to_thread(_direct_words, state.ingest_url),
        queries=await asyncio.to_thread(_direct_words, state.query_url),
        store=_store_words(settings),
        restarts=state.restarts,
        memory_bytes=await asyncio.to_thread(
            _memory_bytes,
            [state.supervisor.pid, *(one.pid for one in living), *([server.pid] if server else [])],
        ),
        last_jobs=await asyncio.to_thread(_last_jobs, files) if http == "ready" else [],
        problems=problems,
    )


async def _database_words(
    settings: Settings, files: StackFiles, problems: list[str], *, embedded_lives: bool
) -> str:
    if settings.postgres.dsn is None:
        if not embedded_lives:
            problems.append("the embedded PostgreSQL does not run; see `lakebus logs postgres`")
            return "does not run"
        return "embedded, runs"
    try:
        connection = await asyncpg.connect(settings.postgres.dsn.get_secret_value(), timeout=5)
    except (OSError, TimeoutError, asyncpg.PostgresError) as error:
        problems.append(f"the external PostgreSQL cannot be reached: {error}")
        return "cannot be reached"
    await connection.close()
    return "external, answers"


def _store_words(settings: Settings) -> str:
    """Of the stack that runs, whose settings may differ from those of this command."""
    files = StackFiles(settings.data_dir)
    try:
        running = components.read_settings(str(files.root / components.SETTINGS_FILE))
        return components.object_store_words(running)
    except LakebusError:
        return "unknown"


async def _http_words(url: str, problems: list[str]) -> str:
    ready, said = await asyncio.to_thread(answers, f"{url}/readyz")
    if ready:
        return "ready"
    problems.append(f"{url}/readyz is not ready: {said}")
    return "not ready"


def _direct_words(url: str | None) -> str:
    """No problem of the stack: without its direct doors, all goes through the url."""
    if url is None:
        return "closed"
    found, said = answers(f"{url}/healthz")
    return f"{url} {'answers' if found else f'does not answer ({said})'}"


def _last_jobs(files: StackFiles) -> list[str]:
    """The newest jobs of maintenance, where the stack's own key lets us ask."""
    found = files.connection()
    if found is None:
        return []
    try:
        with connect(found["url"], found["api_key"], timeout_s=_ASK_S) as client:
            return [job_words(job) for job in client.jobs(limit=_JOBS_SHOWN)]
    except LakebusError:  # the rest of the answer says what is wrong
        return []


def _memory_bytes(pids: list[int]) -> int | None:
    """Proportional set size of these processes: shared pages are counted once in the sum."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as lines:
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:  # gone, or another user's (PostgreSQL under root)
            continue
    return total * 1024 or None
