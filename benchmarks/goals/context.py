"""What a benchmark may use: fresh stacks, a fresh PostgreSQL for peers, programs, options."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from benchmarks import machine, measures
from benchmarks.goals import processes
from benchmarks.goals.programs import Failed, Program, program, said
from benchmarks.goals.turns import Turns
from benchmarks.http1 import Connection
from benchmarks.stacks import RunningStack, running_stack
from cluster.embedded_postgres import EmbeddedPostgres

SERVE, DIRECT = "Serve", "direct"
_QUIET_CORES, _QUIET_S, _QUIET_WITHIN_S = 0.25, 1.0, 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """`peers`: the interpreter of the peers' environment; without it peers are not measured.
    `goals`: those that were asked for, None for all. `held_s`: for P21, None for its own."""

    out: Path
    peers: str | None
    quick: bool
    repetitions: int
    seconds: float
    pairs: int
    goals: frozenset[str] | None = None
    held_s: float | None = None

    def wants(self, goal: str) -> bool:
        """A benchmark whose goals are measured apart asks before each."""

        return self.goals is None or goal in self.goals


@dataclass(frozen=True, slots=True)
class PeerPostgres:
    dsn: str
    pid: int
    folder: Path

    def database(self) -> str:
        """The DSN of a new, empty database."""

        name = f"bench_{secrets.token_hex(6)}"

        async def create() -> None:
            connection = await asyncpg.connect(self.dsn)
            try:
                await connection.execute(f"CREATE DATABASE {name}")
            finally:
                await connection.close()

        asyncio.run(create())
        return urlunsplit(urlsplit(self.dsn)._replace(path=f"/{name}"))


@dataclass(slots=True)
class Context:
    options: Options
    starts: list[dict[str, Any]] = field(default_factory=list)
    _supervisors: list[int] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """Where programs' words go: not beside the results, which are kept."""

        return Path(tempfile.gettempdir()) / f"lakebus-bench-{os.getpid()}.log"

    # --- ours ------------------------------------------------------------------------------

    @contextmanager
    def stack(self, **settings: str) -> Iterator[RunningStack]:
        """A fresh stack, up and quiet. What starting it took is kept, for the goals about that."""

        load = os.getloadavg()[0]
        began, busy, known = time.monotonic(), processes.busy_seconds(), self.cpu_seconds()
        with running_stack(**settings) as stack, self._known(stack.supervisor):
            asyncio.run(asyncio.wait_for(_first_visible(stack), 60))
            first_visible_s = time.monotonic() - began
            strangers = processes.busy_seconds() - busy - (self.cpu_seconds() - known)
            wait_quiet(stack.supervisor)
            if not settings:
                memory = processes.memory_mib(stack.supervisor)
                self.starts.append(
                    {
                        "up_s": stack.start_s,
                        "first_visible_s": round(first_visible_s, 2),
                        "idle_memory_mib": sum(memory.values()),
                        "idle_memory_by_group_mib": dict(memory),
                        "load_average": round(load, 2),
                        "cores_of_others": round(max(strangers, 0.0) / first_visible_s, 3),
                    }
                )
            yield stack

    @contextmanager
    def _known(self, supervisor: int) -> Iterator[None]:
        self._supervisors.append(supervisor)
        try:
            yield
        finally:
            self._supervisors.remove(supervisor)

    def cpu_seconds(self) -> float:
        """Of this process, all that it started, and the stacks, which are nobody's children."""

        roots = (os.getpid(), *self._supervisors)
        return sum(sum(processes.cpu_seconds(root).values()) for root in roots)

    @contextmanager
    def stack_or_note(self, turns: Turns, **settings: str) -> Iterator[RunningStack | None]:
        """A stack that does not start is a finding, too; whoever else has a turn takes it."""

        with ExitStack() as opened:
            stack: RunningStack | None = None
            try:
                stack = opened.enter_context(self.stack(**settings))
            except Exception as error:  # noqa: BLE001 - written down
                turns.failures.append(f"lakebus up: {str(error)[:400]}")
            yield stack

    def doors(self, stack: RunningStack) -> dict[str, str]:
        doors = {SERVE: stack.url}
        if stack.ingest_url:
            doors[DIRECT] = stack.ingest_url
        return doors

    def load(
        self,
        stack: RunningStack,
        door_url: str,
        *,
        table: str,
        clients: int,
        seed: int,
        rows: int,
        warm_s: float = 1.0,
    ) -> Any:
        """A closed load on a table of its own, as a running program."""

        asyncio.run(
            asyncio.wait_for(measures.make_table(stack.url, stack.api_key, table), timeout=60)
        )
        order = {
            "url": door_url, "read_url": stack.url, "api_key": stack.api_key, "table": table,
            "clients": clients, "rows": rows, "seed": seed, "warm_s": warm_s,
        }  # fmt: skip
        return program("benchmarks.closed_load", order, log=self.log)

    # --- peers -----------------------------------------------------------------------------

    @contextmanager
    def postgres(self) -> Iterator[PeerPostgres]:
        """A server of the same version and settings as the stack's, with fsync on."""

        folder = Path(tempfile.mkdtemp(prefix="lakebus-bench-peers-"))
        if os.geteuid() == 0:
            folder.chmod(0o711)
        server = EmbeddedPostgres(folder / "server")
        try:
            asyncio.run(asyncio.wait_for(server.start(), 60))
            yield PeerPostgres(server.dsn, server.pid, folder)
        finally:
            asyncio.run(asyncio.wait_for(server.stop(), 60))
            shutil.rmtree(folder, ignore_errors=True)

    def peer(self, module: str, order: dict[str, Any]) -> Any:
        return program(f"benchmarks.peers.{module}", order, python=self._peers(), log=self.log)

    def peer_says(self, module: str, *arguments: str, timeout_s: float) -> Any:
        command = [self._peers(), "-m", f"benchmarks.peers.{module}", *arguments]
        return json.loads(said(command, timeout_s=timeout_s, log=self.log).splitlines()[-1])

    def says(self, module: str, *arguments: str, timeout_s: float) -> Any:
        """The JSON that a benchmark of its own prints."""

        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        return json.loads(said(command, timeout_s=timeout_s, log=self.log))

    def runs(self, module: str, *arguments: str, timeout_s: float) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        said(command, timeout_s=timeout_s, log=self.log)

    def _peers(self) -> str:
        if self.options.peers is None:
            raise Failed("no environment of peers was given (--peers)")
        return self.options.peers

    def about(self) -> dict[str, Any]:
        """Machine and versions, ours and peers'."""

        found: dict[str, Any] = dict(machine.describe())
        if self.options.peers is not None:
            found["peers"] = self.peer_says("versions", timeout_s=60)
        return found


