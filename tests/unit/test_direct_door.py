"""The direct door over real sockets: what HAProxy and Serve bound elsewhere is bounded here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.stack import Stack
from lakebus.errors import StartRefused
from lakebus.settings import Settings
from serve_app.app import create_api_app
from serve_app.calls import AT_HAND, Receive, Scope, Send
from serve_app.dependencies import HttpLimits
from serve_app.direct import Application, DirectDoor, DoorSettings
from serve_app.direct_protocol import HEAD_BYTES_MAX, ConnectionLimits
from serve_app.direct_url import IngestUrl, door_id
from tests.unit.http_rig import Server, server

ROWS = "/v1/tables/events/rows"
URL = IngestUrl(host="127.0.0.1", http_port=8350, door_id="0123456789abcdef")
SETTINGS = DoorSettings(drain_s=0.0, finish_s=5.0, bind_again_s=0.1)


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


@asynccontextmanager
async def opened(
    application: Application, settings: DoorSettings = SETTINGS
) -> AsyncIterator[DirectDoor]:
    door = DirectDoor(settings, URL)
    async with door.opened(application):
        yield door


def quick(**limits: Any) -> DoorSettings:
    return dataclasses.replace(SETTINGS, connections=ConnectionLimits(**limits))


class Client:
    """One connection, spoken to in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(
        self, method: str, path: str, body: bytes = b"", *headers: str, length: int = -1
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", *headers]
        lines.append(f"content-length: {len(body) if length < 0 else length}")
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            pairs = [line.split(": ", 1) for line in head[1:] if line]
            headers = {name.lower(): value for name, value in pairs}
            body = await self.reader.readexactly(int(headers["content-length"]))
        found = json.loads(body) if "json" in headers["content-type"] else body
        return int(head[0].split()[1]), headers, found

    async def ended(self) -> bytes:
        """What still came before the server ended the connection."""

        async with asyncio.timeout(20):
            return await self.reader.read()


@asynccontextmanager
async def client(door: DirectDoor) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


class Held:
    """An application whose answers wait for `gate`."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = asyncio.Semaphore(0)
        self.cancelled = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered.release()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/plain"), (b"content-length", b"4")],
            }
        )
        await send({"type": "http.response.body", "body": b"done"})


# --- the same application ------------------------------------------------------------------------


async def test_A3_the_door_and_the_other_way_give_one_receipt(lake: Server) -> None:
    body = json.dumps([{"id": 1}]).encode()
    named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
    assert lake.app.dependencies is not None
    app = create_api_app(lake.app.dependencies)
    async with opened(app.direct) as door, client(door) as one:
        first = await lake.send([{"id": 1}], key="k")
        one.send("POST", ROWS, body, *named, "idempotency-key: k")
        status, headers, found = await one.answer()
        assert (status, found["replayed"]) == (202, True)
        assert found["receipt"] == first.json()["receipt"]
        assert headers["idempotent-replayed"] == "true"
        assert headers["x-request-id"]
        assert headers["date"].endswith("GMT")
        one.send("POST", ROWS, body, named[0])
        assert (await one.answer())[0] == 401
        one.send("POST", "/v1/query", b"{}", *named)
        status, _, found = await one.answer()
        assert (status, found["code"]) == (404, "not_found")
        assert "to the server's url" in found["detail"]
        one.send("GET", "/healthz")
        status, headers, _ = await one.answer()
        assert (status, headers["lakebus-door"]) == (200, URL.door_id)


async def test_A11_a_body_over_the_limit_is_refused_unread(lake: Server) -> None:
    named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
    async with opened(lake.app.direct) as door, client(door) as one:
        one.send("POST", ROWS, b"[", *named, "expect: 100-continue", length=10**12)
        status, _, found = await one.answer()  # and no 100 before it
        assert (status, found["code"]) == (413, "body_too_large")


async def test_A11_a_refusal_arrives_although_the_body_still_comes() -> None:
    async with server(limits=HttpLimits(body_bytes_max=1024)) as lake:
        await lake.create()
        named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
        async with opened(lake.app.direct) as door:
            async with client(door) as one:
                one.send("POST", ROWS, b" " * 2_000_000, *named)
                assert (await one.answer())[2]["code"] == "body_too_large"
                one.send("POST", ROWS, b'{"id": 1}', *named)  # the rest was read and thrown away
                assert (await one.answer())[0] == 202
            async with client(door) as one:
                one.send("POST", ROWS, b" " * 100_000, *named, "connection: close", length=10**12)
                status, headers, _ = await one.answer()
                assert (status, headers["connection"]) == (413, "close")
                one.writer.write_eof()
                assert await one.ended() == b""


async def test_a_body_that_is_there_is_taken_at_once_and_another_one_awaited() -> None:
    began = asyncio.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        began.set()
        take = scope[AT_HAND]
        body, how = take(), b"at hand"
        if body is None:
            body, how = (await receive())["body"], b"in messages"
        else:
            assert take() is None, "it is given once"
        head = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
        await send(
            {"type": "http.response.start", "status": 200, "headers": [*head, (b"x-how", how)]}
        )
        await send({"type": "http.response.body", "body": body})

    async with opened(application) as door, client(door) as one:
        one.send("POST", "/rows", b"rows")
        status, headers, body = await one.answer()
        assert (status, headers["x-how"], body) == (200, "at hand", b"rows")
        began.clear()
        one.send("POST", "/rows", length=4)
        await began.wait()
        one.writer.write(b"rows")
        status, headers, body = await one.answer()
        assert (status, headers["x-how"], body) == (200, "in messages", b"rows")


async def test_D9_the_work_ends_when_the_client_leaves() -> None:
    held = Held()
    async with opened(held) as door:
        async with client(door) as one:
            one.send("GET", "/slow")
            await held.entered.acquire()
        async with asyncio.timeout(20):
            await held.cancelled.wait()
        held.gate.set()
        async with client(door) as one:
            one.send("GET", "/next")
            assert (await one.answer())[2] == b"done"


# --- bounds --------------------------------------------------------------------------------------


async def test_a_head_that_is_late_or_too_large_is_refused() -> None:
    held = Held()
    held.gate.set()
    async with opened(held, quick(head_s=0.2)) as door:
        async with client(door) as one:
            one.writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n")
            status, headers, found = await one.answer()
            assert (status, found["code"]) == (400, "malformed_request")
            assert "did not arrive" in found["detail"]
            assert headers["connection"] == "close"
        async with client(door) as one:  # nothing sent, nothing answered
            assert await one.ended() == b""
    async with opened(held) as door:
        for head in (
            b"GET / HTTP/1.1\r\nx: " + b"a" * HEAD_BYTES_MAX + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"x: aaaaaaaa\r\n" * 2000,
            b"GET /" + b"a" * HEAD_BYTES_MAX + b" HTTP/1.1\r\n\r\n",
        ):
            async with client(door) as one:
                one.writer.write(head)
                assert "more than" in (await one.answer())[2]["detail"]
                one.writer.write_eof()
                assert await one.ended() == b""
        async with client(door) as one:
            one.writer.write(b"this is no HTTP\r\n\r\n")
            assert (await one.answer())[2]["code"] == "malformed_request"
        async with client(door) as one:
            one.send("GET", "/", b"", "x: " + "a" * (HEAD_BYTES_MAX - 200))
            assert (await one.answer())[0] == 200


async def test_a_request_has_its_time_and_an_idle_connection_its_end() -> None:
    held = Held()
    async with opened(held, quick(request_s=0.2)) as door:
        async with client(door) as one:
            one.send("GET", "/slow")
            assert await one.ended() == b""
        async with asyncio.timeout(20):
            await held.cancelled.wait()
    held.gate.set()
    async with opened(held, quick(idle_s=0.1)) as door, client(door) as one:
        one.send("GET", "/")
        assert (await one.answer())[0] == 200
        assert await one.ended() == b""


async def test_requests_and_connections_have_a_number() -> None:
    held = Held()
    settings = dataclasses.replace(quick(connections_max=3), running_max=1, waiting_max=1)
    async with opened(held, settings) as door, contextlib.AsyncExitStack() as stack:
        three = [await stack.enter_async_context(client(door)) for _ in range(3)]
        three[0].send("GET", "/a")
        await held.entered.acquire()
        three[1].send("GET", "/b")
        while not door.status()["waiting"]:
            await asyncio.sleep(0.01)
        three[2].send("GET", "/c")
        status, headers, found = await three[2].answer()
        assert (status, found["code"], headers["retry-after"]) == (429, "backpressure", "1")
        async with client(door) as fourth:
            assert (await fourth.answer())[2]["code"] == "unavailable"
        held.gate.set()
        assert (await three[0].answer())[0] == (await three[1].answer())[0] == 200


# --- its end -------------------------------------------------------------------------------------


async def test_a_drain_answers_what_runs_and_sends_everybody_elsewhere() -> None:
    held = Held()
    door = DirectDoor(SETTINGS, URL)
    async with contextlib.AsyncExitStack() as stack:
        life = contextlib.AsyncExitStack()
        await life.enter_async_context(door.opened(held))
        running = await stack.enter_async_context(client(door))
        idle = await stack.enter_async_context(client(door))
        held.gate.set()
        idle.send("GET", "/")
        await idle.answer()
        held.gate.clear()
        running.send("GET", "/slow")
        await held.entered.acquire()
        await held.entered.acquire()
        port = door.port
        ending = asyncio.create_task(life.aclose())
        assert await idle.ended() == b""
        assert not ending.done()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        held.gate.set()
        _, headers, body = await running.answer()
        assert (body, headers["connection"]) == (b"done", "close")
        await ending
        assert door.status()["state"] == "closed"


async def test_while_it_can_still_be_reached_a_draining_door_is_not_ready() -> None:
    held = Held()
    held.gate.set()
    async with opened(held, dataclasses.replace(SETTINGS, drain_s=0.5)) as door:
        async with client(door) as one:
            door.stopping()
            await asyncio.sleep(0)
            one.send("GET", "/readyz")
            status, headers, found = await one.answer()
            assert (status, found["code"], headers["connection"]) == (503, "unavailable", "close")
        async with client(door) as one:
            one.send("GET", "/")
            assert (await one.answer())[1]["connection"] == "close"
        assert door.advertised("127.0.0.1:8350") is None


async def test_two_replicas_share_a_port_and_the_drain_of_one_loses_nothing() -> None:
    held = Held()
    held.gate.set()

    async def ask() -> int:
        async with client(first) as one:
            one.send("GET", "/")
            return (await one.answer())[0]

    async with opened(held) as first, contextlib.AsyncExitStack() as life:
        second = DirectDoor(dataclasses.replace(SETTINGS, port=first.port), URL)
        await life.enter_async_context(second.opened(held))
        before = [asyncio.create_task(ask()) for _ in range(48)]
        await asyncio.sleep(0)
        ending = asyncio.create_task(life.aclose())
        after = [asyncio.create_task(ask()) for _ in range(48)]
        assert set(await asyncio.gather(*before, *after)) == {200}
        await ending


async def test_a_taken_port_closes_the_door_and_makes_nobody_ill() -> None:
    held = Held()
    held.gate.set()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        door = DirectDoor(dataclasses.replace(SETTINGS, port=port), URL)
        async with door.opened(held):
            assert door.ended() is None
            state = door.status()
            assert state["state"] == "closed"
            assert str(port) in str(state["trouble"])
            assert "direct.port" in str(state["trouble"])
            assert door.advertised("127.0.0.1:8350") is None
            other.close()
            async with asyncio.timeout(20):
                while not door.listening:
                    await asyncio.sleep(0.02)
            async with client(door) as one:
                one.send("GET", "/")
                assert (await one.answer())[0] == 200


def test_up_is_refused_on_a_chosen_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        flags = {"data_dir": str(tmp_path), "profile": "test", "direct.port": port}
        stack = Stack(Settings.load(environ={}, flags=flags))
        with pytest.raises(StartRefused, match=rf"Port {port} is taken.*direct\.port"):
            stack._take_ports(None)
        stack._claims.release()


async def test_a_listener_that_has_ended_makes_the_replica_ill() -> None:
    async with opened(Held()) as door:
        assert door.ended() is None
        assert door._listener is not None
        door._listener.close()
        assert door.ended() == "the listener of the direct door has ended"


# --- who is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host_header", "told"),
    [
        (URL, "127.0.0.1:8350", "http://127.0.0.1:9"),
        (URL, "localhost:8350", "http://127.0.0.1:9"),
        (URL, "[::1]:8350", "http://127.0.0.1:9"),
        (URL, "lake.example:8350", None),
        (URL, "127.0.0.1:9000", None),
        (URL, "127.0.0.1", None),
        (URL, None, None),
        (URL, "127.0.0.1:x", None),
        (IngestUrl("0.0.0.0", 8350), "lake.example:8350", "http://lake.example:9"),
        (IngestUrl("0.0.0.0", 8350), "[fd00::1]:8350", "http://[fd00::1]:9"),
        (IngestUrl("0.0.0.0", 8350), "lake.example", None),
        (IngestUrl("10.0.0.1", 8350), "10.0.0.1:8350", "http://10.0.0.1:9"),
        (IngestUrl("10.0.0.1", 8350), "10.0.0.2:8350", None),
        (IngestUrl("127.0.0.1", 1, "https://in.example/"), None, "https://in.example"),
    ],
)
def test_the_door_is_told_to_those_who_can_reach_it(
    url: IngestUrl, host_header: str | None, told: str | None
) -> None:
    assert url.for_client(host_header, 9) == told


async def test_an_odd_host_header_changes_nothing_but_the_address(lake: Server) -> None:
    assert lake.app.dependencies is not None
    async with opened(lake.app.direct) as door:
        lake.app.dependencies = dataclasses.replace(lake.app.dependencies, door=door)
        for odd in ("[::1]x:8350", "a..b:8350", "x" * 4_000, "Lake.Example"):
            lake.http.headers["host"] = odd
            answer = await lake.send([{"id": 1}])
            assert answer.status_code in (200, 201, 202), answer.text
            assert "lakebus-ingest-url" not in answer.headers
            assert (await lake.get("/v1/admin/status")).json()["ingest_url"] is None


def test_the_id_of_a_door_is_its_lakes() -> None:
    one, other = uuid.UUID(int=1), uuid.UUID(int=2)
    assert door_id(one) == door_id(one) != door_id(other)


async def test_status_and_answers_of_the_other_way_tell_the_door(lake: Server) -> None:
    assert lake.app.dependencies is not None
    async with opened(lake.app.direct) as door:
        lake.app.dependencies = dataclasses.replace(lake.app.dependencies, door=door)
        lake.http.headers["host"] = "127.0.0.1:8350"
        told = f"http://127.0.0.1:{door.port}"
        answer = await lake.send([{"id": 1}])
        assert answer.headers["lakebus-ingest-url"] == f"{told}; door={URL.door_id}"
        found = (await lake.get("/v1/admin/status")).json()
        assert found["ingest_url"] == told
        assert found["direct_door"]["state"] == "listening"
        async with client(door) as one:
            body = json.dumps([{"id": 2}]).encode()
            named = ("content-type: application/json", f"authorization: Bearer {lake.key}")
            one.send("POST", ROWS, body, *named)
            assert "lakebus-ingest-url" not in (await one.answer())[1]
