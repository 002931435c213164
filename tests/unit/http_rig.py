"""The whole HTTP API over a lake in memory, driven as ASGI: no socket, no database, no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from lakebus.clock import SystemClock
from serve_app.app import create_app
from serve_app.dependencies import Dependencies, HttpLimits
from serve_app.limits import Admission
from serve_app.limits_bytes import ByteBudget
from serve_app.routing import HttpApplication
from storage.bus.memory import MemoryBus
from storage.bus.memory_trace import MemoryTraces
from storage.bus.settings import BusSettings
from storage.catalog.interface import Published
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.engine.plans import ParsedStatement, QueryPlan
from storage.files.cache import FileCache
from storage.files.objects import LocalObjectStore
from storage.ingesting.batches import BatchService
from storage.ingesting.deletes import DeleteService
from storage.ingesting.erasures import ErasureService
from storage.ingesting.grants import Grant
from storage.ingesting.keyring import KeyRing
from storage.ingesting.memory_keys import MemoryKeyStore
from storage.ingesting.quarantine import QuarantineService
from storage.ingesting.requests import IngestSettings
from storage.ingesting.service import IngestService
from storage.ingesting.table_cache import TableCache
from storage.ingesting.table_service import TableService
from storage.maintenance.memory_jobs import MemoryJobs
from storage.maintenance.service import MaintenanceService
from storage.memory_lake import MemoryLake
from storage.reading.barrier import Barrier
from storage.reading.changes import ChangeReader
from storage.reading.manifest import Manifest
from storage.reading.planning import Planner
from storage.reading.predicates import PredicateChecker
from storage.reading.query import Engine, QueryService
from storage.reading.resolve import Resolver
from storage.reading.watcher import HeadWatcher
from tests.conformance.worker import StagedFiles, Worker

ARROW = "application/vnd.apache.arrow.stream"
NDJSON = "application/x-ndjson"
EVERYTHING = (Grant("ingest"), Grant("create"), Grant("query"), Grant("admin"))
EVENTS = {
    "name": "events",
    "columns": [
        {"name": "id", "type": "bigint", "nullable": False},
        {"name": "note", "type": "varchar"},
        {"name": "amount", "type": "decimal(10,2)"},
        {"name": "at", "type": "timestamptz"},
    ],
}


class ScriptedResult:
    """An answer of the engine: parts, then the count, or an error, or a wait for `gate`."""

    def __init__(self, parts: Sequence[bytes | Exception], gate: asyncio.Event | None) -> None:
        self.columns = [{"name": "n", "type": "integer"}]
        self.row_count: int | None = None
        self.statistics: dict[str, float] = {}
        self.closed = asyncio.Event()
        self._parts = list(parts)
        self._gate = gate

    def __aiter__(self) -> ScriptedResult:
        return self

    async def __anext__(self) -> bytes:
        if self._gate is not None:
            await self._gate.wait()
        if self._parts:
            part = self._parts.pop(0)
            if isinstance(part, Exception):
                raise part
            return part
        self.row_count = 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed.set()


class ScriptedEngine:
    """Reads the tables named after `from`; answers with `parts`. `results` and `plans` are what
    was made."""

    def __init__(self) -> None:
        self.parts: list[bytes | Exception] = [b"[[1]]"]
        self.gate: asyncio.Event | None = None
        self.executing = asyncio.Event()
        self.results: list[ScriptedResult] = []
        self.plans: list[QueryPlan] = []
        self.fail: Exception | None = None

    async def parse(self, sql: str) -> ParsedStatement:
        if self.fail is not None:
            raise self.fail
        words = sql.lower().split()
        tables = tuple(words[words.index("from") + 1 :]) if "from" in words else ()
        return ParsedStatement(sql, "select", tables, (), False, False, {})

    async def execute(self, plan: QueryPlan) -> ScriptedResult:
        self.plans.append(plan)
        result = ScriptedResult(self.parts, self.gate)
        self.results.append(result)
        self.executing.set()
        return result


class LocalPaths(LocalObjectStore):
    """Files that nobody reads have a path too."""

    def __init__(self) -> None:
        return

    def local_path(self, key: str) -> Any:
        return f"/nowhere/{key}"


@dataclass(slots=True)
class Server:
    """One process of lakebus. `engine` is scripted unless another one was given."""

    lake: MemoryLake
    bus: MemoryBus
    catalog: MemoryCatalog
    app: HttpApplication
    http: httpx.AsyncClient
    keyring: KeyRing
    engine: Any
    budget: ByteBudget
    files: StagedFiles = field(default_factory=StagedFiles)
    key: str = ""

    async def new_key(self, *grants: Grant, principal: str = "someone") -> str:
        return (await self.keyring.issue(principal=principal, grants=grants)).text

    def headers(self, key: str | None = None, **more: str) -> dict[str, str]:
        named = {name.replace("_", "-"): value for name, value in more.items()}
        return {"authorization": f"Bearer {key or self.key}", **named}

    async def create(self, definition: Mapping[str, Any] = EVENTS) -> dict[str, Any]:
        answer = await self.http.post("/v1/tables", json=definition, headers=self.headers())
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def send(
        self,
        rows: object,
        *,
        table: str = "events",
        key: str | None = None,
        content_type: str = "application/json",
        query: str = "",
        api_key: str | None = None,
        **more: str,
    ) -> httpx.Response:
        """Rows as JSON unless they are bytes already. `key` is the idempotency key."""

        headers = self.headers(api_key, content_type=content_type, **more)
        if key is not None:
            headers["idempotency-key"] = key
        body = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
        path = "/v1/rows" if table == "*" else f"/v1/tables/{table}/rows"
        return await self.http.post(path + query, content=body, headers=headers)

    async def get(self, path: str, *, api_key: str | None = None, **more: str) -> httpx.Response:
        return await self.http.get(path, headers=self.headers(api_key, **more))

    def worker(self) -> Worker:
        return Worker(bus=self.bus, catalog=self.catalog, files=self.files)

    async def publish(self, *, quarantine: bool = False) -> list[Published]:
        """Publishes everything that was accepted; or sets it all aside."""

        published = []
        worker = self.worker()
        while (claim := await self.bus.claim(worker.owner)) is not None:
            bad = range(claim.lease.lo, claim.lease.hi) if quarantine else ()
            published.append(await worker.publish(await worker.stage(claim, quarantine=bad)))
        return published

    @property
    def jobs(self) -> MemoryJobs:
        return MemoryJobs(self.lake)

    @property
    def entries(self) -> int:
        return sum(self.lake.ends().values())

    @property
    def untouched(self) -> bool:
        """True when no entry, no key and no reject set was stored."""

        state = self.lake.state
        return not (self.entries or state.keys or state.quarantine or state.segments)


@asynccontextmanager
async def server(
    *,
    limits: HttpLimits | None = None,
    bus_settings: BusSettings | None = None,
    ingest_settings: IngestSettings | None = None,
    engine: Engine | None = None,
    lake: MemoryLake | None = None,
    keys: MemoryKeyStore | None = None,
    store: Any = None,
    cache: FileCache | None = None,
    admission: Admission | None = None,
    budget: ByteBudget | None = None,
) -> AsyncIterator[Server]:
    limits = limits or HttpLimits()
    lake = lake or MemoryLake(settings=bus_settings or BusSettings(shards=2), clock=SystemClock())
    bus, catalog = MemoryBus(lake), MemoryCatalog(lake)
    engine = engine or ScriptedEngine()
    manifest = Manifest(catalog)
    watcher = HeadWatcher(catalog, poll_s=0.01, on_head=manifest.prefetch)
    barrier = Barrier(catalog=catalog, bus=bus, watcher=watcher, codec=lake.codec)
    resolver = Resolver(catalog=catalog, barrier=barrier)
    keyring = KeyRing(keys or MemoryKeyStore())
    tables = TableCache(catalog)
    budget = budget or ByteBudget(limits.inflight_bytes_max)
    planner = Planner(store or LocalPaths(), cache=cache)
    if cache is not None:
        cache.needed, manifest.on_load = manifest.needs, cache.sweep
    dependencies = Dependencies(
        keyring=keyring,
        catalog=catalog,
        bus=bus,
        codec=lake.codec,
        resolver=resolver,
        manifest=manifest,
        limits=limits,
        budget=budget,
        admission=admission or Admission(),
        ready={"catalog": catalog.head, "bus": bus.ends},
        ingest=IngestService(
            bus=bus,
            catalog=catalog,
            barrier=barrier,
            tables=tables,
            settings=ingest_settings,
            keys=keyring.store,
        ),
        tables=TableService(catalog=catalog, barrier=barrier, tables=tables, keys=keyring.store),
        deletes=DeleteService(
            jobs=MemoryJobs(lake),
            tables=tables,
            resolver=resolver,
            codec=lake.codec,
            keys=keyring.store,
        ),
        erasures=ErasureService(
            jobs=MemoryJobs(lake),
            tables=tables,
            resolver=resolver,
            codec=lake.codec,
            keys=keyring.store,
            bus=bus,
        ),
        predicates=PredicateChecker(engine),
        batches=BatchService(bus=bus, watcher=watcher),
        quarantine=QuarantineService(bus=bus, catalog=catalog, keys=keyring.store),
        traces=MemoryTraces(lake),
        maintenance=MaintenanceService(
            jobs=MemoryJobs(lake), upkeep=MemoryUpkeep(lake), catalog=catalog, keys=keyring.store
        ),
        queries=QueryService(
            resolver=resolver,
            manifest=manifest,
            planner=planner,
            engine=engine,
            codec=lake.codec,
        ),
        changes=ChangeReader(
            catalog=catalog, resolver=resolver, manifest=manifest, planner=planner, engine=engine
        ),
    )
    app = create_app(dependencies)
    watcher.start()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://lake") as http:
        made = Server(lake, bus, catalog, app, http, keyring, engine, budget)
        made.key = await made.new_key(*EVERYTHING, principal="root")
        try:
            yield made
        finally:
            await watcher.stop()
            await barrier.close()
            await manifest.close()


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Asserts that an answer is this error, whole and well formed, and returns it."""

    document = dict(answer.json())
    assert (answer.status_code, document.get("code")) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert document["status"] == status
    assert document["type"] == f"/docs#{code}"
    assert document["request_id"] == answer.headers["x-request-id"]
    assert isinstance(document["retryable"], bool)
    assert document["title"]
    assert document["detail"]
    return document


# --- connections that misbehave --------------------------------------------------------------


@dataclass(slots=True)
class RawExchange:
    """One request driven by hand: parts of the body as they come, and a client that may leave."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    received: int = 0

    async def run(
        self,
        app: HttpApplication,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]],
        parts: Sequence[bytes | None] = (b"",),
        query: bytes = b"",
    ) -> None:
        """`parts` are the pieces of the body; None: the client goes away there."""

        waiting = list(parts)

        async def receive() -> dict[str, Any]:
            if waiting:
                part = waiting.pop(0)
                self.received += 1
                if part is None:
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": part, "more_body": bool(waiting)}
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)
            if message["type"] == "http.response.start":
                self.started.set()

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query,
            "headers": [(n.lower().encode(), v.encode("latin-1")) for n, v in headers],
        }
        await app(scope, receive, send)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(bytes(message["body"]) for message in self.sent[1:])
