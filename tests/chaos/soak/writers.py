"""Writers of the soak's own tables. Each request is recorded, and sent until its end is known."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from tests.chaos import source
from tests.chaos.answers import Says
from tests.chaos.clients import AGAIN
from tests.chaos.session import Outcome, Session
from tests.chaos.soak.ledger import Batch, Ledger
from tests.chaos.soak.tables import BY_NAME
from tests.history.record import Ingest, Status

#: Beyond the numbers of the other client processes, below those of the run itself.
FIRST_REQUEST = 500_000_000
_PATIENCE_S = 180.0
_RETRY_S = 0.2


class TableWriter:
    """Writes one table. With `ledger` it also asks where each batch was published."""

    def __init__(
        self,
        table: str,
        session: Session,
        *,
        randomness: random.Random,
        stopping: asyncio.Event,
        number: Callable[[], int],
        ledger: Ledger | None,
        remember: Callable[[str], object],
        pace_s: tuple[float, float],
    ) -> None:
        self._table = table
        self._session = session
        self._random = randomness
        self._stopping = stopping
        self._number = number
        self._ledger = ledger
        self._remember = remember
        self._pace_s = pace_s

    async def run(self) -> None:
        while not self._stopping.is_set():
            await self._write()
            try:
                async with asyncio.timeout(self._random.uniform(*self._pace_s)):
                    await self._stopping.wait()
            except TimeoutError:
                continue
        self._session.close()

    async def _write(self) -> None:
        request = self._number()
        large = self._random.random() < 0.05
        count = self._random.randint(200, 800) if large else self._random.randint(1, 30)
        headers, body = source.as_json(BY_NAME[self._table].rows(request, count))
        batch = None if self._ledger is None else self._ledger.begin(request, count)

        async def send(attempt: int) -> Outcome:
            operation = Ingest(
                request=request,
                principal=self._session.place.principal,
                target=self._table,
                tables={self._table: count},
                key=f"key-{request}",
                attempt=attempt,
            )
            return await self._session.ingest(operation, headers=headers, body=body)

        outcome = await self._until_known(send)
        if outcome.ok:
            receipt = outcome.answer["receipt"]
            self._remember(receipt["visibility_token"])
            if batch is not None:
                await self._find(batch, receipt["batch_id"])
        elif batch is not None and outcome.says is not Says.CODE and self._ledger is not None:
            self._ledger.uncertain = True
        if batch is not None:
            batch.over.set()

    async def _find(self, batch: Batch, batch_id: str) -> None:
        """Where it was published; a quarantined one is nowhere."""
        assert self._ledger is not None
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            outcome = await self._session.status(Status(batch_id), timeout_ms=2_000)
            if outcome.ok and outcome.answer["state"] == "published":
                batch.snapshot_id = outcome.answer["snapshot_id"]
                return
            if outcome.ok and outcome.answer["state"] == "quarantined":
                return
            await asyncio.sleep(0.0 if outcome.ok else _RETRY_S)
        self._ledger.uncertain = True

    async def _until_known(self, send: Callable[[int], Awaitable[Outcome]]) -> Outcome:
        deadline_s = time.monotonic() + _PATIENCE_S
        attempt = 1
        while True:
            outcome = await send(attempt)
            known = outcome.ok or (outcome.says is Says.CODE and outcome.code not in AGAIN)
            if known or time.monotonic() > deadline_s:
                return outcome
            attempt += 1
            await asyncio.sleep(_RETRY_S)
