"""What tests of the client talk to: a lake on a real socket, and servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from lakebus.clock import SystemClock
from storage.bus.settings import BusSettings
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.memory_lake import MemoryLake
from tests.unit.actors_rig import publishing
from tests.unit.http_rig import Server, server


@asynccontextmanager
async def listening(made: Server) -> AsyncIterator[str]:
    """The server on a socket; its URL."""

    config = uvicorn.Config(
        made.app, port=0, host="127.0.0.1", lifespan="off", log_config=None, access_log=False
    )
    serving = uvicorn.Server(config)
    with socket.socket(proto=socket.IPPROTO_TCP) as sock:  # asyncio sets NODELAY by it
        sock.bind(("127.0.0.1", 0))
        task = asyncio.create_task(serving.serve(sockets=[sock]))
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            serving.should_exit = True
            await task


# --- a whole lake for tests without a loop ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lake:
    url: str
    key: str


@asynccontextmanager
async def _whole(folder: Path) -> AsyncIterator[Lake]:
    """Bus and catalog in memory, the roles that publish, DuckDB's process, HTTP on a socket."""

    objects = folder / "objects"
    objects.mkdir()
    store = LocalObjectStore(objects)
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(objects), temp_directory=str(folder / "spill"), spare=False
        )
    )
    memory = MemoryLake(settings=BusSettings(shards=2), clock=SystemClock())
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        await engine.start()
        await stack.enter_async_context(publishing(memory, store))
        made = await stack.enter_async_context(server(lake=memory, engine=engine, store=store))
        url = await stack.enter_async_context(listening(made))
        yield Lake(url, made.key)


@contextmanager
def whole_lake(folder: Path) -> Iterator[Lake]:
    """A lake whose loop runs in a thread of its own."""

    made: list[Lake] = []
    faults: list[BaseException] = []
    ready, over = threading.Event(), threading.Event()

    async def live() -> None:
        async with _whole(folder) as lake:
            made.append(lake)
            ready.set()
            await asyncio.to_thread(over.wait)

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:  # noqa: BLE001 - raised again where the test can see it
            faults.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        if made:
            yield made[0]
    finally:
        over.set()
        thread.join()
    if faults:
        raise faults[0]


# --- servers that misbehave ------------------------------------------------------------------


@contextmanager
def scripted(answers: list[bytes | None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request and answers the next of `answers`; None: hangs up."""

    left = iter(answers)

    def answer(_: bytes) -> bytes | None:
        return next(left)

    with answering(answer) as (url, requests):
        yield url, requests


@contextmanager
def answering(answer: Callable[[bytes], bytes | None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server, one request a connection, that answers what the function says for the request."""

    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def handle(connection: socket.socket) -> None:
        with connection:
            request = read_request(connection)
            requests.append(request)
            try:
                said = answer(request)
                if said is not None:
                    connection.sendall(said)
            except (OSError, StopIteration):
                return  # the client has left, or the script is over

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=handle, args=(connection,))
            thread.start()
            threads.append(thread)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for one in threads:
            one.join()


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    missing = (int(lengths[0].split(b":")[1]) if lengths else 0) - len(body)
    while missing > 0:
        part = connection.recv(missing)
        if not part:
            return data
        data += part
        missing -= len(part)
    return data


def answer_of(status: int, document: Any, *headers: str, length: int | None = None) -> bytes:
    """`length`: what the head says of the body, when it is not the truth."""

    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    said = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} X", f"content-length: {said}", "connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def accepted(rows: int = 1, *, token: str = "lb1.x", replayed: bool = False) -> dict[str, Any]:
    """The document that answers an ingest call."""

    return {
        "receipt": {
            "batch_id": "b1-0-0",
            "target": "t",
            "rows": rows,
            "rows_rejected": 0,
            "payload_fingerprint": "v1:00",
            "visibility_token": token,
            "accepted_at": "2026-01-01T00:00:00.000000Z",
            "idempotency_expires_at": "2026-01-02T00:00:00.000000Z",
        },
        "replayed": replayed,
        "visible": False,
        "snapshot_id": None,
        "columns_skipped": [],
    }


def problem_of(code: str, *, retryable: bool, **members: Any) -> dict[str, Any]:
    return {"code": code, "detail": f"it is {code}", "retryable": retryable, **members}


def header_of(request: bytes, name: bytes) -> bytes:
    lines = request.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return next(line for line in lines if line.lower().startswith(name + b":"))


def body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]
