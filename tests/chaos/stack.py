"""The stack of a run: started as an operator does, in a folder of its own, with all that a
placement needs around it (a PostgreSQL behind a proxy, a Ray cluster of two nodes).

An operator's service manager starts `lakebus up` again when it ends; `keep_up` does that, counts
it, and tells when nobody asked for the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from cluster import ray_environment
from cluster.leftovers import leftovers, with_stack_id
from cluster.ports import PortClaims
from cluster.processes import ProcessMark
from cluster.ray_environment import STACK_VARIABLE, RayPlace
from cluster.stack_files import StackFiles
from lakebus.settings import Settings
from tests.chaos.children import ROOT, Child, die_with_parent, environment
from tests.chaos.database import Superuser
from tests.chaos.disks import Disk, Objects, may_mount
from tests.chaos.kinds import Need, Placement
from tests.chaos.nodes import HEALTH
from tests.postgres_server import new_data_dir

START_S = 330.0
_STOP_S = 60.0
_MIB = 1024 * 1024
#: Short leases and small limits, so that a run of minutes meets expiry, rotation and purge.
SETTINGS: Mapping[str, str] = {
    "LAKEBUS_BUS_LEASE_TTL_MS": "1000",
    "LAKEBUS_BUS_CLAIM_CHECK_BYTES": str(16 * 1024),
    "LAKEBUS_BUS_SEGMENT_RING_ROTATE_BYTES": str(_MIB),
    "LAKEBUS_BUS_SEGMENT_RING_ROTATE_AGE_S": "15",
    # A busy machine takes its time; how long is in the report.
    "LAKEBUS_RAY_START_TIMEOUT_S": "300",
    "LAKEBUS_POSTGRES_COMMAND_TIMEOUT_MS": "8000",
    "LAKEBUS_HTTP_INGEST_REPLICAS": "2",
    "LAKEBUS_HTTP_QUERY_REPLICAS_MIN": "2",
    "LAKEBUS_HTTP_QUERY_REPLICAS_MAX": "2",
    "LAKEBUS_ACTORS_COORDINATORS": "2",
    "LAKEBUS_ACTORS_STALL_S": "10",
    "LAKEBUS_ACTORS_SUPERVISOR_TICK_MS": "500",
}
_NO_SPACE = os.strerror(errno.ENOSPC)
_OBJECTS_DISK_BYTES, _DATA_DISK_BYTES = 256 * _MIB, 3072 * _MIB


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    api_key: str


class StackDown(Exception):
    """The stack cannot be started, or does not get ready."""


class ChaosStack:
    """One stack and what is around it. Use as `async with`; `start` waits until it answers."""

    def __init__(
        self,
        placement: Placement,
        *,
        logs: Path,
        settings: Mapping[str, str] | None = None,
        small_disk: bool = True,
    ) -> None:
        """`small_disk`: objects lie on a small file system of their own, which can be filled."""
        self.placement = placement
        self.folder = new_data_dir()
        self.logs = logs
        self._settings = dict(settings or {})
        own_disk = may_mount()
        embedded = placement is Placement.TOGETHER
        self.disk = Disk(
            self.folder / "disk",
            size_bytes=_OBJECTS_DISK_BYTES if own_disk and small_disk else None,
        )
        self.data = Disk(
            self.folder / "stack",
            size_bytes=_DATA_DISK_BYTES if own_disk and embedded else None,
        )
        for folder in (self.disk.folder, self.data.folder):
            folder.chmod(0o711)
        self.objects = Objects(self.disk)
        self.files = StackFiles(self.data.folder)
        self.database_folder = self.data.folder if embedded else self.folder / "database"
        self.superuser = Superuser(self.database_folder)
        self.keeper: Child | None = None
        self.proxy: Child | None = None
        self.nodes: Child | None = None
        self.raylets: list[int] = []
        self._nodes_dir: Path | None = None
        self._up: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._expected_end = False
        self.unexpected_ends: list[str] = []
        self.starts = 0
        self._said_before = 0

    @property
    def offers(self) -> frozenset[Need]:
        found = set()
        if may_mount():
            found.add(Need.ROOT)
        if self.data.own:
            found.add(Need.OWN_DISK)
        return frozenset(found)

    @property
    def address(self) -> Address:
        connection = self.files.connection()
        if connection is None:
            raise StackDown("the stack has written no connection file yet")
        return Address(connection["url"], connection["api_key"])

    @property
    def restarts(self) -> int:
        """How often this `lakebus up` has started Ray's side again."""
        state = self.files.state()
        return 0 if state is None else state.restarts

    def roots(self) -> list[ProcessMark]:
        """What this run has started, to look for victims below."""
        found = [] if self._up is None else [ProcessMark.of(self._up.pid)]
        found += [child.mark for child in (self.keeper, self.nodes) if child is not None]
        # The server outlives a killed supervisor.
        with contextlib.suppress(OSError, ValueError):
            path = self.database_folder / "postgres" / "data" / "postmaster.pid"
            found.append(ProcessMark.of(int(path.read_text().split("\n", 1)[0])))
        # What has lost its parent is still ours.
        found += with_stack_id(self.files.stack_id())
        return [mark for mark in found if mark is not None]

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> float:
        """Starts everything; returns the seconds until the stack answered."""
        began_s = time.monotonic()
        settings = dict(SETTINGS) | self._settings
        settings["LAKEBUS_STORE_URL"] = self.objects.folder.as_uri()
        if self.placement is not Placement.TOGETHER:
            settings["LAKEBUS_ACTORS_PLACEMENT"] = "spread"
            settings["LAKEBUS_POSTGRES_DSN"] = await self._start_database()
        if self.placement is Placement.TWO_NODES:
            settings |= await self._start_nodes()
        self._environ = environment(PYTHONPATH=_python_path(), **settings)
        await self._start_up()
        self._watch = asyncio.create_task(self._keep_up(), name="keep up")
        await self.ready(timeout_s=START_S)
        return time.monotonic() - began_s

    async def ready(self, *, timeout_s: float) -> None:
        """Waits until this start of the stack says that it is ready, and answers. Raises
        StackDown."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            state = self.files.state()
            mine = self._up is not None and state is not None
            if mine and state is not None and self._up is not None:
                same = state.supervisor.pid == self._up.pid and state.phase == "ready"
                if same and await asyncio.to_thread(_answers, f"{state.url}/readyz"):
                    return
            await asyncio.sleep(0.1)
        raise StackDown(f"the stack was not ready within {timeout_s:.0f} s")

    async def kill_up(self, *, pause_s: float) -> None:
        """Ends `lakebus up` by SIGKILL and starts it again after a pause, as an operator would."""
        assert self._up is not None
        self._expected_end = True
        self._up.kill()
        await self._up.wait()
        await asyncio.sleep(pause_s)
        await self._start_up()
        self._expected_end = False

    async def stop(self) -> list[str]:
        """Stops everything in good order; returns what went wrong with that."""
        problems: list[str] = []
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._up is not None:
            self._expected_end = True
            with contextlib.suppress(ProcessLookupError):
                self._up.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_S):
                    code = await self._up.wait()
                if code != 0:
                    problems.append(f"`lakebus up` ended with {code} when it was asked to stop")
            except TimeoutError:
                problems.append(f"`lakebus up` did not stop within {_STOP_S:.0f} s")
                self._up.kill()
                await self._up.wait()
            left = leftovers(self.files.state(), self.files.stack_id())
            problems += [f"process {mark.pid} was left behind" for mark in left]
        for child in (self.nodes, self.proxy, self.keeper):
            if child is not None:
                await child.end(timeout_s=30.0)
        return problems

    def remove(self) -> None:
        """Deletes all files of the stack."""
        state = self.files.state()
        self.objects.put_back()
        for disk in (self.disk, self.data):
            disk.close()
        for folder in (None if state is None else state.run_dir, self._nodes_dir, self.folder):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def keep(self, into: Path) -> None:
        """Copies what tells about a failure: the logs and the objects."""
        state = self.files.state()
        places = {"logs": self.files.logs, "objects": self.objects.folder}
        if state is not None and state.run_dir:
            places["ray"] = Path(state.run_dir) / "ray" / "session_latest" / "logs"
        if self.database_folder != self.data.folder:
            places["database"] = self.database_folder / "logs"
        for name, place in places.items():
            with contextlib.suppress(OSError, shutil.Error):  # sockets, and what just went away
                shutil.copytree(place, into / name, ignore_dangling_symlinks=True)

    # --- inside ---------------------------------------------------------------------------------

    async def _start_up(self) -> None:
        with open(self.logs / "up.out", "ab") as output:
            self._said_before = output.tell()
            self._up = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lakebus", "up", "--port", "0"),
                *("--data-dir", str(self.data.folder)),
                cwd=ROOT,
                env=self._environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.starts += 1

    async def _keep_up(self) -> None:
        while True:
            process = self._up
            assert process is not None
            code = await process.wait()
            if self._expected_end or process is not self._up:
                await asyncio.sleep(0.1)
                continue
            if not (code == 1 and self._refused_for_space()):
                self.unexpected_ends.append(f"`lakebus up` ended by itself with {code}")
            await asyncio.sleep(1.0)
            await self._start_up()

    def _refused_for_space(self) -> bool:
        """Whether the last start says that it found the data disk full, as it should there.

        One that was ready, or that says it in another way than in a sentence of its own, counts as
        an end by itself. Whoever started it starts it again.
        """
        printed = (self.logs / "up.out").read_bytes()[self._said_before :]
        said = printed.decode(errors="replace").splitlines()
        refused = bool(said) and said[-1].startswith("lakebus: ") and _NO_SPACE in said[-1]
        return refused and not any(line.startswith("lakebus: ready") for line in said)

    async def _start_database(self) -> str:
        """Returns the DSN by which the stack reaches it: through the proxy."""
        self.database_folder.mkdir()
        self.keeper = await Child.start(
            "tests.chaos.database", str(self.database_folder), log=self.logs / "keeper.log"
        )
        said = await self.keeper.hear(timeout_s=60.0)
        self.proxy = await Child.start(
            "tests.faults.proxy",
            *("--upstream", f"127.0.0.1:{said['port']}"),
            log=self.logs / "proxy.log",
        )
        port = (await self.proxy.hear(timeout_s=20.0))["port"]
        parts = urlsplit(said["dsn"])
        login, _, _ = parts.netloc.rpartition("@")
        return str(urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{port}")))

    async def _start_nodes(self) -> dict[str, str]:
        """Returns the settings that attach a stack to them."""
        claims = PortClaims()
        first_port = claims.take_block()
        claims.release()
        if first_port is None:
            raise StackDown("no block of ports is free")
        self.files.make()
        stack_id = self.files.stack_id()
        settings = Settings.load(environ={}, flags={"data_dir": str(self.data.folder)})
        place = RayPlace(
            stack_id=stack_id,
            run_dir=ray_environment.run_dir_of(settings, stack_id),
            token_file=self.files.ray_token(),
            first_port=first_port,
        )
        self._nodes_dir = Path(tempfile.mkdtemp(prefix="lbn-"))
        (self._nodes_dir / "ray").mkdir()  # where Ray notes the cluster's address
        environ = ray_environment.environment(
            settings, place, environment(PYTHONPATH=_python_path())
        )
        # Not of the stack: a restart of the stack leaves its cluster alone.
        del environ[STACK_VARIABLE]
        environ["RAY_TMPDIR"] = str(self._nodes_dir)
        self.nodes = await Child.start(
            "tests.chaos.nodes",
            str(self._nodes_dir),
            log=self.logs / "nodes.log",
            environ={**environ, **HEALTH},
        )
        said = await self.nodes.hear(timeout_s=90.0)
        self.raylets = [said["raylet"]]
        await self.add_node()
        return {
            "LAKEBUS_RAY_ADDRESS": said["address"],
            "LAKEBUS_RAY_PORT_BASE": str(first_port),
        }

    async def add_node(self) -> None:
        assert self.nodes is not None
        self.raylets.append((await self.nodes.ask({"do": "add"}, timeout_s=90.0))["raylet"])

    async def remove_node(self, raylet: int) -> None:
        """Clears away what is left of a dead node."""
        assert self.nodes is not None
        self.raylets.remove(raylet)
        await self.nodes.ask({"do": "remove", "raylet": raylet}, timeout_s=60.0)


def _python_path() -> str:
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, [str(ROOT), given]))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
