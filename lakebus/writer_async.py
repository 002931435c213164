"""The writer for `await`: the same outbox and senders, waited for without holding a thread.

Waits are short sleeps between looks, so that a cancelled task leaves at once and nothing of it goes
on behind its back; receipts come by the thousand a second at most.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

from lakebus.client_errors import RowsUnacknowledged
from lakebus.client_results import Written
from lakebus.client_rows import Rows
from lakebus.errors import LakebusError
from lakebus.writer import Writer
from lakebus.writer_batches import Batch, pieces_of

_LOOK_S = 0.005
#: Other tasks get their turn after so many pieces.
_TURN_PIECES = 1_000


class AsyncWriter:
    """`Writer` for `await`; see there for what it promises."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def __aenter__(self) -> AsyncWriter:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """As `Writer`: only an interrupt, like a cancelled task, does not wait."""

        if error is None or isinstance(error, Exception):
            await self.close()
        else:
            self._writer.__exit__(kind, error, trace)

    async def write(self, rows: Rows, *, timeout_s: float | None = None) -> int:
        """See `Writer.write`."""

        wait_s = self._writer.limits.write_timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + wait_s
        taken = pieces = 0
        try:
            for piece in pieces_of(rows, self._writer.limits):
                while not self._writer.outbox.put(piece, timeout_s=0):
                    if time.monotonic() >= deadline_s:
                        raise self._writer.full(wait_s)
                    await asyncio.sleep(_LOOK_S)
                taken += piece.rows
                pieces += 1
                if pieces % _TURN_PIECES == 0:
                    await asyncio.sleep(0)
        except LakebusError as error:
            error.members["rows_taken"] = taken
            raise
        return taken

    async def flush(self, *, timeout_s: float | None = None) -> Written:
        """See `Writer.flush`."""

        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        outbox = self._writer.outbox
        last = outbox.mark()
        while (written := outbox.through(last)) is None:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise outbox.late()
            await asyncio.sleep(_LOOK_S)
        return written

    async def close(self, *, timeout_s: float | None = None) -> Written:
        """See `Writer.close`."""

        if not self._writer.outbox.close():
            return self._writer.written
        try:
            return await self.flush(timeout_s=timeout_s)
        except RowsUnacknowledged as failure:
            return await asyncio.to_thread(self._writer.stopped, failure)
        finally:
            await self.stop()

    async def stop(self) -> tuple[Batch, ...]:
        """See `Writer.stop`."""

        return await asyncio.to_thread(self._writer.stop)

    @property
    def unacknowledged(self) -> tuple[Batch, ...]:
        return self._writer.unacknowledged

    @property
    def written(self) -> Written:
        return self._writer.written

    def take_failed(self) -> tuple[Batch, ...]:
        return self._writer.take_failed()
