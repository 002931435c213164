"""Work that ends when its caller goes away (contract D9)."""

from __future__ import annotations

import asyncio
from typing import Any

from serve_app.calls import Call


async def ended_or_left(call: Call, work: asyncio.Task[Any]) -> bool:
    """Waits for the work while watching the connection; whichever ends first ends the other.

    True: the client left first. The work is done in any case, and its outcome was looked at.
    """

    gone = asyncio.create_task(_disconnected(call))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        left = not work.done()
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.wait((work, gone))
    if left and not work.cancelled():
        work.exception()  # nobody is there to be told
    return left


async def _disconnected(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass
