"""Arming failpoints of other processes: a folder that they look into when they reach one.

The folder is named by the environment variable `FAILPOINTS_DIR` (not `LAKEBUS_…`: those are
settings). In it `armed/<name>` tells action, how often to let pass and how often to act, and
counts both; whoever reaches the name takes its turn under a file lock, so each shot is fired once,
whatever processes meet at it, and a process killed in between leaves the count right. Before it
acts it leaves `reached/<name>.<shot>` with its pid; `resume/<name>` holds up to which shot pauses
are over.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.failpoints.actions import Action, from_json, to_json

VARIABLE = "FAILPOINTS_DIR"
SITE = Path(__file__).parent / "site"
#: Files of another process give no signal to an event loop, so they are looked at this often.
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Shot:
    """One action of one armed failpoint; `number` counts from 1."""

    name: str
    number: int
    action: Action


class FolderReader:
    """The side of the process under test."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def take(self, name: str) -> Shot | None:
        """The action for whoever reaches `name` now, taken so that nobody else gets it."""
        path = f"{self._folder}/armed/{name}"
        if not os.path.exists(path):
            return None
        with _locked(self._folder):
            try:
                state: dict[str, Any] = json.loads(Path(path).read_text())
            except FileNotFoundError:  # disarmed, or the last shot taken, a moment ago
                return None
            state["hits"] += 1
            over = state["times"] is not None and state["fired"] >= state["times"]
            fires = state["hits"] > state["skip"] and not over
            state["fired"] += fires
            _write(Path(path), json.dumps(state))
            if not fires:
                return None
            number = state["fired"]
            _write(Path(self._folder, "reached", f"{name}.{number}"), str(os.getpid()))
        return Shot(name, number, from_json(state["action"]))

    def resumed(self, shot: Shot) -> bool:
        try:
            return int(Path(self._folder, "resume", shot.name).read_text()) >= shot.number
        except FileNotFoundError:
            return False


class FailpointFolder:
    """The test's side. Leaving it as a context fails when an armed failpoint was never reached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._armed: set[str] = set()
        for part in ("armed", "reached", "resume"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            missed = sorted(name for name in self._armed if not self.shots(name))
            assert not missed, f"armed and never reached: {', '.join(missed)}"

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """`base` (default: ours) with what switches failpoints on in a child and all of its own."""
        kept = dict(os.environ if base is None else base)
        paths = [str(SITE), *(p for p in kept.get("PYTHONPATH", "").split(os.pathsep) if p)]
        return kept | {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: str(self.folder)}

    def arm(self, name: str, action: Action, *, skip: int = 0, times: int | None = 1) -> None:
        """Let `skip` pass, then act `times` times (None: always). Arming again starts afresh."""
        from tests.failpoints.markers import require_known  # the reading side needs no scan

        require_known(name)
        with _locked(str(self.folder)):
            self._forget(name)
            state = {
                "action": to_json(action),
                "skip": skip,
                "times": times,
                "hits": 0,
                "fired": 0,
            }
            _write(self.folder / "armed" / name, json.dumps(state))
        self._armed.add(name)

    def disarm(self, name: str) -> None:
        """Nobody is held or hurt at `name` from now on; whoever waits there goes on."""
        with _locked(str(self.folder)):
            (self.folder / "armed" / name).unlink(missing_ok=True)
            self._armed.discard(name)
        self.resume(name)

    def shots(self, name: str) -> int:
        """How often `name` acted since it was armed."""
        return len(list((self.folder / "reached").glob(f"{name}.*")))

    def resume(self, name: str) -> None:
        """Lets everybody go on who is paused at `name` now."""
        _write(self.folder / "resume" / name, str(self.shots(name)))

    async def reached(self, name: str, count: int = 1, *, within_s: float = 30.0) -> int:
        """The pid of the process that was the `count`-th to reach the armed failpoint."""
        path = self.folder / "reached" / f"{name}.{count}"
        deadline = time.monotonic() + within_s
        while not path.exists():
            assert time.monotonic() < deadline, f"nobody reached {name} within {within_s} s"
            await asyncio.sleep(POLL_S)
        return int(path.read_text())

    def _forget(self, name: str) -> None:
        (self.folder / "resume" / name).unlink(missing_ok=True)
        for path in (self.folder / "reached").glob(f"{name}.*"):
            path.unlink()


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    descriptor = os.open(f"{folder}/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for readers that hold no lock."""
    draft = path.parent.parent / f".{path.parent.name}.{path.name}.{os.getpid()}"
    draft.write_text(text)
    os.replace(draft, path)
