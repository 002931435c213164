"""Calls of a job to the catalog and the store, which may be away for a moment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from lakebus.errors import OutcomeUnknown, Unavailable
from storage.maintenance.jobs import JobContext

_Result = TypeVar("_Result")

#: Attempts of one call, about six seconds in all, and the wait after the first that failed.
ATTEMPTS: Final = 6
_BACKOFF_S: Final = 0.2


async def patiently(context: JobContext, call: Callable[[], Awaitable[_Result]]) -> _Result:
    """A call that may be repeated, while the catalog or the store is away for a moment. Repeated
    intents are no harm: those of a lost reply expire."""

    for attempt in range(1, ATTEMPTS):
        try:
            return await call()
        except (Unavailable, OutcomeUnknown):
            await wait(context, attempt)
    return await call()


async def wait(context: JobContext, attempt: int) -> None:
    """Twice as long after each attempt, spread so that many jobs do not come at once."""

    await context.clock.sleep_s(_BACKOFF_S * 2 ** (attempt - 1) * (0.5 + context.chance.jitter()))
