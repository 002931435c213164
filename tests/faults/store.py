"""A faulty object store: any store of ours, with the faults that a bucket or a disk really has.

What may go wrong is what `storage.files.objects.ObjectStore` allows, and nothing else (`ALLOWED`):
a put may fail before or after its effect, take effect long after it failed, be cut by the end of
the process, or wait; a read may fail or wait; nothing ever answers with other bytes, or denies an
object whose put has returned. So whatever these faults make the product answer is the product's.

Faults come from a plan: `Script` says which call meets which fault, `Seeded` draws them. Each call
is recorded with the fault that it met.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NoReturn, Protocol

from lakebus.clock import new_uuid
from lakebus.errors import Unavailable
from storage.files.objects import ObjectStore, check_key


class Operation(StrEnum):
    PUT = "put_new"
    GET = "get"
    GET_RANGE = "get_range"
    SIZE = "size"
    DELETE = "delete"
    LIST = "list"


class StoreFault(StrEnum):
    #: The call waits first, then goes well.
    SLOW = "slow"
    #: 500: nothing happened.
    ERROR = "error"
    #: 503 with a retry time: nothing happened.
    THROTTLED = "throttled"
    #: It took effect, and the answer was lost.
    LOST_ANSWER = "lost_answer"
    #: It failed, and takes effect afterwards all the same (a request still under way).
    LATE_EFFECT = "late_effect"
    #: No space left: nothing happened.
    FULL = "full"
    #: Half of the bytes are written under a temporary name, then the process dies.
    TORN = "torn"
    #: The call stands still before its effect, or after it, until `let_go`.
    HELD_BEFORE = "held_before"
    HELD_AFTER = "held_after"


_ANY = frozenset(
    {
        StoreFault.SLOW,
        StoreFault.ERROR,
        StoreFault.THROTTLED,
        StoreFault.HELD_BEFORE,
        StoreFault.HELD_AFTER,
    }
)
#: What the interface allows to happen to each operation.
ALLOWED: Mapping[Operation, frozenset[StoreFault]] = {
    Operation.PUT: frozenset(StoreFault),
    Operation.GET: _ANY,
    Operation.GET_RANGE: _ANY,
    Operation.SIZE: _ANY,
    Operation.DELETE: _ANY | {StoreFault.LOST_ANSWER},
    Operation.LIST: _ANY,
}


class Plan(Protocol):
    """Which fault a call meets; called once a call, in the order of the calls."""

    def __call__(self, operation: Operation, key: str, /) -> StoreFault | None: ...


class Script:
    """Faults said one by one. What no rule is left for goes well."""

    def __init__(self) -> None:
        self._rules: list[tuple[Operation, str, deque[StoreFault | None]]] = []

    def on(self, operation: Operation, *faults: StoreFault | None, prefix: str = "") -> Script:
        """The next calls of the operation on keys with the prefix meet these, in order."""

        for fault in faults:
            _check(operation, fault)
        self._rules.append((operation, prefix, deque(faults)))
        return self

    def __call__(self, operation: Operation, key: str) -> StoreFault | None:
        for wanted, prefix, faults in self._rules:
            if wanted is operation and key.startswith(prefix) and faults:
                return faults.popleft()
        return None


class Seeded:
    """Faults drawn from a seed. `rates` is the share of calls that meet each fault, where the
    interface allows it; a process that is not to die leaves TORN out."""

    def __init__(self, seed: int, rates: Mapping[StoreFault, float]) -> None:
        if sum(rates.values()) > 1 or min(rates.values(), default=0) < 0:
            raise ValueError("the rates are shares of all calls: positive, and 1 together at most")
        self._random = random.Random(seed)
        self._rates = dict(rates)

    def __call__(self, operation: Operation, key: str) -> StoreFault | None:
        drawn = self._random.random()
        for fault, rate in self._rates.items():
            drawn -= rate
            if drawn < 0:
                return fault if fault in ALLOWED[operation] else None
        return None


@dataclass(frozen=True, slots=True)
class Within:
    """A plan for the keys with one of these prefixes; all others go well."""

    plan: Plan
    prefixes: tuple[str, ...]

    def __call__(self, operation: Operation, key: str) -> StoreFault | None:
        return self.plan(operation, key) if key.startswith(self.prefixes) else None


@dataclass(frozen=True, slots=True)
class StoreCall:
    operation: Operation
    key: str
    fault: StoreFault | None


@dataclass(slots=True)
class _Gate:
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)


def die() -> NoReturn:
    """The end of the process, without any goodbye."""

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL came back")


class FaultyStore:
    """Implements `ObjectStore` over another one.

    :param slow_s: how long SLOW waits, and how much later LATE_EFFECT takes effect.
    """

    def __init__(
        self,
        under: ObjectStore,
        plan: Plan,
        *,
        slow_s: float = 0.05,
        end_process: Callable[[], NoReturn] = die,
    ) -> None:
        self.calls: list[StoreCall] = []
        self._under = under
        self._plan = plan
        self._slow_s = slow_s
        self._end_process = end_process
        self._gate = _Gate()
        self._late: set[asyncio.Task[None]] = set()

    # --- steering ---------------------------------------------------------------------------

    async def reached(self, *, within_s: float = 30.0) -> None:
        """Returns once a call stands still."""

        async with asyncio.timeout(within_s):
            await self._gate.reached.wait()

    def let_go(self) -> None:
        """Lets what stands still go on; the next held call stands still again."""

        gate, self._gate = self._gate, _Gate()
        gate.open.set()

    async def settle(self) -> None:
        """Waits until every late effect has happened."""

        while self._late:
            await asyncio.gather(*self._late)

    def faults(self, operation: Operation) -> list[StoreFault | None]:
        return [call.fault for call in self.calls if call.operation is operation]

    # --- the store ----------------------------------------------------------------------------

    async def put_new(self, key: str, data: bytes) -> None:
        fault = await self._begin(Operation.PUT, check_key(key))
        if fault is StoreFault.TORN:
            self._tear(key, data)
        if fault is StoreFault.LATE_EFFECT:
            task = asyncio.get_running_loop().create_task(self._put_late(key, data))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            raise Unavailable("the object store did not answer in time")
        await self._under.put_new(key, data)
        await self._end(fault)

    async def get(self, key: str) -> bytes:
        fault = await self._begin(Operation.GET, key)
        data = await self._under.get(key)
        await self._end(fault)
        return data

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        fault = await self._begin(Operation.GET_RANGE, key)
        data = await self._under.get_range(key, start, length)
        await self._end(fault)
        return data

    async def size(self, key: str) -> int | None:
        fault = await self._begin(Operation.SIZE, key)
        size = await self._under.size(key)
        await self._end(fault)
        return size

    async def delete(self, key: str) -> None:
        fault = await self._begin(Operation.DELETE, key)
        await self._under.delete(key)
        await self._end(fault)

    async def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        fault = await self._begin(Operation.LIST, prefix)
        async for item in self._under.list(prefix):
            yield item
        await self._end(fault)

    def local_path(self, key: str) -> Path | None:
        return self._under.local_path(key)

    # --- faults -------------------------------------------------------------------------------

    async def _begin(self, operation: Operation, key: str) -> StoreFault | None:
        fault = self._plan(operation, key)
        _check(operation, fault)
        self.calls.append(StoreCall(operation, key, fault))
        match fault:
            case StoreFault.SLOW:
                await asyncio.sleep(self._slow_s)
            case StoreFault.HELD_BEFORE:
                await self._stand_still()
            case StoreFault.ERROR:
                raise Unavailable("the object store answered 500")
            case StoreFault.THROTTLED:
                raise Unavailable("the object store asks for less", retry_after_s=self._slow_s)
            case StoreFault.FULL:
                raise Unavailable("the object store is full", retry_after_s=30.0)
        return fault

    async def _end(self, fault: StoreFault | None) -> None:
        if fault is StoreFault.HELD_AFTER:
            await self._stand_still()
        elif fault is StoreFault.LOST_ANSWER:
            raise Unavailable("the object store did not answer in time")

    async def _stand_still(self) -> None:
        gate = self._gate
        gate.reached.set()
        await gate.open.wait()

    async def _put_late(self, key: str, data: bytes) -> None:
        await asyncio.sleep(self._slow_s)
        await self._under.put_new(key, data)

    def _tear(self, key: str, data: bytes) -> NoReturn:
        path = self._under.local_path(key)
        if path is not None:  # a bucket shows nothing of a put that did not end
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.with_name(f".{new_uuid().hex}.tmp")
            torn.write_bytes(data[: len(data) // 2])
        self._end_process()


def _check(operation: Operation, fault: StoreFault | None) -> None:
    if fault is not None and fault not in ALLOWED[operation]:
        raise ValueError(f"no store may answer {operation} with {fault}")
