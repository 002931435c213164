"""The real HTTP door over a lake in PostgreSQL: uvicorn on a socket, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from serve_app.app import create_app
from serve_app.dependencies import Dependencies, HttpLimits
from serve_app.limits_bytes import ByteBudget
from storage.ingesting.batches import BatchService
from storage.ingesting.grants import Grant
from storage.ingesting.keyring import KeyRing
from storage.ingesting.service import IngestService
from storage.ingesting.table_cache import TableCache
from storage.ingesting.table_service import TableService
from storage.postgres import PostgresLake
from storage.reading.barrier import Barrier
from storage.reading.manifest import Manifest
from storage.reading.resolve import Resolver
from storage.reading.watcher import HeadWatcher

_GRANTS = (Grant("ingest"), Grant("create"), Grant("query"), Grant("admin"))


@dataclass(frozen=True, slots=True)
class Door:
    """One ingest server. `port` is its socket; `key` opens it."""

    port: int
    key: str
    budget: ByteBudget
    http: httpx.AsyncClient

    async def send(
        self, rows: object, *, key: str | None = None, table: str = "t", timeout_ms: int = 5_000
    ) -> httpx.Response:
        headers = self.headers() | ({} if key is None else {"idempotency-key": key})
        path = f"/v1/tables/{table}/rows?timeout_ms={timeout_ms}"
        return await self.http.post(path, content=json.dumps(rows), headers=headers)

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}", "content-type": "application/json"}

    def request_head(self, *, key: str, length: int, timeout_ms: int = 5_000) -> bytes:
        """The head of a request by hand, whose body is up to the caller."""

        lines = [
            f"POST /v1/tables/t/rows?timeout_ms={timeout_ms} HTTP/1.1",
            f"host: 127.0.0.1:{self.port}",
            f"content-length: {length}",
            f"idempotency-key: {key}",
            *(f"{name}: {value}" for name, value in self.headers().items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def door(lake: PostgresLake, *, keys_cached_s: float = 5.0) -> AsyncIterator[Door]:
    """The API without SQL, as an ingest replica has it."""

    watcher = HeadWatcher(lake.catalog, poll_s=0.05)
    barrier = Barrier(catalog=lake.catalog, bus=lake.bus, watcher=watcher, codec=lake.codec)
    manifest = Manifest(lake.catalog)
    keyring = KeyRing(lake.keys, cache_s=keys_cached_s)
    tables = TableCache(lake.catalog)
    budget = ByteBudget(HttpLimits().inflight_bytes_max)
    app = create_app(
        Dependencies(
            keyring=keyring,
            catalog=lake.catalog,
            bus=lake.bus,
            codec=lake.codec,
            resolver=Resolver(catalog=lake.catalog, barrier=barrier),
            manifest=manifest,
            budget=budget,
            ready={"catalog": lake.catalog.head, "bus": lake.bus.ends},
            ingest=IngestService(
                bus=lake.bus, catalog=lake.catalog, barrier=barrier, tables=tables
            ),
            tables=TableService(
                catalog=lake.catalog, barrier=barrier, tables=tables, keys=keyring.store
            ),
            batches=BatchService(bus=lake.bus, watcher=watcher),
        )
    )
    key = (await keyring.issue(principal="someone", grants=_GRANTS)).text
    watcher.start()
    async with listening(app) as port:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
            yield Door(port, key, budget, http)
    await watcher.stop()
    await barrier.close()
    await manifest.close()


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """An ASGI application on a free port of the loopback."""

    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield int(sock.getsockname()[1])
    finally:
        server.should_exit = True
        await serving
        sock.close()


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Mapping[str, Any]]:
    """(status, headers, document) of an answer read by hand."""

    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, json.loads(body)


async def until(condition: Any, *, within_s: float = 10.0) -> None:
    """Polls what gives no signal."""

    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        await asyncio.sleep(0.005)
