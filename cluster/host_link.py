"""The supervisor's end of the Ray host: starting the process, talking to it, ending it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.processes import ProcessMark
from lakebus.errors import StartRefused

_STOP_S = 20.0


class HostFailed(StartRefused):
    """Ray or the application did not start; the log of the host says why."""


class HostLink:
    """The supervisor's end of the Ray host."""

    def __init__(self, logs: Path, *, wiring: str, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with open(logs / "ray_host.log", "ab") as log:
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cluster.ray_host"),
                    *(str(theirs.fileno()), str(os.getpid()), wiring),
                ],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listens = False
        mark = ProcessMark.of(self._popen.pid)
        if mark is None:
            self._socket.close()
            raise HostFailed("The Ray host ended at once. `lakebus logs` tells more.")
        self.mark = mark

    def send(self, kind: str, **members: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone; whoever waits for its answer learns that
            self._socket.send((json.dumps({"kind": kind, **members}) + "\n").encode())

    async def wait_for(self, kind: str, *, timeout_s: float) -> dict[str, Any]:
        """The next message of this kind; raises HostFailed if the host fails or ends instead, or
        says nothing of the kind for so long."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._heard(kind)
        except TimeoutError:
            raise HostFailed(
                f"Ray and the application do not start within {timeout_s:.0f} s"
                " (ray.start_timeout_s). `lakebus logs` tells more."
            ) from None

    async def _heard(self, kind: str) -> dict[str, Any]:
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(sock=self._socket.dup())
        while True:
            line = await self._reader.readline()
            if not line:
                raise HostFailed("The Ray host ended while starting. `lakebus logs` tells more.")
            message: dict[str, Any] = json.loads(line)
            self._listens = self._listens or message["kind"] == "serve_started"
            if message["kind"] == kind:
                return message
            if message["kind"] == "failed":
                raise HostFailed(f"{message['error']} (`lakebus logs` tells more)")

    async def stop(self) -> None:
        """Let Ray end in good order, then see that it has."""
        steps = ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0))
        if self._listens:
            self.send("stop")
        if not self._listens or not await processes.wait_gone(self.mark, timeout_s=_STOP_S):
            await processes.stop([self.mark], steps)
        self._popen.wait(timeout=5)
        self._socket.close()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
