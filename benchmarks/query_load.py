"""Small queries in a closed loop over HTTP, as a process of its own: each client asks its next
question when it has the answer to the last. Speaks the protocol of `benchmarks.windows`.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from benchmarks import windows
from benchmarks.raw_clients import Clients


class QueryLoad:
    """The questions are asked in turn."""

    def __init__(self, *, url: str, api_key: str, clients: int, questions: list[str]) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        self._requests = []
        for question in questions:
            body = json.dumps({"sql": question}).encode()
            head = (
                f"POST /v1/query HTTP/1.1\r\nHost: {host}:{port}\r\n"
                f"Authorization: Bearer {api_key}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode()
            self._requests.append((head + body,))
        self._number = 0
        self._clients = Clients(clients, host, port, b"200", self._next)

    def _next(self) -> tuple[bytes, ...]:
        self._number += 1
        return self._requests[self._number % len(self._requests)]

    async def window(self, *, seconds: float) -> dict[str, Any]:
        found = await self._clients.drive(seconds)
        return found | {
            "queries_per_s": round(found["requests"] / found["acknowledged_s"], 1),
            "query_ms_p50": found.pop("ack_ms_p50"),
            "query_ms_p99": found.pop("ack_ms_p99"),
        }


async def main() -> None:
    load = QueryLoad(**await windows.order())
    await load.window(seconds=1.0)
    await windows.serve(load.window)


if __name__ == "__main__":
    windows.run(main())
