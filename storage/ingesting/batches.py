"""What became of a batch: asked by its owner, who may wait for the end."""

from __future__ import annotations

import time

from lakebus.errors import BatchNotFound, RetryLater
from lakebus.tokens import VisibilityToken
from storage.bus.interface import BatchState, BatchStatus, IngestBus
from storage.ingesting.grants import Principal
from storage.reading.watcher import HeadWatcher, HistoryChanged

#: How long one wait for the next snapshot lasts before the batch is looked at again; a batch that
#: ends without a snapshot (a lone quarantine) is noticed within it.
LOOK_S = 0.2


class BatchService:
    def __init__(self, *, bus: IngestBus, watcher: HeadWatcher) -> None:
        self._bus = bus
        self._watcher = watcher

    async def status(
        self, principal: Principal, batch_id: str, *, deadline_s: float | None = None
    ) -> BatchStatus:
        """The state now, or with a deadline the first end seen until then.

        Raises BatchNotFound, also for batches of other principals (D10).
        """

        status = await self._own(principal, batch_id)
        while (
            deadline_s is not None
            and status.state is BatchState.ACCEPTED
            and time.monotonic() < deadline_s
        ):
            await self._next_snapshot(deadline_s)
            status = await self._own(principal, batch_id)
        return status

    async def _own(self, principal: Principal, batch_id: str) -> BatchStatus:
        status = await self._bus.batch(batch_id)
        if status is None or status.principal_id != principal.principal_id:
            raise BatchNotFound(
                f"there is no batch {batch_id[:80]}, or it is older than the idempotency window"
            )
        return status

    async def _next_snapshot(self, deadline_s: float) -> None:
        try:
            head = self._watcher.current or await self._watcher.fresh_head()
            newer = VisibilityToken(head.history, head.snapshot_id + 1)
            await self._watcher.wait_until_covered(
                newer, deadline_s=min(deadline_s, time.monotonic() + LOOK_S)
            )
        except (RetryLater, HistoryChanged):
            # Nothing new in this while; the caller looks at the batch itself.
            return
