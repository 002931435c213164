"""HTTP clients that do little more than copy bytes: they share the cores with what they load.

They are connections of one event loop, each with one request at a time, made of ready bytes; an
answer is looked at only as far as its status and length. What they take of the processor is in the
figures (`load_cpu_…`).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from benchmarks.measures import percentile

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)")
_ANSWER_S = 60.0


class Client(asyncio.Protocol):
    """One connection: a request at a time, until the load has enough."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._sent_at = 0.0
        self.busy = False
        self.last_answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    @property
    def open(self) -> bool:
        return self._transport is not None

    def send(self) -> None:
        """Or leave, when enough was sent."""

        assert self._transport is not None
        if not self._clients.may_send():
            self._clients.left()
            return
        self.busy = True
        request = self._clients.next_request()
        self._sent_at = time.perf_counter()
        self._transport.writelines(request)

    def data_received(self, received: bytes) -> None:
        if self._received:
            received = self._received + received
        head = received.find(b"\r\n\r\n")
        if head >= 0:
            length = _LENGTH.search(received, 0, head)
            if length is None:
                self._clients.failed("an answer without a length")
                self.close()
                return
            if len(received) >= head + 4 + int(length[1]):
                self._received = b""
                self._answered(received, head + 4)
                return
        self._received = received

    def _answered(self, answer: bytes, body: int) -> None:
        now = time.perf_counter()
        self.busy = False
        if answer.startswith(self._clients.good):
            self.last_answer = answer
            self._clients.acknowledged((now - self._sent_at) * 1000)
        else:
            self._clients.refused(answer, body)
        if now >= self._clients.until:
            self._clients.left()
        elif self._transport is not None and not self._transport.is_closing():
            self.send()
        else:
            self._clients.reopen(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport, self._received = None, b""
        if self.busy:
            self.busy = False
            self._clients.failed("dropped")
            self._clients.reopen(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Clients:
    """`good`: the status that counts. `next_request`: the parts of a request, called for each."""

    def __init__(
        self,
        count: int,
        host: str,
        port: int,
        good: bytes,
        next_request: Callable[[], tuple[bytes, ...]],
    ) -> None:
        self._host, self._port = host, port
        self.good = b"HTTP/1.1 " + good
        self.next_request = next_request
        self._clients = [Client(self) for _ in range(count)]
        self._done = asyncio.Event()
        self._working = 0
        self._may_send: int | None = None
        self.until = 0.0
        self._latencies: list[float] = []
        self._failures: Counter[str] = Counter()
        self._reopening: set[asyncio.Task[None]] = set()

    async def drive(self, seconds: float, *, requests_max: int | None = None) -> dict[str, Any]:
        """All clients at work for the time, or until so many were sent; until the last answer."""

        await self._connect()
        self._latencies, self._failures = [], Counter()
        for client in self._clients:
            client.last_answer = b""
        self._may_send = requests_max
        self._done.clear()
        self._working = len(self._clients)
        cpu, began = time.process_time(), time.perf_counter()
        self.until = began + seconds
        for client in self._clients:
            client.send()
        async with asyncio.timeout(seconds + _ANSWER_S):
            await self._done.wait()
        took = time.perf_counter() - began
        cpu = time.process_time() - cpu
        requests = len(self._latencies)
        return {
            "requests": requests,
            "acknowledged_s": round(took, 3),
            "ack_ms_p50": percentile(self._latencies or [0.0], 0.5),
            "ack_ms_p99": percentile(self._latencies or [0.0], 0.99),
            "failures": dict(self._failures),
            "load_cpu_s": round(cpu, 3),
            "load_cpu_us_per_request": round(cpu * 1e6 / max(requests, 1), 1),
            "load_share_of_a_core": round(cpu / took, 3),
        }

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def last_answers(self) -> list[bytes]:
        """Of each client, its last good one."""

        return [client.last_answer for client in self._clients if client.last_answer]

    async def _connect(self) -> None:
        for client in self._clients:
            if not client.open:
                await self._open(client)

    async def _open(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: client, self._host, self._port)

    def reopen(self, client: Client) -> None:
        """A client whose connection ended goes on with a new one, as clients do."""

        task = asyncio.get_running_loop().create_task(self._go_on(client))
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    async def _go_on(self, client: Client) -> None:
        while time.perf_counter() < self.until:
            try:
                await self._open(client)
            except OSError:
                self.failed("refused to connect")
                await asyncio.sleep(0.05)
            else:
                client.send()
                return
        self.left()

    # --- what a client calls ---------------------------------------------------------------

    def may_send(self) -> bool:
        if self._may_send is None:
            return True
        self._may_send -= 1
        return self._may_send >= 0

    def acknowledged(self, ms: float) -> None:
        self._latencies.append(ms)

    def refused(self, answer: bytes, body: int) -> None:
        try:
            self._failures[str(json.loads(answer[body:])["code"])] += 1
        except (ValueError, KeyError, TypeError):
            self._failures[answer[9:12].decode("latin-1")] += 1

    def failed(self, why: str) -> None:
        self._failures[why] += 1

    def left(self) -> None:
        self._working -= 1
        if self._working == 0:
            self._done.set()
