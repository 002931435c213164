"""Crash: SIGKILL of each kind of process while clients write and read; nothing lost, nothing double.

Each kind is killed in turn under load. Writers send each request until it has a receipt; readers
ask with the token of the last write they know. At the end the lake must hold exactly the source.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.http1 import Connection, Dropped
from benchmarks.show import processes, source
from benchmarks.show.exactly_once import Tally, check_table, make_table, send_until_received


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of process and the words by which its title is known."""

    name: str
    words: tuple[str, ...]
    optional: bool = False


KINDS = (
    Kind("ingest replica", ("ray::ServeReplica:ingest",)),
    Kind("query replica", ("ray::ServeReplica:query",)),
    Kind("query child", ("storage.engine.child_main",)),
    Kind("core actor (lease manager, coordinator, publisher)", ("ray::core",), optional=True),
    Kind("commit coordinator", ("ray::commit_coordinator",), optional=True),
    Kind("snapshot publisher", ("ray::snapshot_publisher",), optional=True),
    Kind("lease manager", ("ray::lease_manager",), optional=True),
    Kind("supervisor", ("ray::supervisor",), optional=True),
    Kind("serve controller", ("ray::ServeController",)),
    Kind("HAProxy", ("haproxy", "-f")),
    Kind("PostgreSQL", ("postgres", "-D")),
)


async def run(
    url: str,
    api_key: str,
    *,
    stack_id: str,
    kinds: tuple[Kind, ...] = KINDS,
    rounds: int = 1,
    settle_s: float = 4.0,
    recovery_s_max: float = 60.0,
    clients: int = 4,
    rows: int = 10,
    table: str = "crash",
) -> dict[str, Any]:
    await make_table(url, api_key, table)
    tally = Tally()
    stop = asyncio.Event()
    received: set[int] = set()
    next_request = 0
    acknowledged: list[tuple[int, str]] = []
    stale: list[str] = []
    reads = 0
    read_failures: dict[str, int] = {}

    async def write() -> None:
        nonlocal next_request
        connection = Connection(url, api_key, timeout_s=20.0)
        while not stop.is_set():
            request_no, next_request = next_request, next_request + 1
            encode = source.ENCODINGS[request_no % len(source.ENCODINGS)]
            content_type, body = encode(source.rows_of(request_no, rows=rows))
            answer = await send_until_received(
                connection,
                path=f"/v1/tables/{table}/rows",
                key=f"{table}-{request_no}",
                content_type=content_type,
                body=body,
                tally=tally,
                patience_s=180.0,
            )
            if answer is not None:
                received.add(request_no)
                acknowledged.append((request_no, answer["receipt"]["visibility_token"]))
        connection.close()

    async def read() -> None:
        nonlocal reads
        connection = Connection(url, api_key, timeout_s=40.0)
        while not stop.is_set():
            if not acknowledged:
                await asyncio.sleep(0.05)
                continue
            request_no, token = acknowledged[-1]
            try:
                answer = await connection.query(
                    f"SELECT count(*) FROM {table} WHERE request_no = $n",
                    parameters={"n": request_no},
                    min_visibility_token=token,
                )
            except Dropped:
                read_failures["dropped"] = read_failures.get("dropped", 0) + 1
                await asyncio.sleep(0.1)
                continue
            reads += 1
            if answer.status == 200:
                found = int(answer.json()["rows"][0][0])
                if found != rows:
                    stale.append(f"request {request_no}: {found} of {rows} rows")
            else:
                code = answer.code or f"{answer.status} without a code"
                read_failures[code] = read_failures.get(code, 0) + 1
                await asyncio.sleep(0.1)
        connection.close()

    async def visible_again(since: float) -> float | None:
        """Seconds until something written after the kill was read back with its token."""

        connection = Connection(url, api_key, timeout_s=15.0)
        try:
            while time.monotonic() < since + recovery_s_max:
                seen = len(acknowledged)
                await asyncio.sleep(0.05)
                if len(acknowledged) == seen:
                    continue
                request_no, token = acknowledged[-1]
                try:
                    answer = await connection.query(
                        f"SELECT count(*) FROM {table} WHERE request_no = {request_no}",
                        min_visibility_token=token,
                        timeout_ms=10_000,
                    )
                except Dropped:
                    continue
                if answer.status == 200:
                    return time.monotonic() - since
            return None
        finally:
            connection.close()

    tasks = [asyncio.create_task(write()) for _ in range(clients)]
    tasks += [asyncio.create_task(read()) for _ in range(2)]
    problems: list[str] = []
    kills: list[dict[str, Any]] = []
    await asyncio.sleep(settle_s)
    for _ in range(rounds):
        for kind in kinds:
            pids = processes.pids_of(stack_id, *kind.words)
            if not pids:
                if not kind.optional:
                    problems.append(f"no process of the kind {kind.name} was found")
                continue
            killed_at = time.monotonic()
            processes.kill(pids[0])
            seconds = await visible_again(killed_at)
            kills.append(
                {"kind": kind.name, "visible_again_s": None if seconds is None else round(seconds, 2)}
            )
            if seconds is None:
                problems.append(f"nothing became visible {recovery_s_max} s after {kind.name} died")
            await asyncio.sleep(settle_s)
    stop.set()
    await asyncio.gather(*tasks)
    last = Connection(url, api_key)
    content_type, body = source.as_json(source.rows_of(next_request, rows=rows))
    final = await send_until_received(
        last,
        path=f"/v1/tables/{table}/rows",
        key=f"{table}-{next_request}",
        content_type=content_type,
        body=body,
        tally=tally,
    )
    last.close()
    if final is None:
        problems.append("the last request has no receipt")
    else:
        received.add(next_request)
        problems += await check_table(
            url,
            api_key,
            table=table,
            tokens=[final["receipt"]["visibility_token"]],
            expected=source.expected_check(sorted(received), rows=rows),
        )
    missing = next_request + 1 - len(received)
    if missing:
        problems.append(f"{missing} requests have no receipt")
    problems += [f"stale read: {one}" for one in stale] + tally.problems
    return {
        "scenario": "crash",
        "kills": kills,
        "requests": len(received),
        "resent_after_failure": tally.resent,
        "reads": reads,
        "read_failures": read_failures,
        "stale_reads": len(stale),
        "verdict": problems[:20] or "held",
    }
