"""A writer: rows one by one or in any portion, sent as batches behind the caller's back.

What it promises:

* Each batch keeps one idempotency key and the time of its first attempt through every retry, so a
  row counts once, whatever is lost on the way (contract A3, A6, A13).
* It holds a bounded number of batches and bytes. When it is full `write` waits, and at last raises
  WriterFull, which says how many rows of the call are in. Nothing is ever dropped.
* Only retryable errors are retried. A batch that is given up stops the sending, and the next
  `write`, `flush` or `close` raises RowsUnacknowledged, which holds every batch without a receipt.
* When `flush` or `close` returns, everything written before has its receipt.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from lakebus.client_errors import RowsUnacknowledged, WriterFull, unacknowledged
from lakebus.client_forms import pause_after_s
from lakebus.client_http import SCOPE, CallScope
from lakebus.client_results import Sent, Written
from lakebus.client_rows import Rows
from lakebus.errors import Fault, LakebusError, MalformedRequest
from lakebus.writer_batches import Batch, WriterLimits, pieces_of
from lakebus.writer_outbox import TOKENS_MAX, Outbox

#: One attempt of a batch, its own retries included, takes so long at most.
_ATTEMPT_S_MAX = 30.0
#: A sender whose connection was broken comes back at once, unless it is just connecting.
_JOIN_S = 5.0

Send = Callable[..., Sent]


class Writer:
    """Made by `Client.writer`. May be used by several threads. Close it, or use `with`.

    `outbox` is what it holds; the other members of this class are for callers.
    """

    def __init__(
        self,
        send: Send,
        table: str,
        *,
        limits: WriterLimits | None = None,
        senders: int = 1,
        on_invalid: str = "reject",
        ordering_key: str | None = None,
    ) -> None:
        if not 1 <= senders < TOKENS_MAX:
            raise MalformedRequest(f"senders of a writer must be 1 to {TOKENS_MAX - 1}")
        self.limits = limits or WriterLimits()
        self.outbox = Outbox(table, self.limits, on_invalid=on_invalid, ordering_key=ordering_key)
        self._scopes = [CallScope() for _ in range(senders)]
        self._threads = [
            threading.Thread(
                target=_send_batches,
                args=(self.outbox, send, scope, self.limits.retry_s),
                name=f"lakebus-writer-{table}",
                daemon=True,  # a program that forgets to close must still end, and is warned
            )
            for scope in self._scopes
        ]
        self._forgotten = weakref.finalize(self, _warn, self.outbox, table)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After an exception too everything written is sent; only an interrupt does not wait."""

        if error is None or isinstance(error, Exception):
            self.close()
            return
        left = self.stop()
        if left:
            rows = sum(batch.rows for batch in left)
            error.add_note(f"{rows} rows of a lakebus writer have no receipt: see unacknowledged")

    def write(self, rows: Rows, *, timeout_s: float | None = None) -> int:
        """Takes rows as `Client.ingest` does (but no files), and returns how many it took: all.

        Waits while the writer is full. Raises WriterFull after `timeout_s` (the writer's
        `write_timeout_s`), RowsUnacknowledged, MalformedBody. Their member `rows_taken` says how
        many rows of this call, from the first, are in the writer all the same.
        """

        wait_s = self.limits.write_timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + wait_s
        taken = 0
        try:
            for piece in pieces_of(rows, self.limits):
                if not self.outbox.put(piece, timeout_s=deadline_s - time.monotonic()):
                    raise self.full(wait_s)
                taken += piece.rows
        except LakebusError as error:
            error.members["rows_taken"] = taken
            raise
        return taken

    def flush(self, *, timeout_s: float | None = None) -> Written:
        """Sends what is open, and waits for all receipts; what has them so far. `Client.query`
        takes the answer as `after`. Raises RowsUnacknowledged; when only the time was up, the
        batches that it holds are still being sent."""

        return self.outbox.flush(timeout_s=timeout_s)

    def close(self, *, timeout_s: float | None = None) -> Written:
        """Flushes, and ends. Without `timeout_s` it takes as long as batches are retried. Raises
        RowsUnacknowledged; then nothing is sent any more. Closing again does nothing."""

        if not self.outbox.close():
            return self.outbox.written()
        try:
            return self.outbox.flush(timeout_s=timeout_s)
        except RowsUnacknowledged as error:
            return self.stopped(error)
        finally:
            self.stop()

    def stopped(self, error: RowsUnacknowledged) -> Written:
        """Stops for an error, which then holds what has no receipt at the very end."""

        left = self.stop()
        if not left:  # the last receipt came while it stopped
            return self.outbox.written()
        detail = error.detail.replace("they are still being sent", "they are not sent any more")
        raise unacknowledged(detail, left) from error

    def stop(self) -> tuple[Batch, ...]:
        """Ends at once, calls under way included, and returns every batch without a receipt."""

        self.outbox.end()
        self._forgotten.detach()
        for scope in self._scopes:
            scope.cancel()
        for thread in self._threads:
            thread.join(_JOIN_S)
        return self.outbox.held()

    @property
    def unacknowledged(self) -> tuple[Batch, ...]:
        """Every batch that has no receipt now, also the one that is open."""

        return self.outbox.held()

    @property
    def written(self) -> Written:
        """What has receipts so far."""

        return self.outbox.written()

    def take_failed(self) -> tuple[Batch, ...]:
        """Hands over the batches that were given up, each with its `error`, and goes on sending
        those behind them."""

        return self.outbox.take_given_up()

    def full(self, wait_s: float) -> WriterFull:
        limits = self.limits
        return WriterFull(
            f"the writer holds {limits.held_batches_max} batches or {limits.held_bytes_max} bytes"
            f" without a receipt, and none came within {wait_s:g} s: write the rest later"
        )


def _warn(outbox: Outbox, table: str) -> None:
    """A writer was forgotten; its rows must not go unnoticed."""

    outbox.end()
    rows = sum(batch.rows for batch in outbox.held())
    if rows:
        warnings.warn(
            f"a lakebus writer for table {table} was not closed: {rows} rows have no receipt",
            RuntimeWarning,
            stacklevel=2,
        )


# --- senders -------------------------------------------------------------------------------


def _send_batches(outbox: Outbox, send: Send, scope: CallScope, retry_s: float) -> None:
    """A sender's life. It knows the outbox, not the writer, so that a forgotten one is noticed."""

    SCOPE.set(scope)
    while (found := outbox.next()) is not None:
        number, batch = found
        outcome = _deliver(batch, send, scope, retry_s)
        if isinstance(outcome, Sent):
            outbox.acknowledge(number, outcome)
        elif outcome is None:
            outbox.put_back(number)
        else:
            outbox.give_up(number, replace(batch, error=outcome))


def _deliver(
    batch: Batch, send: Send, scope: CallScope, retry_s: float
) -> Sent | LakebusError | None:
    """Its receipt; or the error for which it is given up; None when the sender is stopped."""

    deadline_s = time.monotonic() + retry_s
    attempt = 0
    while not scope.cancelled.is_set():
        left_s = max(0.001, deadline_s - time.monotonic())
        try:
            return send(batch, timeout_s=min(_ATTEMPT_S_MAX, left_s))
        except LakebusError as error:
            if scope.cancelled.is_set():
                return None
            pause_s = pause_after_s(error, attempt)
            if not error.retryable or time.monotonic() + pause_s >= deadline_s:
                return error
        except Exception as error:  # noqa: BLE001 - a sender that dies would hold its rows for ever
            return Fault(f"the batch cannot be sent: {type(error).__name__}: {error}")
        attempt += 1
        scope.cancelled.wait(pause_s)
    return None
