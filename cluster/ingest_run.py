"""Sends the chunks of one `lakebus ingest`: several at a time, each exactly once by its key.

The reader hands out chunks in order; at most `parallel` are in flight and as many wait, so memory
is bounded whatever the size of the files. The first refusal ends the run: what is in flight is
waited for, nothing new is sent, and the same command goes on from there (its chunks have the same
keys). A run that is killed leaves nothing behind on this side, because nothing is kept here.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from cluster.api_calls import Api
from cluster.ingest_chunks import Chunk, Keys, chunks_of, require_form
from cluster.ingest_sources import Source, opened
from lakebus.errors import Cancelled, LakebusError

_BATCH_ID = re.compile(r"b(\d+)-(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Target:
    """What is said with every request."""

    table: str
    on_invalid: str = "reject"
    ordering_key: str | None = None
    first_attempt: str | None = None
    create: bool = False


@dataclass(slots=True)
class FileReport:
    """Counts of one file. `rows` were stored by this run or before; `rejected` were set aside."""

    name: str
    rows: int = 0
    rejected: int = 0
    replayed_rows: int = 0
    requests: int = 0
    replayed: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        receipt = answer["receipt"]
        self.rows += receipt["rows"]
        self.rejected += receipt["rows_rejected"]
        self.requests += 1
        if answer["replayed"]:
            self.replayed += 1
            self.replayed_rows += receipt["rows"]

    def as_json(self) -> dict[str, object]:
        return {
            "file": self.name,
            "rows": self.rows,
            "rows_rejected": self.rejected,
            "rows_replayed": self.replayed_rows,
            "requests": self.requests,
            "replayed": self.replayed,
        }


@dataclass(slots=True)
class Report:
    """What a run did, whole or not. `failure` is what ended it, `failed_file` where, and
    `rows_before` the rows of that file before the request that was refused."""

    files: list[FileReport] = field(default_factory=list)
    receipts: list[Mapping[str, Any]] = field(default_factory=list)
    failure: LakebusError | None = None
    failed_file: str = ""
    rows_before: int | None = None
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def rejected(self) -> int:
        return sum(file.rejected for file in self.files)

    @property
    def requests(self) -> int:
        return sum(file.requests for file in self.files)

    @property
    def replayed(self) -> int:
        return sum(file.replayed for file in self.files)

    @property
    def replayed_rows(self) -> int:
        return sum(file.replayed_rows for file in self.files)

    @property
    def known_until(self) -> str | None:
        """Until when the same command is sure to store nothing twice."""

        return min((one["idempotency_expires_at"] for one in self.receipts), default=None)

    def tokens(self) -> list[str]:
        """Tokens that together cover every row: on one shard the last entry's covers those before
        it, because a token names the position behind its entry."""

        last: dict[tuple[int, int], tuple[int, str]] = {}
        loose: list[str] = []
        for receipt in self.receipts:
            place = _BATCH_ID.fullmatch(receipt["batch_id"])
            if place is None:
                loose.append(receipt["visibility_token"])
                continue
            line, shard, position = (int(group) for group in place.groups())
            found = last.get((line, shard), (-1, ""))
            last[line, shard] = max(found, (position, receipt["visibility_token"]))
        return [*loose, *(token for _, token in last.values())]


@dataclass(frozen=True, slots=True)
class _Flight:
    file: FileReport
    answer: Future[dict[str, Any]]


#: Called with (file, stored bytes read of it, report) now and then.
Watcher = Callable[[Source, int, Report], None]


class Run:
    """One run. `parallel=1` keeps the order of the rows."""

    def __init__(self, api: Api, target: Target, *, key: str | None, parallel: int) -> None:
        self._api = api
        self._target = target
        self._keys = Keys(target.table, key)
        self._parallel = parallel
        self._places = threading.Semaphore(2 * parallel)
        self._flights: list[_Flight] = []
        self._stopped = False
        self.report = Report()

    def send(self, sources: Sequence[Source], *, form: str | None, watch: Watcher) -> Report:
        """Never raises an error of a request: it is the report's `failure`."""

        began_s = time.monotonic()
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="lakebus-ingest") as threads:
            try:
                self._read(threads, sources, form, watch)
            except LakebusError as error:  # of a file that cannot be read to its end
                self._land(wait=True)
                if self.report.failure is None:
                    self.report.failure = error
            except KeyboardInterrupt:
                self.report.interrupted = True
                self._stopped = True
                self._api.stop()  # wakes the threads
                self._land(wait=True)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def _read(
        self,
        threads: ThreadPoolExecutor,
        sources: Sequence[Source],
        form: str | None,
        watch: Watcher,
    ) -> None:
        for source in sources:
            file = FileReport(source.name)
            self.report.files.append(file)
            with opened(source, require_form(form or source.form, source.name)) as content:
                for chunk in chunks_of(content):
                    self._start(threads, file, chunk)
                    watch(source, content.taken_bytes, self.report)
                    if self._stopped:
                        break
                watch(source, content.taken_bytes, self.report)
            if self._stopped:
                break
        for _ in self._landing():
            watch(sources[-1], sources[-1].size_bytes or 0, self.report)

    def _start(self, threads: ThreadPoolExecutor, file: FileReport, chunk: Chunk) -> None:
        """Returns when there is a place for one more."""

        self._places.acquire()
        self._land(wait=False)
        if self._stopped:
            self._places.release()
            return
        future = threads.submit(self._post, chunk, self._keys.key_of(chunk))
        future.add_done_callback(lambda _: self._places.release())
        self._flights.append(_Flight(file, future))
        if self._target.create and not self.report.receipts:
            self._land(wait=True)  # the first rows make the table; the others must find it

    def _post(self, chunk: Chunk, key: str) -> dict[str, Any]:
        if self._stopped:
            raise Cancelled("not sent, because a request before it failed")
        target = self._target
        more = {"lakebus-ordering-key": target.ordering_key}
        more["idempotency-not-before"] = target.first_attempt
        return self._api.send(
            "POST",
            f"/v1/tables/{quote(target.table, safe='')}/rows",
            query={
                "on_invalid": target.on_invalid,
                "create": "true" if target.create else None,
            },
            body=chunk.body,
            headers={
                "content-type": chunk.media_type,
                **{name: value for name, value in more.items() if value is not None},
            },
            key=key,
            timed=True,
            ingest=True,
        )

    # --- answers ----------------------------------------------------------------------------

    def _land(self, *, wait: bool) -> None:
        for _ in self._landing(wait=wait):
            pass

    def _landing(self, *, wait: bool = True) -> Iterator[None]:
        """Counts answers in the order of their requests: those that have come, or all."""

        while self._flights and (wait or self._flights[0].answer.done()):
            flight = self._flights.pop(0)
            try:
                answer = flight.answer.result()
            except LakebusError as error:
                self._stopped = True
                if self.report.failure is None and not isinstance(error, Cancelled):
                    self.report.failure = error
                    self.report.failed_file = flight.file.name
                    self.report.rows_before = flight.file.rows + flight.file.rejected
                continue
            flight.file.add(answer)
            self.report.receipts.append(answer["receipt"])
            yield