def windowed(running: Program, root: int, *, seconds: float, limit_s: float) -> dict[str, Any]:
    """A window with the CPU that the processes below `root` took meanwhile, and that everybody
    else on the machine took: with more than a tenth of a core of others, do not trust a figure."""

    began, before, busy = time.monotonic(), processes.cpu_seconds(root), processes.busy_seconds()
    found = running.window(limit_s, seconds=seconds)
    cpu = processes.used(before, processes.cpu_seconds(root))
    busy, took = processes.busy_seconds() - busy, time.monotonic() - began
    known = sum(cpu.values()) + found.get("load_cpu_s", 0.0) + found.get("client_cpu_s", 0.0)
    requests = max(found["requests"], 1)
    return found | {
        "cores_of_others": round(max(busy - known, 0.0) / took, 3),
        "server_cpu_s": cpu,
        "server_cpu_us_per_request": {
            group: round(used * 1e6 / requests, 1) for group, used in cpu.items()
        },
    }


def wait_quiet(root: int, *, within_s: float = _QUIET_WITHIN_S) -> None:
    """Until the processes below take little of a core for a moment, or a time has passed."""

    end = time.monotonic() + within_s
    while time.monotonic() < end:
        before = processes.cpu_seconds(root)
        time.sleep(_QUIET_S)
        used = processes.used(before, processes.cpu_seconds(root))
        if sum(used.values()) < _QUIET_CORES * _QUIET_S:
            return


async def _first_visible(stack: RunningStack) -> None:
    """A row of a new table, written and read back by its token."""

    connection = Connection(stack.url, stack.api_key, timeout_s=50)
    answer = await connection.post_json("/v1/tables/first/rows?create=true", [{"id": 1}])
    if answer.status != 202:
        raise Failed(f"the first write was answered {answer.status}: {answer.body[:200]!r}")
    token = answer.json()["receipt"]["visibility_token"]
    answer = await connection.query("SELECT count(*) FROM first", min_visibility_token=token)
    if answer.status != 200:
        raise Failed(f"the first query was answered {answer.status}: {answer.body[:200]!r}")
    connection.close()
