"""A server on which one request fails, and everything that the request could have left behind.

The evidence is whole: all that the lake stores, compared record by record, and all that the process
holds for a request while it runs. What time alone changes is left out.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema_rs

from lakebus.tokens import VisibilityToken
from serve_app.app import API_ROUTES, QUERY_ROUTES
from serve_app.openapi import describe
from serve_app.problems import STATUS
from storage.engine.plans import ParsedStatement
from storage.memory_state import LakeState
from storage.reading.holds import Hold, Unpinned
from storage.reading.planning import Planner
from storage.reading.query import QueryService
from tests.unit.http_rig import LocalPaths, ScriptedEngine, Server, server

PROBLEM = ("type", "title", "status", "detail", "code", "retryable", "request_id")


class PatientEngine(ScriptedEngine):
    """Parses nothing while `parsing` is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.parsing = asyncio.Event()
        self.parsing.set()

    async def parse(self, sql: str) -> ParsedStatement:
        await self.parsing.wait()
        return await super().parse(sql)


class CountedPins(Unpinned):
    """Gives every hold. `given` counts them, `held` those that were not given back."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    @property
    def held(self) -> int:
        return len(self._grant.holds)

    async def hold(self, snapshot_id: int, *, onward: bool = False) -> Hold:
        self.given += 1
        return await super().hold(snapshot_id, onward=onward)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What is stored, and what is held."""

    state: LakeState
    keys: int
    audited: int
    pins: int
    held_bytes: int
    running: int
    requests: int
    open_results: int


@dataclass(slots=True)
class Bench:
    """`ask` sends the request that fails; `before` and `after` are the evidence around it."""

    lake: Server
    engine: PatientEngine
    pins: CountedPins
    before: Footprint | None = None
    after: Footprint | None = None
    asked: tuple[str, str] = ("", "")

    async def ask(
        self, method: str, path: str, *, api_key: str | None = None, **given: Any
    ) -> httpx.Response:
        """`given` is what httpx takes; `headers` come on top of the key's."""

        headers = {**self.lake.headers(api_key), **given.pop("headers", {})}
        self.asked = (method, path.partition("?")[0])
        self.before = await self.footprint()
        answer = await self.lake.http.request(method, path, headers=headers, **given)
        self.after = await self.footprint()
        return answer

    async def send(self, rows: object, *, query: str = "", **headers: str) -> httpx.Response:
        """Rows for the table events, as the request that fails."""

        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = {"content": rows} if isinstance(rows, bytes) else {"json": rows}
        if isinstance(rows, bytes):
            named.setdefault("content-type", "application/json")
        return await self.ask("POST", f"/v1/tables/events/rows{query}", headers=named, **body)

    async def query(self, **document: Any) -> httpx.Response:
        return await self.ask("POST", "/v1/query", json={"sql": "from events", **document})

    def token(self, floor: int) -> str:
        return self.lake.lake.codec.encode(VisibilityToken(self.lake.lake.history, floor))

    async def footprint(self) -> Footprint:
        lake = self.lake
        dependencies = lake.app.dependencies
        assert dependencies is not None
        state = copy.deepcopy(lake.lake.state)
        store = lake.keyring.store
        return Footprint(
            # A question about a time closes it, and that is no trace of a request.
            state=dataclasses.replace(state, closed_until=state.snapshots[1].published_at),
            keys=len(await store.list_keys()),
            audited=len(await store.audit_records(limit=1000)),
            pins=self.pins.held,
            held_bytes=lake.budget.held_bytes,
            running=len(dependencies.running._queries),
            requests=len(dependencies.admission._present),
            open_results=sum(not result.closed.is_set() for result in self.engine.results),
        )


Make = Callable[[Bench], Awaitable[httpx.Response]]


@dataclass(frozen=True, slots=True)
class Case:
    """`members` must be there beside those of every problem. `stored`: the request is carried out
    all the same, and only its answer is lost. `inside`: the code that is not told."""

    code: str
    make: Make
    members: tuple[str, ...] = ()
    retryable: bool = False
    why: str = ""
    inside: str = ""
    stored: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return STATUS.get(self.code, 500)

    @property
    def name(self) -> str:
        more = self.why or self.inside
        return f"{self.status}-{self.code}" + (f"-{more}" if more else "")


@asynccontextmanager
async def bench(**given: Any) -> AsyncIterator[Bench]:
    """A lake with the table events and one published row. `given` goes to `http_rig.server`."""

    engine = PatientEngine()
    async with server(engine=engine, **given) as lake:
        pins = CountedPins()
        dependencies = lake.app.dependencies
        assert dependencies is not None
        lake.app.dependencies = dataclasses.replace(
            dependencies,
            queries=QueryService(
                resolver=dependencies.resolver,
                manifest=dependencies.manifest,
                planner=Planner(LocalPaths()),
                engine=engine,
                codec=dependencies.codec,
                pins=pins,
            ),
        )
        yield Bench(lake, engine, pins)


def nothing_left(one: Bench) -> None:
    """Asserts that the request left nothing behind."""

    before, after = one.before, one.after
    assert before is not None
    assert after is not None
    for part in dataclasses.fields(LakeState):
        stored = getattr(after.state, part.name)
        assert stored == getattr(before.state, part.name), f"{part.name} was changed"
    for part in dataclasses.fields(Footprint):
        if part.name != "state":
            kept = getattr(after, part.name)
            assert kept == getattr(before, part.name), f"{part.name} is {kept} after the request"


# --- the description ------------------------------------------------------------------------------


def described(one: Bench, answer: httpx.Response) -> None:
    """Asserts that the answer is one that `/openapi.json` describes for its route."""

    method, path = one.asked
    described_parts(
        one.lake, method, path, answer.status_code, dict(answer.headers), answer.content
    )


def described_parts(
    lake: Server, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """The same of an answer in parts. What is no route has no description."""

    found = lake.app.router.find(path)
    if found is None or method not in found[0].by_method:
        return
    template = found[0].template
    answers = _description()["paths"][template][method.lower()]["responses"]
    assert str(status) in answers, f"{method} {template} is not said to answer {status}: {body!r}"
    answer = answers[str(status)]
    media_type = headers["content-type"].partition(";")[0]
    assert media_type in answer["content"], (method, template, status, media_type)
    if media_type.endswith("json"):
        errors = _validator(template, method, status, media_type).iter_errors(json.loads(body))
        assert not [error.message for error in errors], (method, template, body)
    for name, header in answer["headers"].items():
        assert "$ref" not in header or name.lower() in headers, f"the header {name} is missing"


@functools.cache
def _validator(template: str, method: str, status: int, media_type: str) -> jsonschema_rs.Validator:
    operation = _description()["paths"][template][method.lower()]
    schema = operation["responses"][str(status)]["content"][media_type]["schema"]
    return jsonschema_rs.validator_for({**schema, "components": _description()["components"]})


@functools.cache
def _description() -> dict[str, Any]:
    return describe([*API_ROUTES, *QUERY_ROUTES])
