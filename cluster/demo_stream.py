"""The stream of flights: several connections, one idempotency key a batch, and who watches them.

Senders take batches from a list, alternate the body format, and keep the token of every receipt.
A watcher asks the same query at the newest snapshot again and again meanwhile, and remembers the
answers: these are the moments that the demo travels back to.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa

from cluster.demo_data import encoded
from lakebus.client import Client
from lakebus.client_results import Result, Sent

CONNECTIONS = 4
#: Most producers that care for speed send Arrow; NDJSON and JSON are there to show that they mix.
FORMS = ("Arrow", "NDJSON", "Arrow", "JSON")
TIMEOUT_S = 60.0
TOTALS = """
    SELECT count(*) AS flights, count(dep_delay) AS departed,
           sum(distance)::BIGINT AS miles, sum(arr_delay)::BIGINT AS minutes_late
    FROM flights"""
_MOMENT_PAUSE_S = 0.5


def key_of(place: int) -> str:
    """The idempotency key of a batch: what it is, so that whoever sends it again uses it again."""

    return f"flights-2013-{place:05d}"


@dataclass(frozen=True, slots=True)
class Progress:
    sent: int
    acknowledged: int
    batches_acknowledged: int


class _Worker(threading.Thread):
    """A started thread that keeps its error for whoever asks. A daemon: it must not hold up a demo
    that was told to end."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again by `raise_its_error`
            self._error = error

    def raise_its_error(self) -> None:
        if self._error is not None:
            raise self._error


class Stream:
    """Sends all batches; a context manager, so that threads end with the demo.

    Batches from `hold_at` on wait for `go_on`, so that something can be done in the middle however
    fast the others are.
    """

    def __init__(self, client: Client, batches: Sequence[pa.Table], *, hold_at: int) -> None:
        self.hold_at = hold_at
        self._held = threading.Event()
        self._client = client
        self._batches = batches
        self._lock = threading.Lock()
        self._next = 0
        self._sent = 0
        self._acknowledged = 0
        self._stopped = threading.Event()
        self.receipts: dict[int, Sent] = {}
        self.body_bytes = dict.fromkeys(FORMS, 0)
        self._senders = [_Worker(self._send_all, f"sender-{n}") for n in range(CONNECTIONS)]

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._held.set()

    def go_on(self) -> None:
        self._held.set()

    @property
    def running(self) -> bool:
        """False once all senders have ended. Raises what a sender raised."""

        for sender in self._senders:
            sender.raise_its_error()
        return any(sender.is_alive() for sender in self._senders)

    def progress(self) -> Progress:
        with self._lock:
            return Progress(self._sent, self._acknowledged, len(self.receipts))

    def _send_all(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                place, self._next = self._next, self._next + 1
            if place >= len(self._batches):
                return
            if place >= self.hold_at:
                self._held.wait()
            self._send(place)

    def _send(self, place: int) -> None:
        rows, form = self._batches[place], FORMS[place % len(FORMS)]
        body = encoded(rows, form)
        with self._lock:
            self._sent += rows.num_rows
        # The client itself repeats what failed or is unknown, with this key, until the time is up.
        sent = self._client.ingest("flights", body, key=key_of(place), timeout_s=TIMEOUT_S)
        with self._lock:
            self._acknowledged += rows.num_rows
            self.receipts[place] = sent
            self.body_bytes[form] += len(body[0])


class Watcher:
    """Asks TOTALS while rows stream in; `moments` are the answers, oldest first."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ended = threading.Event()
        self.moments: list[Result] = []
        self._watching = _Worker(self._watch, "watcher")

    def end(self) -> None:
        """Raises what the watcher met."""

        self._ended.set()
        self._watching.join()
        self._watching.raise_its_error()

    def _watch(self) -> None:
        while not self._ended.wait(_MOMENT_PAUSE_S):
            self.moments.append(self._client.query(TOTALS, timeout_s=TIMEOUT_S))


def monotonic(moments: Sequence[Result]) -> bool:
    """True when neither snapshots nor rows ever went back."""

    seen: list[tuple[int, Any]] = [(moment.snapshot_id, moment.rows[0][0]) for moment in moments]
    return all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(seen))
