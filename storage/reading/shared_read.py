"""One read for many callers, never older than any of them asked for.

What is safe to share: a read that has not started yet. A caller that arrives while a read is under
way may not take its answer, because the database may have answered before the caller came
(contract D2, D5). So callers board the next read; it departs on the loop's next turn, and when
`parallel` reads are under way, as soon as one of them lands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from lakebus.errors import Unavailable

_Value = TypeVar("_Value")


class SharedRead(Generic[_Value]):
    """Shares reads among the callers of one event loop.

    A read that does not answer within `read_s` fails with Unavailable, so a connection that went
    silent costs its callers that time and no more. A caller that is cancelled does not stop the
    read for the others.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[_Value]],
        *,
        parallel: int = 2,
        read_s: float = 5.0,
        what: str = "the catalog",
    ) -> None:
        self._read = read
        self._parallel = parallel
        self._read_s = read_s
        self._what = what
        self._boarding: list[asyncio.Future[_Value]] = []
        self._departing = False
        self._under_way: set[asyncio.Task[None]] = set()

    async def fresh(self) -> _Value:
        """The value by a read that starts after this call. Raises what the read raises, and
        Unavailable when it does not answer."""

        if self._parallel == 0:
            raise self._closed()
        caller: asyncio.Future[_Value] = asyncio.get_running_loop().create_future()
        self._boarding.append(caller)
        self._depart_if_free()
        return await caller

    async def close(self) -> None:
        """Ends the reads under way; their callers get Unavailable."""

        tasks = list(self._under_way)
        self._parallel = 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left, self._boarding, self._departing = self._boarding, [], False
        _fail(left, self._closed())

    def _depart_if_free(self) -> None:
        if self._departing or len(self._under_way) >= self._parallel:
            return
        self._departing = True
        task = asyncio.get_running_loop().create_task(self._fly())
        self._under_way.add(task)
        task.add_done_callback(self._land)

    async def _fly(self) -> None:
        # The first step of the task: who boards from here on waits for another read.
        callers, self._boarding = self._boarding, []
        self._departing = False
        try:
            async with asyncio.timeout(self._read_s):
                value = await self._read()
        except TimeoutError as error:
            failure = Unavailable(f"{self._what} did not answer in time", retry_after_s=1.0)
            failure.__cause__ = error
            _fail(callers, failure)
        except asyncio.CancelledError:
            _fail(callers, self._closed())
            raise
        except Exception as error:  # noqa: BLE001 (handed on to every caller, none is swallowed)
            _fail(callers, error)
        else:
            for caller in callers:
                if not caller.done():
                    caller.set_result(value)

    def _land(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if self._boarding:
            self._depart_if_free()

    def _closed(self) -> Unavailable:
        return Unavailable(f"{self._what} is not read here any more", retry_after_s=1.0)


def _fail(callers: list[asyncio.Future[_Value]], error: Exception) -> None:
    for caller in callers:
        if not caller.done():
            caller.set_exception(error)
            caller.exception()  # seen: a caller that is cancelled in this very moment never looks
