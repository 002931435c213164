"""The server that is asked: a lake in memory with something of everything in it, and its workers.

Requests are made of bytes as a client would send them, and handed to the application as an ASGI
server would hand them over. While one runs, rows are published and jobs end as they do elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import requests

from lakebus.clock import SystemClock, new_uuid
from lakebus.errors import SqlError
from serve_app.dependencies import HttpLimits
from storage.bus.settings import BusSettings
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.maintenance.registry import RUNNABLE
from storage.memory_lake import MemoryLake
from storage.reading.predicates import PredicateRequest
from tests.unit.actors_rig import publishing
from tests.unit.http_rig import EVENTS, Server, server

BASE_URL = "http://lake"
#: What a request may take before it counts as one that never ends.
_ENDS_S = 60.0
_LOOK_S = 0.002
_BODY_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back, and what was different in the lake after it."""

    status: int
    headers: Mapping[str, list[str]]
    body: bytes
    before: tuple[int, ...]
    after: tuple[int, ...]
    held_bytes: int
    running: int


class World:
    """`known` are values of parameters that exist, by their names (after that of the operation,
    where they are its own)."""

    def __init__(self, lake: Server, *, published_here: bool = True) -> None:
        self.lake = lake
        self._published_here = published_here
        self.known: dict[str, Sequence[Any]] = {}

    async def fill(self) -> None:
        lake = self.lake
        await lake.create()
        rows = [{"id": 1, "note": "a"}, {"id": 2}]
        sent = await self._published(lake.send(rows, key="first", query="?wait=visible"))
        odd = [{"id": 3}, {"id": "x"}]
        for name in ("second", "third"):
            await lake.send(odd, key=name, query="?on_invalid=quarantine")
        if self._published_here:
            await lake.send([{"id": 4}])
            await lake.publish(quarantine=True)
        headers = lake.headers()
        tag = {"name": "v1", "snapshot_id": "latest"}
        await lake.http.post("/v1/admin/tags", json=tag, headers=headers)
        new = {"principal": "other", "scopes": ["query"]}
        key = await lake.http.post("/v1/admin/keys", json=new, headers=headers)
        job = await lake.http.post("/v1/admin/maintenance/validate", headers=headers)
        deleted, erased = await self._job_of("delete"), await self._job_of("erase")
        items = (await lake.get("/v1/admin/quarantine")).json()["items"]
        self.known = {
            "table": ["events", "Events"],
            "batch_id": [sent.json()["receipt"]["batch_id"]],
            "snapshot_id": ["latest", "1", "2", "3"],
            "quarantine_id": [item["quarantine_id"] for item in items],
            "key_id": [key.json()["key_id"]],
            "job_id": [job.json()["job_id"]],
            "get_delete job_id": [deleted],
            "get_erasure job_id": [erased],
            "name": ["v1"],
            "kind": ["compact", "validate"],
        }
        self.known |= {
            "token": [sent.json()["receipt"]["visibility_token"]],
            "after": [2],
            "key": ["first"],
            "target": ["events"],
        }

    async def _job_of(self, kind: str) -> str:
        """A delete, or an erasure, that was asked for; its id."""

        path, document = f"/v1/tables/events/{kind}", {"where": "id = 2"}
        headers = self.lake.headers()
        asked = await self._published(self.lake.http.post(path, json=document, headers=headers))
        return str(asked.json()["job_id"])

    async def _published(self, request: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        """The answer to a request that waits for the roles."""

        asked = asyncio.create_task(request)
        while not (await asyncio.wait((asked,), timeout=_LOOK_S))[0]:
            await self._work()
        assert asked.result().status_code == 200, asked.result().text
        return asked.result()

    def footprint(self) -> tuple[int, ...]:
        """Counts of what a request can leave behind; publishing what was there changes none."""

        state = self.lake.lake.state
        return (
            self.lake.entries,
            len(state.keys),
            len(state.tables),
            sum(len(table.versions) for table in state.tables.values()),
            sum(not table.accepts_rows for table in state.tables.values()),
            len(state.tags),
            len(state.jobs),
            len(state.pins),
        )

    async def ask(self, request: requests.PreparedRequest) -> Answered:
        """Raises TimeoutError for a request that does not end."""

        before = self.footprint()
        exchange = _Exchange(request)
        running = asyncio.create_task(exchange.run(self.lake))
        async with asyncio.timeout(_ENDS_S):
            while not (await asyncio.wait((running,), timeout=_LOOK_S))[0]:
                await self._work()
        await running
        assert self.lake.app.dependencies is not None
        queries = self.lake.app.dependencies.running
        answered = Answered(
            exchange.status,
            exchange.headers,
            bytes(exchange.body),
            before,
            self.footprint(),
            self.lake.budget.held_bytes,
            len(await queries.running(1)),
        )
        await self._work()
        return answered

    async def _work(self) -> None:
        """What the roles of a stack do meanwhile; and the table that all ask for comes back."""

        lake = self.lake
        late = any(shard.end > shard.watermark for shard in lake.lake.state.shards)
        if late and self._published_here:
            await lake.publish()
        while (claim := await lake.jobs.claim(new_uuid(), kinds=RUNNABLE, ttl_s=60)) is not None:
            head = lake.lake.state.head_id
            report = {
                "snapshot_id": head,
                "evaluated_at_snapshot_id": head,
                "deleted_rows": 1,
                "history": str(lake.lake.history),
            }
            await lake.jobs.finish(claim, report)
        if not any(t.live and t.name == "events" for t in lake.lake.state.tables.values()):
            await lake.create(EVENTS)


class _Exchange:
    """One request as ASGI messages."""

    def __init__(self, request: requests.PreparedRequest) -> None:
        self.status = 0
        self.headers: dict[str, list[str]] = {}
        self.body = bytearray()
        self._request = request
        self._sent = False
        self._left = asyncio.Event()

    async def run(self, lake: Server) -> None:
        url = urlsplit(str(self._request.url))
        headers = self._request.headers.items()
        scope = {
            "type": "http",
            "method": str(self._request.method),
            "path": unquote(url.path),
            "raw_path": url.path.encode("ascii"),
            "query_string": url.query.encode("ascii"),
            "headers": [(_bytes(name).lower(), _bytes(value)) for name, value in headers],
        }
        await lake.app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._sent:
            await self._left.wait()
        self._sent = True
        body = self._request.body or b""
        assert isinstance(body, bytes | str), "no body is sent in pieces"
        return {
            "type": "http.request",
            "body": body if isinstance(body, bytes) else body.encode("utf-8"),
            "more_body": False,
        }

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "an answer starts once"
            self.status = message["status"]
            for name, value in message["headers"]:
                self.headers.setdefault(name.decode("ascii"), []).append(value.decode("latin-1"))
        else:
            self.body += message["body"]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


class _PlayedPredicates:
    """Takes every condition to be one, but an empty one."""

    async def check(self, request: PredicateRequest) -> None:
        if not request.where:
            raise SqlError("there is no condition", position=0)


@asynccontextmanager
async def world(*, folder: Path | None = None) -> AsyncIterator[World]:
    """`folder`: run statements with DuckDB, which may read there; else they are played."""

    limits = HttpLimits(body_bytes_max=_BODY_MAX)
    if folder is None:
        async with server(limits=limits) as lake:
            assert lake.app.dependencies is not None
            lake.app.dependencies = dataclasses.replace(
                lake.app.dependencies, predicates=_PlayedPredicates()
            )
            made = World(lake)
            await made.fill()
            yield made
        return
    memory = MemoryLake(settings=BusSettings(shards=2), clock=SystemClock())
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    store = LocalObjectStore(folder / "objects")
    async with (
        _engine(folder) as engine,
        publishing(memory, store),
        server(limits=limits, lake=memory, engine=engine, store=store) as lake,
    ):
        made = World(lake, published_here=False)
        await made.fill()
        yield made


@asynccontextmanager
async def _engine(folder: Path) -> AsyncIterator[QueryEngine]:
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(folder / "objects"),
            temp_directory=str(folder / "spill"),
            spare=False,
        )
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
