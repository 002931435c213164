"""Ingest in a closed loop, as a process of its own: as many clients as said, each sends its next
request when it has the answer to the last.

Speaks the protocol of `benchmarks.windows`: an order, then a window a line. The clients are those
of `benchmarks.raw_clients`. Each request has an idempotency key of its own and rows that no other
request has.
"""

from __future__ import annotations

import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

from benchmarks import data, windows
from benchmarks.http1 import Connection
from benchmarks.raw_clients import Clients

_TOKEN = re.compile(rb'"visibility_token": ?"([^"]*)"')


class ClosedLoad:
    """`url`: where rows go; `read_url`: where their visibility is asked for."""

    def __init__(
        self,
        *,
        url: str,
        read_url: str,
        api_key: str,
        table: str,
        clients: int,
        rows: int,
        seed: int,
        templates: int = 1_000,
        warm_s: float = 1.0,
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._read_url, self._api_key = read_url, api_key
        self._rows, self._warm_s = rows, warm_s
        rng = random.Random(seed)
        self._templates = [data.Template(rows, rng) for _ in range(templates)]
        self._lengths = [b"%d" % len(one) for one in self._templates]
        self._head = (
            f"POST /v1/tables/{table}/rows HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Authorization: Bearer {api_key}\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {table}-{seed}-{time.time_ns()}-"
        ).encode()
        self._clients = Clients(clients, self._host, self._port, b"202", self.next_request)
        self._number = seed * data.REQUESTS_APART

    def next_request(self) -> tuple[bytes, ...]:
        number = self._number
        self._number += 1
        place = number % len(self._templates)
        body = self._templates[place].body(number)
        return b"%s%d\r\nContent-Length: %s\r\n\r\n" % (
            self._head, number, self._lengths[place],
        ), body  # fmt: skip

    async def warm(self) -> None:
        if self._warm_s:
            await self.window(seconds=self._warm_s)

    async def window(self, *, seconds: float, requests_max: int | None = None) -> dict[str, Any]:
        began = time.perf_counter()
        found = await self._clients.drive(seconds, requests_max=requests_max)
        visible = await self._visible()
        published_s = time.perf_counter() - began
        rows = found["requests"] * self._rows
        return found | {
            "rows": rows,
            "published_s": round(published_s, 3),
            "rows_per_s": round(rows / published_s),
            "visible": visible,
        }

    def close(self) -> None:
        self._clients.close()

    async def _visible(self) -> bool:
        """Wait until the last receipt of each client is covered; all its earlier ones are then."""

        tokens = [
            found[1].decode()
            for answer in self._clients.last_answers()
            if (found := _TOKEN.search(answer)) is not None
        ]
        connection = Connection(self._read_url, self._api_key)
        answer = await connection.post_json(
            "/v1/visibility", {"token": tokens, "timeout_ms": 60_000}
        )
        connection.close()
        return answer.status == 200


async def main() -> None:
    order = await windows.order()
    load = ClosedLoad(**order)
    await load.warm()
    await windows.serve(load.window)


if __name__ == "__main__":
    windows.run(main())
