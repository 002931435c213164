"""Readers that take their time: large answers as NDJSON, a piece at a time, over tens of seconds.

Meanwhile the files of their snapshot are merged away, their snapshot expires, and collection looks
at them: a read that began may not meet a missing file (E3). A stream that a fault broke ends
without its last line, which is how one knows; it is counted. One that came to its end is counted
over against the same snapshot when that is still there.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Streamed:
    """`whole`: it had its last line, with the right number. `snapshot_id` is None when the answer
    was no stream."""

    snapshot_id: int | None
    lines: int
    whole: bool
    seconds: float
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
        parts = [f"SELECT '{t}' AS t, request, row_number, check_value FROM {t}" for t in tables]
        sql = " UNION ALL ".join(parts)
        old = self._known()
        snapshot_id = self._random.choice(old) if old and self._random.random() < 0.5 else None
        streamed = await self._stream(sql, snapshot_id)
        if streamed.answer is not None:
            self._judge(streamed.answer, snapshot_id)
            return
        self.lines += streamed.lines
        self.seconds.append(streamed.seconds)
        if not streamed.whole:
            self.ends["broken"] += 1
            return
        self.ends["whole"] += 1
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
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(110.0):
                return await self._exchange(sql, snapshot_id, began_s)
        except (OSError, EOFError, TimeoutError, ValueError, IndexError):
            return Streamed(None, 0, False, time.monotonic() - began_s)

    async def _exchange(self, sql: str, snapshot_id: int | None, began_s: float) -> Streamed:
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
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split(" ", 2)[1])
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head[1:])
            }
            if status != 200:
                length = int(headers.get("content-length", "0"))
                problem = await reader.readexactly(length)
                return Streamed(None, 0, False, 0.0, Answer(status, headers, problem))
            lines, whole = await self._slowly(reader)
            return Streamed(
                int(headers["lakebus-snapshot-id"]),
                lines,
                whole,
                time.monotonic() - began_s,
            )
        finally:
            writer.close()

    async def _slowly(self, reader: asyncio.StreamReader) -> tuple[int, bool]:
        """(lines, whether the end mark came and says as many)."""
        # So many pieces as the last stream was long, or a guess.
        pieces = max(4, self.lines // max(1, len(self.seconds)) * 60 // _PIECE_BYTES)
        pause_s = min(3.0, self._random.uniform(*self._wish_s) / pieces)
        lines, tail = 0, b""
        while True:
            try:
                data = await _chunk(reader)
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
                return lines, False
            if not data:
                break
            lines += data.count(b"\n")
            tail = (tail + data)[-200:]
            await asyncio.sleep(pause_s * len(data) / _PIECE_BYTES)
        try:
            mark = json.loads(tail.rstrip(b"\n").rpartition(b"\n")[2])
        except ValueError:
            return lines, False
        rows = lines - 1 if tail.endswith(b"\n") else lines
        return rows, mark == {"complete": True, "row_count": rows}


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
    data = await reader.readexactly(size + 2)
    return data[:-2] if size else b""
