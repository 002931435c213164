"""Messages between processes: late, lost, twice, out of order; and the replies to them too.

A call ends for its caller in exactly one of these ways, whatever becomes of the effect:

* the answer, or the error that the other side raised;
* `refused`: there is nobody at the address; nothing happened;
* `lost`: the request, the reply or the other process was lost, or the time is up. The effect may
  have happened, may happen later, or may never happen.

The errors are made by the caller's edge, as the real edges make them (`actors.handles`,
`storage.postgres.failures`). After a lost call the request may still be on its way and take effect
long after its caller has heard that it was lost, or has died: what fences are for.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.simulation.event_loop import Process, SimulatedLoop

T = TypeVar("T")

MakeError = Callable[[], Exception]


@dataclass(slots=True)
class Weather:
    """How likely a message suffers; all zero is fair weather. Times are in seconds."""

    lost: float = 0.0
    twice: float = 0.0
    slow: float = 0.0
    slow_s: float = 1.0
    quick_s: float = 0.0005


class Endpoint:
    """Where a service is reached: the process that serves now, and the calls under way to it."""

    def __init__(self, loop: SimulatedLoop, process: Process) -> None:
        self._loop = loop
        self.process = process
        self.context = loop.context_of(process)
        self.under_way: dict[int, _Call] = {}

    def become(self, process: Process) -> None:
        """Another process serves from now on; what was under way to the old one is lost."""

        self.abandon()
        self.process = process
        self.context = self._loop.context_of(process)

    def abandon(self) -> None:
        calls, self.under_way = self.under_way, {}
        for call in calls.values():
            call.lose_later()


class _Call:
    """One call, from the caller's side."""

    __slots__ = ("answer", "lost", "network", "number")

    def __init__(self, network: Network, answer: asyncio.Future[Any], lost: MakeError) -> None:
        self.network = network
        self.answer = answer
        self.lost = lost
        self.number = network.next_number()

    def lose_later(self) -> None:
        """The caller notices after a while."""

        self.network.after(self.network.delay_s() + self.network.notice_s(), self._lose)

    def _lose(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(self.lost())

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def settle(self, task: asyncio.Task[Any]) -> None:
        if self.answer.done():
            return
        error = task.exception()
        if error is None:
            self.answer.set_result(task.result())
        else:
            self.answer.set_exception(error)


class Network:
    def __init__(self, loop: SimulatedLoop, source: random.Random) -> None:
        self._loop = loop
        self._random = source.random
        self._expovariate = source.expovariate
        self._context: contextvars.Context = loop.context_of(loop.world)
        self._numbers = 0
        self.weather = Weather()
        self.counts: Counter[str] = Counter()

    async def call(
        self,
        endpoint: Endpoint,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        lost: MakeError,
        refused: MakeError,
        timeout_s: float,
        repeatable: bool = False,
        weather: Weather | None = None,
    ) -> T:
        """`repeatable`: the network may deliver the request twice."""

        answer: asyncio.Future[T] = self._loop.create_future()
        call = _Call(self, answer, lost)
        weather = weather or self.weather
        if weather.lost and self._random() < weather.lost:
            self.counts["requests lost"] += 1
            call.lose_later()
        else:
            self._send(endpoint, call, work, refused, weather)
            if repeatable and weather.twice and self._random() < weather.twice:
                self.counts["requests twice"] += 1
                self._send(endpoint, call, work, refused, weather)
        timer = self._loop.call_at(self._loop.time() + timeout_s, call._lose, context=self._context)
        try:
            return await answer
        finally:
            timer.cancel()
            endpoint.under_way.pop(call.number, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen, also when the caller was cancelled at this moment

    def cast(self, process: Process, heard: Callable[[], object]) -> None:
        """A datagram: may be lost, late or repeated, and nobody knows."""

        weather = self.weather
        for _ in range(1 + (self._random() < weather.twice)):
            if self._random() < weather.lost:
                self.counts["datagrams lost"] += 1
                continue
            context = self._loop.context_of(process)
            self._loop.call_later(self.delay_s(), heard, context=context)

    def _send(
        self,
        endpoint: Endpoint,
        call: _Call,
        work: Callable[[], Coroutine[Any, Any, T]],
        refused: MakeError,
        weather: Weather,
    ) -> None:
        def deliver() -> None:
            process = endpoint.process
            if not process.alive:
                self.after(self.delay_s(weather), lambda: call.fail(refused()))
                return
            if not call.answer.done():
                endpoint.under_way[call.number] = call
            task = self._loop.create_task(work(), name="call", context=endpoint.context)
            task.add_done_callback(reply, context=self._context)

        def reply(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # seen, whether somebody still waits for it or not
            if call.answer.done():
                return
            if task.cancelled() or (weather.lost and self._random() < weather.lost):
                self.counts["replies lost"] += 1
                call.lose_later()
                return
            self.after(self.delay_s(weather), lambda: call.settle(task))

        self.after(self.delay_s(weather), deliver)

    def after(self, delay_s: float, act: Callable[[], object]) -> None:
        self._loop.call_later(delay_s, act, context=self._context)

    def delay_s(self, weather: Weather | None = None) -> float:
        weather = weather or self.weather
        if weather.slow and self._random() < weather.slow:
            self.counts["messages slow"] += 1
            return self._random() * weather.slow_s
        return weather.quick_s * (0.2 + self._random())

    def notice_s(self) -> float:
        """How long until a broken connection is noticed."""

        return min(1.0, self._expovariate(8.0))

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers
