"""Readers that take their time: large answers as NDJSON, a piece at a time, over tens of seconds.

Meanwhile the files of their snapshot are merged away, their snapshot expires, and collection looks
at them: a read that began may not meet a missing file (E3). A stream that a fault broke is cut
short or ends without its last line, which is how one knows (D9); it is counted. One that came to
its end is counted over against the same snapshot when that is still there.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from benchmarks.http1 import Answer
from tests.chaos import source
from tests.chaos.answers import judge
from tests.chaos.session import Place
from tests.chaos.soak.calls import MISSING, Caller, GaveUp, Refused, Trouble
from tests.chaos.soak.tables import LEDGER, READINGS, RECENT

_TABLES = (*source.TABLES, READINGS, RECENT, LEDGER)
_PIECE_BYTES = 64 * 1024
_LIMIT_BYTES = 128 * 1024
_GUESSED_BYTES, _WIDE_BYTES, _FILLER = 1024 * 1024, 4 * 1024 * 1024, 400


class Malformed(Exception):
    """What came is no HTTP/1.1: unlike an answer that ends too early, no kill explains it."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """`end`: how it ended. `whole`: with its last line, which says as many lines as came; `wrong`:
    with one that says another number; `unmarked`: without, and the body had its full length; `cut`:
    the body did not, because the connection broke; `late`: the time was up; `malformed`.
    `snapshot_id` is None when there was no head, `answer` when it was a stream."""

    end: str
    snapshot_id: int | None = None
    lines: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    answer: Answer | None = None


class Streamer:
    """`wish_s`: how long a stream should take, about."""

    def __init__(
        self,
        place: Place,
        caller: Callable[[str], Caller],
        trouble: Trouble,
        *,
        number: int,
        randomness: random.Random,
        stopping: asyncio.Event,
        known: Callable[[], list[int]],
        wish_s: tuple[float, float] = (10.0, 60.0),
    ) -> None:
        self._place = place
        self._counter = caller(f"stream-{number}")
        self._trouble = trouble
        self._random = randomness
        self._stopping = stopping
        self._known = known
        self._wish_s = wish_s
        self.ends: Counter[str] = Counter()
        self.lines = 0
        self.seconds: list[float] = []
        self._last_bytes = 0
        self._now = Streamed("cut")

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                await self._one()
            except GaveUp as error:
                self._trouble.add(str(error))
            await asyncio.sleep(self._random.uniform(0.2, 1.0))

    def told(self) -> dict[str, Any]:
        return {
            "ends": dict(sorted(self.ends.items())),
            "lines": self.lines,
            "longest_s": round(max(self.seconds, default=0.0), 1),
        }

    async def _one(self) -> None:
        tables = self._random.sample(_TABLES, 3)
        # While there are few rows, wide ones: an answer of some size comes in chunks and slowly.
        wide = f", repeat('.', {_FILLER}) AS filler" if self._last_bytes < _WIDE_BYTES else ""
        columns = f"request, row_number, check_value{wide}"
        parts = [f"SELECT '{t}' AS t, {columns} FROM {t}" for t in tables]
        sql = " UNION ALL ".join(parts)
        old = self._known()
        snapshot_id = self._random.choice(old) if old and self._random.random() < 0.5 else None
        streamed = await self._stream(sql, snapshot_id)
        if streamed.answer is not None:
            self._judge(streamed.answer, snapshot_id)
            return
        self.ends[streamed.end] += 1
        self.lines += streamed.lines
        self.seconds.append(streamed.seconds)
        if streamed.end == "wrong":
            self._trouble.add(f"a stream of {streamed.lines} lines ends with another number")
        if streamed.end != "whole":
            return
        self._last_bytes = streamed.size_bytes
        if snapshot_id is not None and streamed.snapshot_id != snapshot_id:
            self._trouble.add(f"a stream of snapshot {snapshot_id} was {streamed.snapshot_id}")
        await self._count(sql, streamed)

    def _judge(self, answer: Answer, snapshot_id: int | None) -> None:
        verdict = judge(answer)
        self.ends[verdict.code or "no answer"] += 1
        if verdict.finding is not None:
            self._trouble.add(f"a stream: {verdict.finding}")
        if MISSING in verdict.detail:
            self._trouble.counts["missing_file_reads"] += 1
            self._trouble.add(f"a stream met a missing file: {verdict.detail}")
        if verdict.code == "snapshot_expired" and snapshot_id is None:
            self._trouble.add("the latest snapshot is said to have expired")

    async def _count(self, sql: str, streamed: Streamed) -> None:
        found = await self._counter.query(
            f"SELECT count(*) AS n FROM ({sql})", snapshot_id=streamed.snapshot_id
        )
        if isinstance(found, Refused):
            if found.code != "snapshot_expired":
                self._trouble.add(f"a stream counted over: {found.code}: {found.detail}")
            return
        self.ends["counted over"] += 1
        if int(found.first()["n"]) != streamed.lines:
            self._trouble.add(
                f"a stream of snapshot {streamed.snapshot_id} had {streamed.lines} lines, the "
                f"snapshot has {found.first()['n']} rows"
            )

    # --- the wire -------------------------------------------------------------------------------

    async def _stream(self, sql: str, snapshot_id: int | None) -> Streamed:
        self._now = Streamed("cut")
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(110.0):
                streamed = await self._exchange(sql, snapshot_id)
        except TimeoutError:
            streamed = replace(self._now, end="late")
        except (OSError, EOFError):
            streamed = replace(self._now, end="cut")
        except Malformed:
            streamed = replace(self._now, end="malformed")
        return replace(streamed, seconds=time.monotonic() - began_s)

    async def _exchange(self, sql: str, snapshot_id: int | None) -> Streamed:
        parts = urlsplit(self._place.url)
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port, limit=_LIMIT_BYTES
        )
        try:
            document: dict[str, Any] = {"sql": sql, "timeout_ms": 100_000}
            if snapshot_id is not None:
                document["snapshot"] = {"id": snapshot_id}
            body = json.dumps(document).encode()
            writer.write(
                f"POST /v1/query HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                f"Authorization: Bearer {self._place.api_key}\r\n"
                "Content-Type: application/json\r\nAccept: application/x-ndjson\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            status, headers = await read_head(reader)
            if status != 200:
                problem = b"".join([part async for part in body_parts(reader, headers)])
                return Streamed("refused", answer=Answer(status, headers, problem))
            self._now = Streamed("cut", int(headers["lakebus-snapshot-id"]))
            return await self._slowly(body_parts(reader, headers))
        finally:
            writer.close()

    async def _slowly(self, parts: AsyncIterator[bytes]) -> Streamed:
        pieces = max(4, (self._last_bytes or _GUESSED_BYTES) // _PIECE_BYTES)
        pause_s = min(3.0, self._random.uniform(*self._wish_s) / pieces)
        tail = b""
        async for data in parts:
            self._now = replace(
                self._now,
                lines=self._now.lines + data.count(b"\n"),
                size_bytes=self._now.size_bytes + len(data),
            )
            tail = (tail + data)[-200:]
            await asyncio.sleep(pause_s * len(data) / _PIECE_BYTES)
        return replace(self._now, **judged(tail, self._now.lines))


def judged(tail: bytes, lines: int) -> dict[str, Any]:
    """The end of a body that has its full length, and its lines without the end mark."""
    try:
        mark = json.loads(tail.rstrip(b"\n").rpartition(b"\n")[2])
    except ValueError:
        return {"end": "unmarked"}
    if not isinstance(mark, dict) or mark.get("complete") is not True:
        return {"end": "unmarked"}
    rows = lines - 1 if tail.endswith(b"\n") else lines
    return {"end": "whole" if mark.get("row_count") == rows else "wrong", "lines": rows}


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """(status, headers in lower case). Raises EOFError, OSError, Malformed."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ", 2)[1])
    except (asyncio.LimitOverrunError, ValueError, IndexError) as error:
        raise Malformed(repr(error)) from error
    named = (line.partition(":") for line in lines[1:] if line)
    return status, {name.lower(): value.strip() for name, _, value in named}


async def body_parts(
    reader: asyncio.StreamReader, headers: Mapping[str, str]
) -> AsyncIterator[bytes]:
    """The body, a piece at a time, by its chunks or its length: small answers have a length.
    Raises EOFError when it ends before, OSError, Malformed."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := await _chunk_size(reader):
            async for piece in _exactly(reader, size):
                yield piece
            if await reader.readexactly(2) != b"\r\n":
                raise Malformed("a chunk is longer than it says")
    elif "content-length" in headers:
        async for piece in _exactly(reader, int(headers["content-length"])):
            yield piece
    else:  # up to the end of the connection: only the last line tells whether that was all
        while piece := await reader.read(_PIECE_BYTES):
            yield piece


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, _PIECE_BYTES))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


async def _chunk_size(reader: asyncio.StreamReader) -> int:
    try:
        return int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise Malformed(repr(error)) from error
