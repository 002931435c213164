"""Exactly-once: many clients, every third request sent twice or more, in different encodings.

A request that was dropped, refused for now, or whose outcome is unknown is sent again with its key
until it has a receipt, as a client should. All receipts of one key must be one object (A2, A3), and
the lake must hold exactly the rows of the source.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.http1 import Connection, Dropped
from benchmarks.show import source


@dataclass
class Tally:
    sent: int = 0
    accepted: int = 0
    replayed: int = 0
    resent: int = 0
    problems: list[str] = field(default_factory=list)


async def make_table(url: str, api_key: str, name: str) -> None:
    connection = Connection(url, api_key)
    answer = await connection.post_json(
        "/v1/tables", {"name": name, "columns": source.COLUMNS, "if_not_exists": True}
    )
    connection.close()
    if answer.status not in (200, 201):
        raise RuntimeError(f"the table could not be made: {answer.status} {answer.body!r}")


async def send_until_received(
    connection: Connection,
    *,
    path: str,
    key: str,
    content_type: str,
    body: bytes,
    tally: Tally,
    patience_s: float = 120.0,
) -> dict[str, Any] | None:
    """The answer's JSON once there is a receipt; None (and a problem noted) otherwise."""

    deadline = time.monotonic() + patience_s
    headers = {"Content-Type": content_type, "Idempotency-Key": key}
    while True:
        tally.sent += 1
        said = "dropped"
        try:
            answer = await connection.request("POST", path, body=body, headers=headers)
            if answer.status in (200, 202):
                document: dict[str, Any] = answer.json()
                return document
            said = f"{answer.status} {answer.body[:300]!r}"
            # A 500 without our problem document is made by the balancer in front.
            again = answer.code in ("", "unavailable", "outcome_unknown", "backpressure") or (
                answer.code == "rate_limited"
            )
            if not again:
                tally.problems.append(f"{key}: {said}")
                return None
        except Dropped as error:
            said = f"dropped {error}"
        if time.monotonic() > deadline:
            tally.problems.append(f"{key}: no receipt in {patience_s} s, last: {said}")
            return None
        tally.resent += 1
        await asyncio.sleep(0.05)


async def check_table(
    url: str, api_key: str, *, table: str, tokens: Sequence[str], expected: list[Any]
) -> list[str]:
    """What is wrong with the table's content at a snapshot that covers the tokens."""

    connection = Connection(url, api_key)
    try:
        answer = await connection.query(
            source.CHECK_SQL.format(table=table),
            min_visibility_token=list(tokens),
            timeout_ms=100_000,
        )
    finally:
        connection.close()
    if answer.status != 200:
        return [f"the check query answered {answer.status} {answer.body[:300]!r}"]
    found = [str(value) for value in answer.json()["rows"][0]]
    return [] if found == expected else [f"the table holds {found}, the source {expected}"]


async def run(
    url: str,
    api_key: str,
    *,
    requests: int = 50_000,
    clients: int = 16,
    rows: int = 10,
    table: str = "exactly_once",
    seed: int = 1,
    first_request: int = 0,
) -> dict[str, Any]:
    await make_table(url, api_key, table)
    tally = Tally()
    receipts: dict[int, str] = {}
    randomness = random.Random(seed)
    work: list[tuple[int, int]] = []
    last = first_request + requests - 1
    for number in range(first_request, last):
        copies = randomness.choice((2, 2, 3)) if number % 3 == 0 else 1
        work += [(number, copy) for copy in range(copies)]
    # Neighbouring positions go to different clients at the same time: copies race each other.
    window = clients * 4
    for start in range(0, len(work), window):
        block = work[start : start + window]
        randomness.shuffle(block)
        work[start : start + window] = block
    queue = iter(work)
    path = f"/v1/tables/{table}/rows"

    async def client(work: Iterable[tuple[int, int]]) -> str:
        connection = Connection(url, api_key)
        latest = ""
        for request_no, copy in work:
            encode = source.ENCODINGS[(request_no + copy) % len(source.ENCODINGS)]
            content_type, body = encode(source.rows_of(request_no, rows=rows))
            answer = await send_until_received(
                connection,
                path=path,
                key=f"{table}-{request_no}",
                content_type=content_type,
                body=body,
                tally=tally,
            )
            if answer is None:
                continue
            receipt = repr(sorted(answer["receipt"].items()))
            if receipts.setdefault(request_no, receipt) != receipt:
                tally.problems.append(f"{request_no}: two receipts for one key")
            tally.replayed += bool(answer["replayed"])
            tally.accepted += not answer["replayed"]
            latest = answer["receipt"]["visibility_token"]
        connection.close()
        return latest

    began = time.perf_counter()
    await asyncio.gather(*(client(queue) for _ in range(clients)))
    # Accepted after every other receipt and on the same shard (one principal, one table), so its
    # position is the highest and its token covers all (A7).
    token = await client([(last, 0)])
    seconds = time.perf_counter() - began
    expected = source.expected_check(range(first_request, first_request + requests), rows=rows)
    problems = tally.problems + await check_table(
        url, api_key, table=table, tokens=[token], expected=expected
    )
    missing = requests - len(receipts)
    if missing:
        problems.append(f"{missing} requests have no receipt")
    return {
        "scenario": "exactly_once",
        "requests": requests,
        "clients": clients,
        "rows_per_request": rows,
        "deliveries": len(work) + 1,
        "sent": tally.sent,
        "accepted_first": tally.accepted,
        "replayed": tally.replayed,
        "resent_after_failure": tally.resent,
        "seconds": round(seconds, 2),
        "check": dict(
            zip(("rows", "distinct_rows", "number_sum", "amount_sum"), expected, strict=False)
        ),
        "verdict": problems[:20] or "held",
    }
