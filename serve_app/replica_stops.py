"""Hears of Serve's decision to stop a replica when it is made, not when the replica has drained.

Serve tells the application at the end of its own drain; until then the direct door would go on as
if nothing were. Where Serve has no such method any more, the door drains when the application ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.serve._private import replica as _replica

replica: Any = _replica
_METHOD = "_perform_graceful_shutdown"


def when_stopping(call: Callable[[], None]) -> None:
    """Makes this process's replica call it, on its loop, before it drains."""

    usual = getattr(replica.Replica, _METHOD, None)
    if usual is None:
        return

    async def told(self: Any) -> None:
        call()
        await usual(self)

    setattr(replica.Replica, _METHOD, told)
