"""Health: `/healthz` says that the process lives, `/readyz` that what it needs answers."""

from __future__ import annotations

import asyncio
import logging

from lakebus.errors import HistoryRewound, Unavailable
from serve_app.calls import Answer, Call, Parameters
from serve_app.dependencies import Dependencies, ReadyCheck

_log = logging.getLogger(__name__)


async def get_healthz(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    return Answer({"status": "ok"})


async def get_readyz(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    """Asks everything at once; raises Unavailable naming what does not answer, HistoryRewound when
    the catalog went back in time: waiting does not help, an operator has to."""

    names = list(app.ready)
    answers = await asyncio.gather(
        *(_answers(name, app.ready[name], app.limits.ready_check_s) for name in names)
    )
    failing = [name for name, answered in zip(names, answers, strict=True) if not answered]
    if failing:
        raise Unavailable(f"not answering: {', '.join(failing)}", failing=failing)
    return Answer({"status": "ready", "checks": names})


async def _answers(name: str, check: ReadyCheck, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await check()
    except HistoryRewound:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is "not ready"
        _log.warning("%s does not answer: %r", name, error)
        return False
    return True
