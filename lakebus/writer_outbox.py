"""What a writer holds between `write` and the receipts: bounded, in order, and never dropped.

A row is in exactly one place at any time: the open batch, the unacknowledged batches (waiting or
with a sender), or those given up. It leaves by a receipt or by being handed to the caller, and by
nothing else. After a batch was given up no further one is sent, so that order is kept and the
caller decides. All of it is under one condition; nothing here does I/O.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque

from lakebus.client_errors import RowsUnacknowledged, unacknowledged
from lakebus.client_forms import now_text
from lakebus.client_results import Sent, Written
from lakebus.client_rows import NDJSON
from lakebus.errors import MalformedRequest
from lakebus.writer_batches import WHOLE, Batch, Piece, WriterLimits

#: Tokens of so many latest batches: more than senders, so the highest position is among them.
TOKENS_MAX = 16


class Outbox:
    """See the module. Its methods may be called by any thread."""

    def __init__(
        self, table: str, limits: WriterLimits, *, on_invalid: str, ordering_key: str | None
    ) -> None:
        self._table = table
        self._limits = limits
        self._on_invalid = on_invalid
        self._ordering_key = ordering_key
        self._changed = threading.Condition()
        self._lines: list[bytes] = []
        self._line_bytes = 0
        self._opened_s = 0.0
        self._unacknowledged: dict[int, Batch] = {}  # in the order of their numbers
        self._waiting: deque[int] = deque()
        self._given_up: list[Batch] = []
        self._bytes = 0
        self._sealed = 0
        self._closed = self._ended = False
        self._rows = self._batches = self._replayed = 0
        self._tokens: deque[str] = deque(maxlen=TOKENS_MAX)

    # --- the caller's side ------------------------------------------------------------------

    def put(self, piece: Piece, *, timeout_s: float) -> bool:
        """Takes a piece, as soon as there is room; False when there was none in time. Raises
        RowsUnacknowledged when a batch was given up, MalformedRequest when closed."""

        with self._changed:
            if not self._room(len(piece.content)):
                deadline_s = time.monotonic() + timeout_s
                while not self._room(len(piece.content)):
                    left_s = deadline_s - time.monotonic()
                    if left_s <= 0:
                        return False
                    self._changed.wait(left_s)
            self._take(piece)
        return True

    def flush(self, *, timeout_s: float | None) -> Written:
        """Waits until everything put before has its receipt. Raises RowsUnacknowledged."""

        with self._changed:
            last = self.mark()
            done = self._changed.wait_for(
                lambda: self._given_up or self._is_through(last), timeout_s
            )
            if not done:
                raise self.late()
            return self._outcome()

    def mark(self) -> int:
        """Makes the open batch one to send; the number of the last that there is."""

        with self._changed:
            self._seal()
            return self._sealed

    def through(self, last: int) -> Written | None:
        """Not None when all batches up to `last` have their receipts. Raises
        RowsUnacknowledged."""

        with self._changed:
            return self._outcome() if self._given_up or self._is_through(last) else None

    def late(self) -> RowsUnacknowledged:
        with self._changed:
            return unacknowledged(
                f"{len(self._unacknowledged)} batches had no receipt when the time was up; they"
                " are still being sent",
                self._all(),
            )

    def close(self) -> bool:
        """Nothing can be put any more. False when that was so before."""

        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
            return first

    def end(self) -> None:
        """Senders are to return as soon as they can."""

        with self._changed:
            self._closed = self._ended = True
            self._changed.notify_all()

    def held(self) -> tuple[Batch, ...]:
        """All rows without a receipt, in order."""

        with self._changed:
            self._seal()
            return self._all()

    def take_given_up(self) -> tuple[Batch, ...]:
        """Hands the batches that were given up to the caller; the others are sent on."""

        with self._changed:
            taken, self._given_up = tuple(self._given_up), []
            self._bytes -= sum(len(batch.content) for batch in taken)
            self._changed.notify_all()
            return taken

    def written(self) -> Written:
        with self._changed:
            return self._written()

    # --- the senders' side ------------------------------------------------------------------

    def next(self) -> tuple[int, Batch] | None:
        """The next batch to send, with its number, when there is one; None at the end."""

        with self._changed:
            while not self._ended:
                left_s = self._linger_left_s()
                if self._given_up:
                    left_s = None
                elif self._waiting:
                    number = self._waiting.popleft()
                    return number, self._unacknowledged[number]
                elif left_s is not None and left_s <= 0:
                    self._seal()
                    continue
                self._changed.wait(left_s)
            return None

    def acknowledge(self, number: int, sent: Sent) -> None:
        with self._changed:
            batch = self._unacknowledged.pop(number)
            self._bytes -= len(batch.content)
            self._rows += batch.rows
            self._batches += 1
            self._replayed += sent.replayed
            self._tokens.append(sent.token)
            self._changed.notify_all()

    def give_up(self, number: int, batch: Batch) -> None:
        """The batch as it is now: with the error for which it was given up."""

        with self._changed:
            del self._unacknowledged[number]
            self._given_up.append(batch)
            self._changed.notify_all()

    def put_back(self, number: int) -> None:
        """Its sender was stopped before there was an answer."""

        with self._changed:
            self._waiting.appendleft(number)
            self._changed.notify_all()

    # --- under the condition ----------------------------------------------------------------

    def _room(self, size: int) -> bool:
        if self._given_up:
            raise self._failure()
        if self._closed:
            raise MalformedRequest("the writer is closed: make a new one")
        if not self._bytes:
            return True  # a piece larger than the bound must pass too, alone
        if len(self._unacknowledged) >= self._limits.held_batches_max:
            return False
        if self._bytes + size <= self._limits.held_bytes_max:
            return True
        self._seal()  # only receipts make room now
        return False

    def _take(self, piece: Piece) -> None:
        content = piece.content
        if piece.whole or self._line_bytes + len(content) > self._limits.bytes_max:
            self._seal()
        self._bytes += len(content)
        if piece.whole:
            self._enqueue(content, WHOLE, piece.rows)
            return
        if not self._lines:
            self._opened_s = time.monotonic()
            self._changed.notify_all()
        self._lines.append(content)
        self._line_bytes += len(content)
        limits = self._limits
        if len(self._lines) >= limits.rows_max or self._line_bytes >= limits.bytes_max:
            self._seal()

    def _seal(self) -> None:
        if self._lines:
            lines, self._lines, self._line_bytes = self._lines, [], 0
            self._enqueue(b"".join(lines), NDJSON, len(lines))

    def _enqueue(self, content: bytes, media_type: str, rows: int) -> None:
        self._sealed += 1
        self._unacknowledged[self._sealed] = Batch(
            table=self._table,
            content=content,
            media_type=media_type,
            rows=rows,
            key=str(uuid.uuid4()),
            not_before=now_text(),
            on_invalid=self._on_invalid,
            ordering_key=self._ordering_key,
        )
        self._waiting.append(self._sealed)
        self._changed.notify_all()

    def _linger_left_s(self) -> float | None:
        if not self._lines:
            return None
        return self._opened_s + self._limits.linger_s - time.monotonic()

    def _is_through(self, last: int) -> bool:
        return not self._unacknowledged or next(iter(self._unacknowledged)) > last

    def _outcome(self) -> Written:
        if self._given_up:
            raise self._failure()
        return self._written()

    def _all(self) -> tuple[Batch, ...]:
        return (*self._given_up, *self._unacknowledged.values())

    def _failure(self) -> RowsUnacknowledged:
        self._seal()
        first, others = self._given_up[0], len(self._unacknowledged)
        behind = f", and {others} behind it were not sent" if others else ""
        return unacknowledged(
            f"a batch of {first.rows} rows for table {self._table} was given up{behind}:"
            f" {first.error}",
            self._all(),
        )

    def _written(self) -> Written:
        return Written(self._rows, self._batches, self._replayed, tuple(self._tokens))
