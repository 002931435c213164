"""Tables that compaction leaves alone for a while, because a delete has lost to it again and again.

Both rewrite files, and whoever publishes first wins; a delete of a large table could lose for ever.
After some losses it says so by a pin that protects nothing and that everybody who plans rewrites
can see. It is renewed while the delete runs and ends by itself soon after the delete died; its id
is made of the job's, so the next attempt of the job takes it over. Nothing depends on it but speed:
who does not look loses a race, or wins one.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import Final

from lakebus.errors import OutcomeUnknown, Unavailable
from storage.maintenance.interface import Upkeep
from storage.maintenance.jobs import JobContext

#: The kind of such a pin; its note is the table's id.
PRIORITY: Final = "delete"
#: How long a delete that died keeps compaction away.
PRIORITY_TTL_S: Final = 30.0
_RENEW_SHARE: Final = 3
_NAMESPACE: Final = uuid.UUID("0c1d9f0a-7c55-4f2e-8c7e-3f3b0a6f6d41")


async def tables_taken(upkeep: Upkeep) -> frozenset[int]:
    """The ids of tables that a delete has asked to leave alone. Raises Unavailable."""

    pins = await upkeep.pins()
    return frozenset(int(pin.note) for pin in pins if pin.kind == PRIORITY and pin.note.isdigit())


class Priority:
    """What one delete asks of compaction."""

    def __init__(self, context: JobContext, *, table_id: int, job_id: uuid.UUID) -> None:
        self._context, self._note = context, str(table_id)
        self._pin_id = uuid.uuid5(_NAMESPACE, job_id.hex)
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> None:
        """From now on compaction leaves the table alone, until `end` or the end of this process."""

        if self._renewing is None:
            await self._pin()
            self._renewing = asyncio.create_task(self._renew(), name="priority")

    async def end(self) -> None:
        if self._renewing is None:
            return
        self._renewing.cancel()
        await asyncio.gather(self._renewing, return_exceptions=True)
        self._renewing = None
        # It expires by itself; an error here would hide the one that ends the job.
        with suppress(Unavailable, OutcomeUnknown):
            await self._context.upkeep.release_pin(self._pin_id)

    async def _renew(self) -> None:
        while True:
            await self._context.clock.sleep_s(PRIORITY_TTL_S / _RENEW_SHARE)
            await self._pin()

    async def _pin(self) -> None:
        with suppress(Unavailable, OutcomeUnknown):
            await self._context.upkeep.pin(
                self._pin_id, kind=PRIORITY, floor=None, ttl_s=PRIORITY_TTL_S, note=self._note
            )
