"""What a marker becomes: `reach` and `reach_sync`, and the arming of failpoints in this process.

Unarmed, a reached failpoint costs one look at an empty dict. Armed, each arrival takes its turn
under a lock: the first `skip` pass, the next `times` meet the action. Signals are futures of
`concurrent.futures`, so that it does not matter in which thread or loop the product runs.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

from tests.failpoints.actions import Action, Crash, Delay, Pause, Raise, Run, Stop
from tests.failpoints.folder import POLL_S, VARIABLE, FolderReader, Shot


class Abandoned(RuntimeError):
    """Raised in whoever is still paused when its failpoint is disarmed: the test is over."""


@dataclass(slots=True, eq=False)
class Armed:
    """One armed failpoint of this process."""

    name: str
    action: Action
    skip: int
    times: int | None
    hits: int = 0
    fired: int = 0
    _waiting: list[tuple[int, Future[None]]] = field(default_factory=list)
    _paused: list[Future[None]] = field(default_factory=list)

    async def reached(self, count: int = 1, *, within_s: float = 30.0) -> None:
        """Returns once the action began for the `count`-th time."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._signal(count)), within_s)
        except TimeoutError:
            raise AssertionError(f"{self.name} was not reached within {within_s} s") from None

    def resume(self) -> None:
        """Lets everybody go on who is paused here now; who comes later is paused again."""
        with _lock:
            paused, self._paused = self._paused, []
        for future in paused:
            if not future.done():
                future.set_result(None)

    def _signal(self, count: int) -> Future[None]:
        future: Future[None] = Future()
        with _lock:
            if self.fired >= count:
                future.set_result(None)
            else:
                self._waiting.append((count, future))
        return future

    def _take(self) -> bool:
        """Under the lock: whether whoever arrives now meets the action."""
        self.hits += 1
        if self.hits <= self.skip or (self.times is not None and self.fired >= self.times):
            return False
        self.fired += 1
        for count, future in self._waiting:
            if self.fired >= count and not future.done():
                future.set_result(None)
        return True

    def _hold(self) -> Future[None]:
        future: Future[None] = Future()
        with _lock:
            self._paused.append(future)
        return future

    def _abandon(self) -> None:
        for future in self._paused:
            if not future.done():
                future.set_exception(Abandoned(f"the test ended at failpoint {self.name}"))


_lock = threading.RLock()
_armed: dict[str, Armed] = {}
_folder = FolderReader(os.environ[VARIABLE]) if VARIABLE in os.environ else None
_crash_forbidden_pid: int | None = None


def forbid_crash() -> None:
    """This process runs the tests: a failpoint must not kill it."""
    global _crash_forbidden_pid
    _crash_forbidden_pid = os.getpid()


class Failpoints:
    """What a test arms in its own process; at its end all is disarmed, and each must have been
    reached. `tests/conftest.py` has it as the fixture `failpoints`."""

    def __init__(self) -> None:
        self._mine: dict[str, Armed] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        self.close(check=kind is None)

    def arm(self, name: str, action: Action, *, skip: int = 0, times: int | None = 1) -> Armed:
        """Let `skip` arrivals pass, then act `times` times (None: always)."""
        from tests.failpoints.markers import require_known  # other processes need no scan

        require_known(name)
        if isinstance(action, (Crash, Stop)) and os.getpid() == _crash_forbidden_pid:
            raise ValueError(
                f"{type(action).__name__} would hit the process of the tests: arm it for a child"
                " (FailpointFolder), or use Pause and cancel the task"
            )
        armed = Armed(name, action, skip, times)
        with _lock:
            if name in _armed:
                raise ValueError(f"{name} is armed already; disarm it first")
            _armed[name] = armed
        self._mine[name] = armed
        return armed

    async def reached(self, name: str, count: int = 1, *, within_s: float = 30.0) -> None:
        await self._mine[name].reached(count, within_s=within_s)

    def resume(self, name: str) -> None:
        self._mine[name].resume()

    def disarm(self, name: str) -> None:
        """Nobody meets the action from now on; whoever is paused there goes on."""
        armed = self._mine.pop(name)
        with _lock:
            _armed.pop(name, None)
        armed.resume()
        assert armed.fired, f"{name} was armed and never reached"

    def close(self, *, check: bool = True) -> None:
        with _lock:
            for name, armed in self._mine.items():
                _armed.pop(name, None)
                armed._abandon()
            mine, self._mine = self._mine, {}
        missed = sorted(name for name, armed in mine.items() if not armed.fired)
        assert not check or not missed, f"armed and never reached: {', '.join(missed)}"


async def reach(name: str) -> None:
    """A marker in an async function."""
    if not _armed and _folder is None:
        return
    shot, armed = _take(name)
    if shot is None:
        return
    match shot.action:
        case Delay(seconds):
            await asyncio.sleep(seconds)
        case Pause(within_s) if armed is not None:
            await asyncio.wait_for(asyncio.wrap_future(armed._hold()), within_s)
        case Pause(within_s):
            deadline = time.monotonic() + within_s
            while not _resumed(shot, deadline):
                await asyncio.sleep(POLL_S)
        case Run(function):
            result = function()
            if inspect.isawaitable(result):
                await result
        case action:
            _act(action)


def reach_sync(name: str) -> None:
    """A marker in a plain function. What waits blocks the thread, as a slow call would."""
    if not _armed and _folder is None:
        return
    shot, armed = _take(name)
    if shot is None:
        return
    match shot.action:
        case Delay(seconds):
            time.sleep(seconds)
        case Pause(within_s) if armed is not None:
            armed._hold().result(within_s)
        case Pause(within_s):
            deadline = time.monotonic() + within_s
            while not _resumed(shot, deadline):
                time.sleep(POLL_S)
        case Run(function):
            if inspect.isawaitable(function()):
                raise TypeError(f"{name} is in a plain function: give Run a plain function")
        case action:
            _act(action)


def _take(name: str) -> tuple[Shot | None, Armed | None]:
    armed = _armed.get(name)
    if armed is not None:
        with _lock:
            fires = armed._take()
        return (Shot(name, armed.fired, armed.action), armed) if fires else (None, None)
    return (None if _folder is None else _folder.take(name)), None


def _resumed(shot: Shot, deadline: float) -> bool:
    assert _folder is not None
    if time.monotonic() > deadline:
        raise TimeoutError(f"nobody resumed failpoint {shot.name}")
    return _folder.resumed(shot)


def _act(action: Action) -> None:
    match action:
        case Crash():
            os.kill(os.getpid(), signal.SIGKILL)
        case Stop():
            os.kill(os.getpid(), signal.SIGSTOP)
        case Raise(error):
            raise error
        case _:
            raise AssertionError(f"{action} is not acted on here")
