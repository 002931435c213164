"""A wake-up signal for one waiting loop: remembered when nobody waits, joined when it comes twice.

It lives on one event loop; `set` from another thread goes through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio


class Wake:
    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, timeout_s: float) -> bool:
        """True when it was set since the last wait, False when the time is up. Clears it.

        A timer and a bare future instead of `asyncio.wait_for`, which makes a task each time.
        """

        if not self._is_set and timeout_s > 0:
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _expire, waiter)
            self._waiter = waiter
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        was_set, self._is_set = self._is_set, False
        return was_set


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
