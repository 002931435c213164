"""The child process as the parent sees it: start, lanes, interrupt, kill, death.

The parent starts it from its own thread (the kernel ties the child to that thread's life), gives it
socket pairs and nothing else, and learns of its death by the sockets' end.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from lakebus.errors import StartRefused
from storage.engine.channels import Channel, ChildDied
from storage.engine.settings import EngineSettings
from storage.engine.wire import INTERRUPT, PING, READY, InterruptRequest, Ready, encode, frame

_BOOT = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from storage.arrow_alone import leave_pandas_out; leave_pandas_out(); "
    "from storage.engine.child_main import main; "
    "from storage.engine.settings import EngineSettings; "
    "main(EngineSettings(**given['settings']), given['parent'], given['control'], "
    "given['parsing'], given['lanes'])"
)
_LIBRARY_PATHS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class ChildProcess:
    """One child. Lanes are handed out to one query each."""

    def __init__(self, settings: EngineSettings, on_death: Callable[[ChildProcess], None]) -> None:
        self._settings = settings
        self._on_death = on_death
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._control: Channel | None = None
        self._pings = asyncio.Lock()
        self._free: list[tuple[int, Channel]] = []
        self._channels: list[Channel] = []
        self._reaper: asyncio.Task[None] | None = None
        self._parsing: Channel | None = None
        self.parse_lock = asyncio.Lock()
        self.alive = False
        self.kill_reason = ""
        self.ready = Ready("", 0)

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    @property
    def parsing(self) -> Channel:
        if self._parsing is None or not self.alive:
            raise ChildDied
        return self._parsing

    async def start(self) -> None:
        """Raises StartRefused when the child does not come up in time."""

        self._folder = tempfile.mkdtemp(
            prefix=f"child-{os.getpid()}-", dir=self._settings.temp_directory
        )
        with tempfile.TemporaryFile() as errors:
            ours = self._spawn(errors.fileno())
            self.alive = True
            try:
                while ours:
                    self._channels.append(await Channel.open(ours[0], self._lost))
                    del ours[0]
                self._control, self._parsing, *lanes = self._channels
                self._free = list(enumerate(lanes))
                async with asyncio.timeout(self._settings.start_deadline_s):
                    kind, payload = await self._control.next_frame()
                if kind != READY:
                    raise ChildDied
                self.ready = msgspec.msgpack.decode(payload, type=Ready)
            except (ChildDied, TimeoutError, msgspec.DecodeError) as error:
                self.kill("it did not start")
                errors.seek(0)
                told = errors.read()[-1500:].decode("utf-8", "replace").strip()
                raise StartRefused(
                    f"the SQL engine's child process did not start: {told or 'no reason given'}"
                ) from error
            except BaseException:
                self.kill("its start was cancelled")
                raise
            finally:
                for end in ours:  # those that no channel has taken over
                    end.close()

    def _spawn(self, errors: int) -> list[socket.socket]:
        pairs = [socket.socketpair() for _ in range(2 + self._settings.concurrent_queries)]
        theirs = [pair[1].fileno() for pair in pairs]
        settings = replace(self._settings, temp_directory=self._folder)
        given = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "settings": asdict(settings),
            "parent": os.getpid(),
            "control": theirs[0],
            "parsing": theirs[1],
            "lanes": theirs[2:],
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=_environment(self._folder),
                cwd=self._folder,
                pass_fds=theirs,
                start_new_session=True,
            )
        finally:
            for pair in pairs:
                pair[1].close()
        return [pair[0] for pair in pairs]

    def take_lane(self) -> tuple[int, Channel]:
        """Raises ChildDied. There are as many lanes as queries that may run, so one is free."""

        if not self.alive:
            raise ChildDied
        return self._free.pop()

    def give_back(self, index: int, lane: Channel) -> None:
        self._free.append((index, lane))

    def interrupt(self, index: int, sequence: int) -> None:
        if self._control is not None and self.alive:
            self._control.send(frame(INTERRUPT, encode(InterruptRequest(index, sequence))))

    async def ping(self) -> None:
        """Returns when the child's control thread has answered. Raises ChildDied."""

        async with self._pings:
            if self._control is None:
                raise ChildDied
            self._control.send(frame(PING))
            await self._control.next_frame()

    def kill(self, reason: str) -> None:
        """Ends the process at once, by its pid; the kernel frees all it holds."""

        self.kill_reason = self.kill_reason or reason
        if self._process is not None:
            self._process.kill()
        self._lost()

    async def gone(self) -> None:
        """Returns when the process is reaped and its spill folder is removed."""

        if self._reaper is not None:
            await self._reaper

    def _lost(self) -> None:
        if not self.alive:
            return
        self.alive = False
        for channel in self._channels:
            channel.close()
        if self._process is not None:
            self._process.kill()
        self._reaper = asyncio.get_running_loop().create_task(self._reap())
        self._on_death(self)

    async def _reap(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def _environment(home: str) -> dict[str, str]:
    """Only what Python and its libraries need; our secrets stay here."""

    kept = {name: os.environ[name] for name in _LIBRARY_PATHS if name in os.environ}
    return kept | {
        "HOME": home,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        # Each arena of glibc reserves address space, which is bounded.
        "MALLOC_ARENA_MAX": "4",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }


def remove_stale_folders(temp_directory: str) -> None:
    """Removes spill folders whose parent process is gone."""

    for folder in Path(temp_directory).glob("child-*-*"):
        parent = folder.name.split("-")[1]
        if parent.isdigit() and not Path(f"/proc/{parent}").exists():
            shutil.rmtree(folder, ignore_errors=True)
