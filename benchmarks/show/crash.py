"""Crash: SIGKILL of each kind of process while clients write and read.

Each kind is killed in turn under load. Writers send each request until it has a receipt; readers
ask with the token of the last write they know. At the end the lake must hold exactly the source:
nothing lost, nothing double, and nobody did anything by hand.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http1 import Connection, Dropped
from benchmarks.show import processes, source
from benchmarks.show.exactly_once import Tally, check_table, make_table, send_until_received


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of process: `words` of its command line, or the `role` that its actor has."""

    name: str
    words: tuple[str, ...] = ()
    role: str = ""


#: With the placement `together`, lease manager, coordinator, publisher and supervisor are `core`.
TOGETHER = (Kind("core (lease manager, coordinator, publisher, supervisor)", role="core"),)
SPREAD = (
    Kind("commit coordinator", role="coordinator"),
    Kind("snapshot publisher", role="publisher"),
    Kind("lease manager", role="lease_manager"),
    Kind("supervisor", role="supervisor"),
)
COMMON = (
    Kind("ingest replica", ("ServeReplica:api",)),
    Kind("query replica", ("ServeReplica:query",)),
    Kind("query child", ("storage.engine.child_main",)),
    Kind("Serve controller", ("ServeController",)),
    Kind("HAProxy", ("haproxy", " -f ")),
    Kind("PostgreSQL", ("postgres -D",)),
)


