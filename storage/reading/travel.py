"""Tables read at other snapshots: `FROM flights AT (VERSION => 12)` (contract D1, D2).

A reference with AT reads its own snapshot, in that snapshot's schema. Which one is decided before
the engine hears of the query, from the literal or the parameter, with the same look-up and the same
errors as the member `snapshot`; its files are held like those of the query's own snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from lakebus.clock import parse_time
from lakebus.errors import SnapshotNotFound, SqlError
from storage.engine.plans import At, Parameters
from storage.reading.holds import Hold, Pins
from storage.reading.resolve import SNAPSHOT_ID_MAX, SnapshotChoice


def choice_of(at: At, parameters: Parameters) -> SnapshotChoice:
    """The snapshot that an AT names. Raises SqlError, SnapshotNotFound."""

    value = at.literal if at.parameter is None else _bound(at.parameter, parameters)
    if at.unit == "version":
        return SnapshotChoice(snapshot_id=_version(value))
    return SnapshotChoice(time=_time(value))


def _bound(name: str, parameters: Parameters) -> object:
    """The value of a parameter; what else is wrong with the parameters, the engine says."""

    if isinstance(parameters, Mapping):
        if name in parameters:
            return parameters[name]
    elif parameters is not None and name.isdigit() and 1 <= int(name) <= len(parameters):
        return parameters[int(name) - 1]
    raise SqlError(f"a value is missing for the parameter {name[:80]} of AT")


def _version(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 40:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SqlError("AT (VERSION => …) takes the id of a snapshot, a whole number like 12")
    if not 0 <= value <= SNAPSHOT_ID_MAX:
        raise SnapshotNotFound(f"there is no snapshot {str(value)[:40]}")
    return value


def _time(value: object) -> dt.datetime:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, OverflowError):
            return parse_time(value)
    raise SqlError(
        "AT (TIMESTAMP => …) takes a time with a zone and at most microseconds, like "
        "'2026-01-31T12:00:00Z'"
    )


class Held(Protocol):
    """The right to read the files of what a query reads; see `Hold`."""

    def check(self) -> None: ...

    def when_broken(self, stop: Callable[[], object] | None) -> None: ...

    def when_released(self, end: Callable[[], object]) -> None: ...

    def guarded(self) -> contextlib.AbstractAsyncContextManager[None]: ...

    def release(self) -> None: ...


class Holds:
    """Several holds as one: broken as soon as one of them is."""

    __slots__ = ("_holds",)

    def __init__(self, holds: Sequence[Hold]) -> None:
        self._holds = tuple(holds)

    def check(self) -> None:
        for hold in self._holds:
            hold.check()

    def when_broken(self, stop: Callable[[], object] | None) -> None:
        for hold in self._holds:
            hold.when_broken(stop)

    def when_released(self, end: Callable[[], object]) -> None:
        self._holds[0].when_released(end)

    @contextlib.asynccontextmanager
    async def guarded(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for hold in self._holds:
                await stack.enter_async_context(hold.guarded())
            yield

    def release(self) -> None:
        for hold in self._holds:
            hold.release()


async def hold_all(pins: Pins, snapshot_ids: Sequence[int]) -> Held:
    """Holds every one of the snapshots, or none. Raises what `Pins.hold` raises."""

    distinct = list(dict.fromkeys(snapshot_ids))
    if len(distinct) == 1:
        return await pins.hold(distinct[0])
    wanted = [asyncio.ensure_future(pins.hold(one)) for one in distinct]
    try:
        return Holds(await asyncio.gather(*wanted))
    except BaseException:
        for one in wanted:
            one.cancel()
        for ended in await asyncio.gather(*wanted, return_exceptions=True):
            if isinstance(ended, Hold):
                ended.release()
        raise
