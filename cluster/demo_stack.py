"""A stack of the demo's own: started as a person would start it, and gone when the demo is gone.

The folder carries a mark that names the demo's process. So a second demo does not take the folder
of a running one, what a killed demo left is cleared away by the next, and a folder that is not a
demo's is never touched. Whatever ends the demo (its end, an error, Ctrl-C), `close` ends the stack.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster import leftovers
from cluster.down import take_down
from cluster.private_files import write_private
from cluster.processes import ProcessMark
from cluster.stack_files import StackFiles
from cluster.up import READY_PHASE
from lakebus.errors import StartRefused
from lakebus.settings import Settings

MARK = "demo.json"
_POLL_S = 0.1
_STOP_S = 60.0
#: Roles whose actor hosts a commit coordinator: `core` holds all roles, `coordinator-N` is spread.
_HOSTS = ("core", "coordinator")
#: What says where data lives or where to listen; the demo must never write into a stack of yours.
_NOT_INHERITED = (
    *("LAKEBUS_CONFIG", "LAKEBUS_DATA_DIR", "LAKEBUS_PROFILE", "LAKEBUS_HTTP_", "LAKEBUS_RAY_ADDR"),
    *("LAKEBUS_POSTGRES_DSN", "LAKEBUS_POSTGRES_EMBEDDED", "LAKEBUS_STORE_"),
)


class DemoStack:
    """Use: `prepare`, `start`, …, and `close` in any case."""

    def __init__(self, data_dir: Path, *, keep: bool) -> None:
        self.files = StackFiles(data_dir)
        self.output = self.files.root / "up.out"
        self._keep = keep
        self._prepared = False
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Settings:
        return Settings.load(environ={}, flags={"data_dir": self.files.root})

    def prepare(self) -> None:
        """Takes the folder. Raises StartRefused when it is somebody else's."""

        self._clear_earlier()
        self.files.make()
        own = ProcessMark.of(os.getpid())
        assert own is not None, "this process runs"
        write_private(self.files.root / MARK, json.dumps({"demo": own.to_json()}))
        self._prepared = True

    def start(self, say: Callable[[str], None]) -> tuple[str, str]:
        """Starts the stack, hands on what it says; returns (url, API key). Raises StartRefused."""

        command = [sys.executable, "-m", "lakebus", "up", "--port", "0"]
        self.output.touch(mode=0o600)  # the API key is printed
        with open(self.output, "wb") as output:
            self._child = subprocess.Popen(
                [*command, "--data-dir", str(self.files.root)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends the stack
            )
        mark = ProcessMark.of(self._child.pid)
        with open(self.output, errors="replace") as said:
            while self._child.poll() is None:
                for line in said:
                    if line.startswith("lakebus: "):
                        say(line.removeprefix("lakebus: ").strip())
                state = self.files.state()
                if state is not None and state.supervisor == mark and state.phase == READY_PHASE:
                    connection = self.files.connection()
                    assert connection is not None, "it is written before the phase changes"
                    return connection["url"], connection["api_key"]
                time.sleep(_POLL_S)
        words = self.output.read_text(errors="replace").strip()
        raise StartRefused(f"the demo's stack did not start:\n{words}")

    def close(self) -> None:
        """Ends the stack and, unless it is to be kept, removes the folder."""

        if self._child is not None:
            with suppress(subprocess.TimeoutExpired):
                self._child.terminate()
                self._child.wait(timeout=_STOP_S)
            self._child = None
        if not self._prepared:
            return
        asyncio.run(take_down(self.settings))
        if not self._keep:
            self._remove()

    def _clear_earlier(self) -> None:
        """Removes what an earlier demo left here."""

        root = self.files.root
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return
        try:
            owner = ProcessMark.from_json(json.loads((root / MARK).read_text())["demo"])
        except (OSError, ValueError, KeyError, TypeError):
            raise StartRefused(
                f"{root} exists and was not made by a demo; choose another folder with --data-dir."
            ) from None
        if owner is not None and owner.alive():
            raise StartRefused(f"A demo (process {owner.pid}) runs in {root} already.")
        asyncio.run(take_down(self.settings))
        self._remove()

    def _remove(self) -> None:
        state = self.files.state()
        if state is not None and state.run_dir:
            shutil.rmtree(state.run_dir, ignore_errors=True)
        shutil.rmtree(self.files.root, ignore_errors=True)


def kill(files: StackFiles, pid: int) -> None:
    """SIGKILLs a process, if it is one of this stack. Raises StartRefused."""

    mark, state = ProcessMark.of(pid), files.state()
    own = [] if state is None else leftovers.leftovers(state, state.stack_id)
    if mark is None or mark not in own or not mark.send(signal.SIGKILL):
        raise StartRefused(f"the process {pid} is not one of the stack in {files.root}")


def coordinator_pid(actors: object) -> int | None:
    """The process of the first actor that hosts a commit coordinator, if one answers."""

    for actor in actors if isinstance(actors, list) else []:
        pid = actor.get("process_id")
        if str(actor.get("role")).startswith(_HOSTS) and isinstance(pid, int):
            return pid
    return None


def _environment() -> dict[str, str]:
    return {n: value for n, value in os.environ.items() if not n.startswith(_NOT_INHERITED)}