class CrashRun:
    """One run: load in the background, kills in the foreground, the count at the end."""

    def __init__(self, url: str, api_key: str, *, supervisor: int, table: str, rows: int) -> None:
        self._url, self._api_key = url, api_key
        self._supervisor, self._table, self._rows = supervisor, table, rows
        self._stop = asyncio.Event()
        self._next_request = 0
        self._acknowledged: list[tuple[int, str]] = []
        self._tally = Tally()
        self._received: set[int] = set()
        self._stale: list[str] = []
        self._reads = 0
        self._read_failures: dict[str, int] = {}
        self.problems: list[str] = []
        self.kills: list[dict[str, Any]] = []

    async def run(
        self, kinds: Sequence[Kind], *, rounds: int, settle_s: float, clients: int
    ) -> dict[str, Any]:
        await make_table(self._url, self._api_key, self._table)
        tasks = [asyncio.create_task(self._write()) for _ in range(clients)]
        tasks += [asyncio.create_task(self._read()) for _ in range(2)]
        await asyncio.sleep(settle_s)
        for _ in range(rounds):
            for kind in kinds:
                await self._kill(kind)
                await asyncio.sleep(settle_s)
        self._stop.set()
        await asyncio.gather(*tasks)
        await self._count()
        problems = self.problems + [f"stale read: {one}" for one in self._stale]
        problems += self._tally.problems
        return {
            "scenario": "crash",
            "kills": self.kills,
            "requests": len(self._received),
            "resent_after_failure": self._tally.resent,
            "reads": self._reads,
            "read_failures": self._read_failures,
            "stale_reads": len(self._stale),
            "verdict": problems[:20] or "held",
        }

    async def _send(self, connection: Connection, request_no: int) -> None:
        encode = source.ENCODINGS[request_no % len(source.ENCODINGS)]
        content_type, body = encode(source.rows_of(request_no, rows=self._rows))
        answer = await send_until_received(
            connection,
            path=f"/v1/tables/{self._table}/rows",
            key=f"{self._table}-{request_no}",
            content_type=content_type,
            body=body,
            tally=self._tally,
            patience_s=180.0,
        )
        if answer is not None:
            self._received.add(request_no)
            self._acknowledged.append((request_no, answer["receipt"]["visibility_token"]))

    async def _write(self) -> None:
        connection = Connection(self._url, self._api_key, timeout_s=20.0)
        while not self._stop.is_set():
            request_no, self._next_request = self._next_request, self._next_request + 1
            await self._send(connection, request_no)
        connection.close()

    async def _read(self) -> None:
        connection = Connection(self._url, self._api_key, timeout_s=40.0)
        while not self._stop.is_set():
            if not self._acknowledged:
                await asyncio.sleep(0.05)
                continue
            failure = await self._read_back(connection)
            if failure is not None:
                self._read_failures[failure] = self._read_failures.get(failure, 0) + 1
                await asyncio.sleep(0.1)
        connection.close()

    async def _read_back(self, connection: Connection, *, timeout_ms: int = 30_000) -> str | None:
        """Reads the last acknowledged request by its token; None: it was there, else why not."""

        request_no, token = self._acknowledged[-1]
        try:
            answer = await connection.query(
                f"SELECT count(*) FROM {self._table} WHERE request_no = $n",
                parameters={"n": request_no},
                min_visibility_token=token,
                timeout_ms=timeout_ms,
            )
        except Dropped:
            return "dropped"
        self._reads += 1
        if answer.status != 200:
            return answer.code or f"{answer.status} without a code"
        found = int(answer.json()["rows"][0][0])
        if found != self._rows:
            self._stale.append(f"request {request_no}: {found} of {self._rows} rows")
        return None

    async def _kill(self, kind: Kind, *, recovery_s_max: float = 60.0) -> None:
        pids = await self._pids(kind)
        if not pids:
            self.problems.append(f"no process of the kind {kind.name} was found")
            return
        killed_s = time.monotonic()
        processes.kill(pids[0])
        seconds = await self._visible_again(killed_s, killed_s + recovery_s_max)
        self.kills.append({"kind": kind.name, "visible_again_s": seconds})
        if seconds is None:
            self.problems.append(f"{kind.name}: nothing visible {recovery_s_max} s after its death")

    async def _pids(self, kind: Kind) -> list[int]:
        if not kind.role:
            return processes.pids_of(self._supervisor, *kind.words)
        connection = Connection(self._url, self._api_key)
        try:
            answer = await connection.request("GET", "/v1/admin/status")
        finally:
            connection.close()
        mine = {pid for pid, _ in processes.descendants(self._supervisor)}
        return [
            actor["process_id"]
            for actor in answer.json()["actors"]
            if actor["role"].startswith(kind.role) and actor["process_id"] in mine
        ]

    async def _visible_again(self, since_s: float, until_s: float) -> float | None:
        """Seconds until a request that was begun after the kill was acknowledged and read back."""

        writing = Connection(self._url, self._api_key, timeout_s=20.0)
        reading = Connection(self._url, self._api_key, timeout_s=15.0)
        try:
            request_no, self._next_request = self._next_request, self._next_request + 1
            await self._send(writing, request_no)
            while time.monotonic() < until_s:
                if await self._read_back(reading, timeout_ms=10_000) is None:
                    return round(time.monotonic() - since_s, 2)
                await asyncio.sleep(0.05)
            return None
        finally:
            writing.close()
            reading.close()

    async def _count(self) -> None:
        """Compares the lake with the source, at a snapshot that covers the very last request."""

        last = self._next_request
        connection = Connection(self._url, self._api_key)
        await self._send(connection, last)
        connection.close()
        missing = last + 1 - len(self._received)
        if missing:
            self.problems.append(f"{missing} requests have no receipt")
        if last in self._received:
            self.problems += await check_table(
                self._url,
                self._api_key,
                table=self._table,
                tokens=[self._acknowledged[-1][1]],
                expected=source.expected_check(sorted(self._received), rows=self._rows),
            )


async def run(
    url: str,
    api_key: str,
    *,
    supervisor: int,
    kinds: Sequence[Kind] = (*TOGETHER, *COMMON),
    rounds: int = 1,
    settle_s: float = 4.0,
    clients: int = 4,
    rows: int = 10,
    table: str = "crash",
) -> dict[str, Any]:
    work = CrashRun(url, api_key, supervisor=supervisor, table=table, rows=rows)
    return await work.run(kinds, rounds=rounds, settle_s=settle_s, clients=clients)
