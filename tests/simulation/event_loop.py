"""A deterministic event loop: virtual time, no threads, no sleep, and processes that can die.

Why one seed gives one history: handles run in the order in which they were scheduled, timers in
the order of (time, number), and time moves only when nothing is runnable. Nothing here reads a
clock, a thread or an address.

A handle belongs to the process of its context (a context variable, which tasks hand on). The loop
asks the process before it runs a handle:

* a dead process never runs again: no cancellation, no `finally`, as after SIGKILL;
* a paused process keeps its handles, due timers included, and runs them when it goes on: a zombie;
* a process told to die after n more handles dies there, in the middle of whatever it does.

A run in which nothing is runnable and no timer is left can never end, so `run` raises `Hang`, with
who waits for what.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import traceback
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

T = TypeVar("T")

#: What one callback costs, so that a loop that never waits moves time too.
_STEP_S = 1e-6


class Hang(Exception):
    """The run cannot end; the text names every task and what it waits for."""


class Process:
    """A simulated operating system process: a name and whether its handles run."""

    __slots__ = ("alive", "dies_after", "name", "parked", "paused", "tasks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.dies_after: int | None = None
        self.parked: list[_Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []

    def kill(self) -> None:
        """Nothing of it ever runs again."""

        self.alive = False
        self.parked.clear()

    def __repr__(self) -> str:
        return f"<process {self.name}>"


PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("simulated process")


class _Handle:
    """What `call_soon` and `call_at` return."""

    __slots__ = ("arguments", "callback", "context", "is_cancelled", "when_s")

    def __init__(
        self,
        callback: Callable[..., object],
        arguments: tuple[Any, ...],
        context: contextvars.Context,
        when_s: float,
    ) -> None:
        self.callback = callback
        self.arguments = arguments
        self.context = context
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s


class SimulatedLoop:
    """Enough of an event loop for code without files, sockets and threads."""

    def __init__(self, *, steps_max: int) -> None:
        #: What asyncio takes it for; it never asks for more than is here.
        self._as_loop = cast(asyncio.AbstractEventLoop, self)
        self._now_s = 0.0
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._number = 0
        self._closed = False
        self._steps_left = steps_max
        self._steps_max = steps_max
        self.world = Process("world")
        self.processes: list[Process] = [self.world]
        self.complaints: list[str] = []
        #: How long work handed to a thread takes; replaced by the world.
        self.thread_s: Callable[[], float] = lambda: 0.0
        #: Called with a process that died by `dies_after`.
        self.on_death: Callable[[Process], None] = lambda process: None

    # --- running ----------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return self._steps_max - self._steps_left

    def new_process(self, name: str) -> Process:
        process = Process(name)
        self.processes.append(process)
        return process

    def context_of(self, process: Process) -> contextvars.Context:
        context = contextvars.Context()
        context.run(PROCESS.set, process)
        return context

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs the world's coroutine to its end. Raises Hang, and what it raises."""

        previous = events._get_running_loop()
        events._set_running_loop(self._as_loop)
        try:
            task = self.spawn(self.world, work, name="world")
            while not task.done():
                self._turn()
            return task.result()
        finally:
            events._set_running_loop(previous)

    def spawn(
        self, process: Process, work: Coroutine[Any, Any, T], *, name: str | None = None
    ) -> asyncio.Task[T]:
        return self.create_task(work, name=name, context=self.context_of(process))

    def resume(self, process: Process) -> None:
        """A paused process goes on with everything that became due meanwhile."""

        process.paused = False
        parked, process.parked = process.parked, []
        if process.alive:
            self._ready.extend(parked)

    def close(self) -> None:
        """Ends every coroutine that is left, without running the loop."""

        self._closed = True
        self._ready.clear()
        self._timers.clear()
        for process in self.processes:
            for task in process.tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    _close(task)
            process.tasks.clear()

    def _turn(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready:
            while timers and timers[0][2].is_cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Hang(f"nothing can run and no timer is left\n{self.who_waits()}")
            self._now_s = max(self._now_s, timers[0][0])
        now_s = self._now_s
        while timers and timers[0][0] <= now_s:
            handle = heapq.heappop(timers)[2]
            if not handle.is_cancelled:
                ready.append(handle)
        # What these handles schedule runs in the next turn, after timers that became due.
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            context = handle.context
            process = context.get(PROCESS, self.world)
            if not process.alive:
                continue
            if process.paused:
                process.parked.append(handle)
                continue
            self._now_s += _STEP_S
            context.run(handle.callback, *handle.arguments)
            self._steps_left -= 1
            if process.dies_after is not None:
                self._count_down(process)
        if self._steps_left <= 0:
            raise Hang(f"no end after {self._steps_max} steps\n{self.who_waits()}")

    def _count_down(self, process: Process) -> None:
        assert process.dies_after is not None
        process.dies_after -= 1
        if process.dies_after <= 0:
            process.dies_after = None
            process.kill()
            self.on_death(process)

    def who_waits(self) -> str:
        """Every task of a living process, and where it stands."""

        lines = []
        for process in self.processes:
            if not process.alive:
                continue
            lines.append(f"{process.name}{' (paused)' if process.paused else ''}:")
            lines += [f"  {place_of(task)}" for task in process.tasks if not task.done()]
        return "\n".join(lines)

    # --- what asyncio asks of a loop ----------------------------------------------------------

    def time(self) -> float:
        return self._now_s

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        handle = _Handle(callback, args, context or contextvars.copy_context(), self._now_s)
        if not self._closed:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        handle = _Handle(callback, args, context or contextvars.copy_context(), when)
        if not self._closed:
            self._number += 1
            heapq.heappush(self._timers, (when, self._number, handle))
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> _Handle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._as_loop)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **_: object,
    ) -> asyncio.Task[T]:
        task: asyncio.Task[T]
        if context is None:
            context = contextvars.copy_context()
        task = asyncio.Task(coro, loop=self._as_loop, name=name or "task", context=context)
        context.get(PROCESS, self.world).tasks.append(task)
        return task

    def run_in_executor(
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """The work happens at one moment, some time from now, on this thread."""

        done: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if done.done():
                return
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 (handed to whoever waits, as a thread does)
                done.set_exception(error)
            else:
                done.set_result(result)

        self.call_later(self.thread_s(), work)
        return done

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A task whose failure nobody looks at is a complaint about the product."""

        if not self._closed:
            self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")


def _close(task: asyncio.Task[Any]) -> None:
    try:
        task.get_coro().close()
    except BaseException as error:  # noqa: BLE001
        # What a coroutine does when it is thrown away is of no interest: in the simulated world
        # its process ended long ago, or the run is over.
        del error


def place_of(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack()
    if not frames:
        return f"{task.get_name()}: not started"
    frame = traceback.extract_stack(frames[-1], limit=1)[0]
    waiter = getattr(task, "_fut_waiter", None)
    return f"{task.get_name()}: {frame.name} at {frame.filename}:{frame.lineno}, on {waiter!r}"
