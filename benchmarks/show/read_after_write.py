"""Read after write under load: every read carries the token of the last write it knows.

Writer i keeps a counter: request k writes one batch with `request_no = k`. Reader i takes writer
i's last acknowledged (k, token) at the moment it asks, and the answer must hold at least k + 1
requests of that writer: fewer is a stale read. Every read must end in rows or in a typed error.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.http1 import Connection, Dropped
from benchmarks.show import source
from benchmarks.show.exactly_once import Tally, make_table, send_until_received


@dataclass
class _Known:
    """What the readers of one writer know: how many requests it has receipts for, and the token."""

    requests: int = 0
    token: str = ""


@dataclass
class _Reads:
    count: int = 0
    typed_errors: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    stale: list[str] = field(default_factory=list)
    untyped: list[str] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)


async def run(
    url: str,
    api_key: str,
    *,
    seconds: float = 60.0,
    writers: int = 8,
    readers: int = 8,
    rows: int = 5,
    table: str = "read_after_write",
) -> dict[str, Any]:
    await make_table(url, api_key, table)
    known = [_Known() for _ in range(writers)]
    tally, reads = Tally(), _Reads()
    end = time.monotonic() + seconds

    async def write(number: int) -> None:
        connection = Connection(url, api_key)
        while time.monotonic() < end:
            request_no = known[number].requests
            content_type, body = source.as_json(
                source.rows_of(request_no, writer=number, rows=rows)
            )
            answer = await send_until_received(
                connection,
                path=f"/v1/tables/{table}/rows",
                key=f"{table}-{number}-{request_no}",
                content_type=content_type,
                body=body,
                tally=tally,
            )
            if answer is None:
                break
            token = answer["receipt"]["visibility_token"]
            known[number] = _Known(request_no + 1, token)
        connection.close()

    async def read(number: int) -> None:
        connection = Connection(url, api_key)
        writer = number % writers
        while time.monotonic() < end:
            expected = known[writer]
            if not expected.token:
                await asyncio.sleep(0.01)
                continue
            began = time.perf_counter()
            try:
                answer = await connection.query(
                    f"SELECT count(DISTINCT request_no), max(request_no) FROM {table}"
                    " WHERE writer = $writer",
                    parameters={"writer": writer},
                    min_visibility_token=expected.token,
                )
            except Dropped:
                reads.dropped += 1
                continue
            reads.count += 1
            reads.latencies_ms.append((time.perf_counter() - began) * 1000)
            if answer.status == 200:
                found = int(answer.json()["rows"][0][0])
                if found < expected.requests:
                    reads.stale.append(f"writer {writer}: {found} of {expected.requests}")
            elif answer.code:
                reads.typed_errors[answer.code] = reads.typed_errors.get(answer.code, 0) + 1
            else:
                reads.untyped.append(f"{answer.status} {answer.body[:200]!r}")
        connection.close()

    await asyncio.gather(
        *(write(number) for number in range(writers)), *(read(number) for number in range(readers))
    )
    latencies = sorted(reads.latencies_ms) or [0.0]
    problems = [f"stale read: {one}" for one in reads.stale]
    problems += [f"a read without a typed end: {one}" for one in reads.untyped]
    problems += [f"a read without an answer ({reads.dropped} dropped)"] * bool(reads.dropped)
    problems += tally.problems
    if reads.count == 0:
        problems.append("there was not one read")
    return {
        "scenario": "read_after_write",
        "seconds": seconds,
        "writers": writers,
        "readers": readers,
        "writes": sum(one.requests for one in known),
        "reads": reads.count,
        "stale_reads": len(reads.stale),
        "typed_errors": reads.typed_errors,
        "read_ms_p50": round(latencies[len(latencies) // 2], 2),
        "read_ms_p99": round(latencies[int(len(latencies) * 0.99)], 2),
        "verdict": problems[:20] or "held",
    }
