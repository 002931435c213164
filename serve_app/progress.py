"""Whether this process still makes progress: what Serve asks before it replaces a replica.

A replica is ill when its own work stands still: a question that neither succeeds nor fails, an
append that never ends, an engine that is gone. A database that is away answers "unavailable" and
makes no replica ill: replacing all of them would help nobody, and make the outage longer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lakebus.errors import RetryLater
from serve_app.dependencies import Dependencies, ReadyCheck


class StandsStill(Exception):
    """The replica should be replaced; the text says why."""


@dataclass(frozen=True, slots=True)
class ProgressLimits:
    answer_s: float = 10.0
    append_s: float = 60.0


async def assert_progress(app: Dependencies, limits: ProgressLimits) -> None:
    """Raises StandsStill."""

    await _comes_back("the catalog", app.catalog.head, limits.answer_s)
    for name, check in app.health.items():
        try:
            async with asyncio.timeout(limits.answer_s):
                await check()
        except (TimeoutError, RetryLater) as error:
            raise StandsStill(f"{name} does not answer") from error
    if app.ingest is not None and app.ingest.oldest_append_s > limits.append_s:
        raise StandsStill(f"an append has been waiting for more than {limits.append_s:g} s")


async def _comes_back(name: str, check: ReadyCheck, within_s: float) -> None:
    """An answer or a typed refusal within the time; only silence counts."""

    try:
        async with asyncio.timeout(within_s):
            await check()
    except RetryLater:
        return
    except TimeoutError as error:
        raise StandsStill(f"{name} neither answers nor refuses") from error
