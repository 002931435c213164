"""Ingest at a fixed rate as a process of its own: an order as one line of JSON on stdin, requests
until stdin ends, then the samples as JSON on stdout.

The loop is open: each request has a time at which it is due, whatever the ones before it do, and
is measured from that time. Times are of the machine's monotonic clock, so that another process of
it can say what happened meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import uvloop

from benchmarks import data
from benchmarks.http1 import Connection, Dropped

_BODIES = 1_000
_CONNECTIONS = 64


class OpenLoad:
    """One load. `samples`: when a request was due, ms to its receipt, and for one of
    `visible_each` requests ms until its rows were visible."""

    def __init__(
        self,
        *,
        url: str,
        api_key: str,
        table: str,
        rows: int,
        rate: float,
        visible_each: int,
        read_url: str | None = None,
    ) -> None:
        self._path = f"/v1/tables/{table}/rows"
        self._rate, self._visible_each = rate, visible_each
        rng = random.Random(rate)
        self._bodies = [data.json_body(n * rows, rows, rng) for n in range(_BODIES)]
        self._name = f"{table}-{time.monotonic_ns()}"
        self._writers: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._readers: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        for _ in range(_CONNECTIONS):
            self._writers.put_nowait(Connection(url, api_key))
            self._readers.put_nowait(Connection(read_url or url, api_key))
        self.samples: list[tuple[float, float, float | None]] = []
        self.failures: dict[str, int] = {}

    async def run(self, stop: asyncio.Event) -> None:
        began, number = time.monotonic(), 0
        requests: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            due = began + number / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._request(number, due))
            requests.add(task)
            task.add_done_callback(requests.discard)
            number += 1
        await asyncio.gather(*requests)

    async def _request(self, number: int, due: float) -> None:
        try:
            token = await self._write(number)
            ack_ms = (time.monotonic() - due) * 1000
            visible_ms = None
            if number % self._visible_each == 0:
                await self._wait_for(token)
                visible_ms = (time.monotonic() - due) * 1000
            self.samples.append((due, ack_ms, visible_ms))
        except Dropped as error:
            self._failed(str(error))

    async def _write(self, number: int) -> str:
        connection = await self._writers.get()
        try:
            answer = await connection.request(
                "POST",
                self._path,
                body=self._bodies[number % _BODIES],
                headers={
                    "Content-Type": "application/json",
                    "Idempotency-Key": f"{self._name}-{number}",
                },
            )
        finally:
            self._writers.put_nowait(connection)
        if answer.status != 202:
            raise Dropped(answer.code or str(answer.status))
        return str(answer.json()["receipt"]["visibility_token"])

    async def _wait_for(self, token: str) -> None:
        connection = await self._readers.get()
        try:
            answer = await connection.post_json(
                "/v1/visibility", {"token": token, "timeout_ms": 100_000}
            )
        finally:
            self._readers.put_nowait(connection)
        if answer.status != 200:
            raise Dropped(answer.code or str(answer.status))

    def _failed(self, name: str) -> None:
        self.failures[name] = self.failures.get(name, 0) + 1


async def main() -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    order = json.loads(sys.stdin.readline())
    announce = order.pop("announce", False)
    load = OpenLoad(**order)
    if announce:
        print("ready", flush=True)
    stop, cpu = asyncio.Event(), time.process_time()
    reading = loop.run_in_executor(None, sys.stdin.read)
    reading.add_done_callback(lambda _: stop.set())
    await load.run(stop)
    await reading
    cpu_s = round(time.process_time() - cpu, 3)
    return {"samples": load.samples, "failures": load.failures, "load_cpu_s": cpu_s}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(main())))
