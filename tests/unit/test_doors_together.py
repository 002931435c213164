"""Several direct doors: replicas that share a port, and a balancer (HAProxy) before those that do
not. One that drains hands its clients over, and a receipt is the same wherever it is asked for.

On uvloop, as replicas are: asyncio's own loop loses a connection that it accepts in the very turn
in which its listener is closed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvloop

import lakebus
from cluster.ray_environment import haproxy_program
from lakebus.receipts import Receipt
from serve_app.app import create_api_app
from serve_app.calls import Receive, Scope, Send
from serve_app.direct import DirectDoor
from tests.unit.client_rig import listening
from tests.unit.http_rig import server
from tests.unit.test_direct_door import SETTINGS, URL, Client, Held, opened

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
WRITERS = 4


class Counted:
    """A replica's application, and the keys of the rows that it took."""

    def __init__(self, application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._application = application
        self.keys: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope["headers"]:
            if name == b"idempotency-key":
                self.keys.append(value.decode())
        await self._application(scope, receive, send)


def row(number: int) -> list[dict[str, int]]:
    return [{"id": number}]


def test_A3_a_replica_that_drains_hands_its_clients_over_with_their_receipts() -> None:
    uvloop.run(a_replica_drains())


async def a_replica_drains() -> None:
    receipts: dict[str, Receipt] = {}
    numbers = itertools.count()
    async with server() as lake, listening(lake) as url, AsyncExitStack() as life:
        await lake.create()
        assert lake.app.dependencies is not None
        stays, leaves = (Counted(create_api_app(lake.app.dependencies)) for _ in range(2))
        first = await life.enter_async_context(opened(stays))
        second = DirectDoor(dataclasses.replace(SETTINGS, port=first.port, drain_s=0.1), URL)
        ending = AsyncExitStack()
        await ending.enter_async_context(second.opened(leaves))
        ended = asyncio.Event()
        door = f"http://127.0.0.1:{first.port}"

        def write() -> None:
            """Connections are made anew now and then: which replica gets one is chance."""
            with lakebus.connect(url, lake.key, timeout_s=20, ingest_url=door) as one:
                for number in itertools.islice(numbers, 4):
                    key = f"k{number}"
                    receipts[key] = one.ingest("events", row(number), key=key).receipt

        async def writer() -> None:
            while not (ended.is_set() and stays.keys):
                await asyncio.to_thread(write)

        async def drain() -> None:
            while len(leaves.keys) < WRITERS:
                await asyncio.sleep(0.001)
            second.stopping()
            await ending.aclose()
            ended.set()

        async with asyncio.timeout(30):
            await asyncio.gather(drain(), *(writer() for _ in range(WRITERS)))
        assert len(receipts) == lake.entries

        def replay() -> None:
            with lakebus.connect(url, lake.key, timeout_s=20, ingest_url=door) as one:
                for key in leaves.keys:
                    again = one.ingest("events", row(int(key[1:])), key=key)
                    assert (again.replayed, again.receipt) == (True, receipts[key])

        await asyncio.to_thread(replay)
        assert len(receipts) == lake.entries


# --- a balancer ----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@asynccontextmanager
async def balanced(folder: Path, doors: tuple[DirectDoor, DirectDoor]) -> AsyncIterator[int]:
    """HAProxy as the operations page sets it up, before these doors; its port."""

    page = OPERATIONS.read_text(encoding="utf-8")
    found = re.search(r"```haproxy\n(.*?)```", page, re.DOTALL)
    assert found is not None
    port, text = free_port(), found[1]
    for told, here in (
        ("0.0.0.0:8360", f"127.0.0.1:{port}"),
        ("10.0.0.1:8351", f"127.0.0.1:{doors[0].port}"),
        ("10.0.0.2:8351", f"127.0.0.1:{doors[1].port}"),
        ("inter 250ms", "inter 30ms"),
    ):
        assert told in text
        text = text.replace(told, here)
    path = folder / "haproxy.cfg"
    path.write_text(text)
    process = await asyncio.create_subprocess_exec(str(haproxy_program()), "-db", "-f", str(path))
    try:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.01)
        yield port
    finally:
        process.kill()
        await process.wait()


def test_a_balancer_takes_a_draining_door_out_before_it_closes(tmp_path: Path) -> None:
    uvloop.run(a_balanced_door_drains(tmp_path))


async def a_balanced_door_drains(folder: Path) -> None:
    held = Held()
    held.gate.set()
    asked: list[int] = []
    async with opened(held) as first, AsyncExitStack() as ending:
        second = DirectDoor(dataclasses.replace(SETTINGS, drain_s=0.5), URL)
        leaving = Counted(held)
        await ending.enter_async_context(second.opened(leaving))
        async with balanced(folder, (first, second)) as port:
            ended = asyncio.Event()

            async def ask() -> None:
                caller = Client(*await asyncio.open_connection("127.0.0.1", port))
                while not ended.is_set():
                    caller.send("GET", "/", b"", f"idempotency-key: k{len(asked)}")
                    asked.append((await caller.answer())[0])
                caller.writer.close()

            async def drain() -> None:
                while len(leaving.keys) < 20:
                    await asyncio.sleep(0.001)
                second.stopping()
                await asyncio.sleep(0)
                await ending.aclose()
                after = len(asked) + 20
                while len(asked) < after:
                    await asyncio.sleep(0.001)
                ended.set()

            async with asyncio.timeout(30):
                await asyncio.gather(drain(), *(ask() for _ in range(4)))
    assert set(asked) == {200}
