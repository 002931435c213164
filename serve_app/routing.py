"""Routes as data, the dispatcher that walks them, and the one place where errors become answers.

A raw ASGI application: on the hot paths (rows in, queries) there is nothing between the server and
the handler but a dictionary look-up, the key and the parameters. Order of judgement: the key, the
quota of its principal, the path, the method, the parameters' names; then the handler.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from lakebus.errors import MethodNotAllowed, NotFound
from lakebus.telemetry import NO_TRACING, log_ids
from serve_app.auth import authenticate
from serve_app.bodies import ClientGone
from serve_app.calls import Answer, Call, Parameters, Receive, Scope, Send
from serve_app.dependencies import Dependencies
from serve_app.problems import MEDIA_TYPE, render

_log = logging.getLogger(__name__)

Handler = Callable[[Call, Parameters, Dependencies], Awaitable[Answer | None]]
Opener = Callable[[], AbstractAsyncContextManager[Dependencies]]


#: So many paths, no longer than this, are searched for once.
_PATHS_MAX, _PATH_MAX = 1024, 128


@dataclass(frozen=True, slots=True)
class Route:
    """`path` is a template such as `/v1/tables/{table}`; `parameters` all names the query string
    may have. `open` routes need no key. `replays`: a call with an idempotency key may be a replay,
    which the handler answers whatever a quota says. `scope`, `body` and `answers` are for the
    documentation: the scope that is checked, the body's media types, and the status and meaning of
    success."""

    method: str
    path: str
    handler: Handler
    summary: str
    parameters: tuple[str, ...] = ()
    scope: str = ""
    body: tuple[str, ...] = ()
    answers: Mapping[int, str] = field(default_factory=lambda: {200: "The answer"})
    open: bool = False
    replays: bool = False


@dataclass(frozen=True, slots=True)
class _Node:
    """All methods of one path; HEAD is answered as GET."""

    template: str
    by_method: Mapping[str, Route]


class Router:
    """Finds the route of a request: exact paths by a dictionary, templates by one regular
    expression each, in the order of the table."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        nodes: dict[str, dict[str, Route]] = {}
        for route in routes:
            nodes.setdefault(route.path, {})[route.method] = route
        self._exact: dict[str, _Node] = {}
        self._templates: list[tuple[re.Pattern[str], _Node]] = []
        #: What was found, for the paths that were asked for first.
        self._known: dict[str, tuple[_Node, Mapping[str, str]]] = {}
        for template, by_method in nodes.items():
            if "GET" in by_method:
                by_method.setdefault("HEAD", by_method["GET"])
            node = _Node(template, by_method)
            if "{" in template:
                self._templates.append((_pattern(template), node))
            else:
                self._exact[template] = node

    def find(self, path: str) -> tuple[_Node, Mapping[str, str]] | None:
        known = self._known.get(path)
        if known is None:
            known = self._search(path)
            if known is not None and len(self._known) < _PATHS_MAX and len(path) < _PATH_MAX:
                self._known[path] = known
        return known

    def _search(self, path: str) -> tuple[_Node, Mapping[str, str]] | None:
        node = self._exact.get(path)
        if node is not None:
            return node, {}
        for pattern, candidate in self._templates:
            match = pattern.fullmatch(path)
            if match is not None:
                return candidate, match.groupdict()
        return None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template)), re.DOTALL)


class HttpApplication:
    """An ASGI 3 application. `source` gives the components: as they are, or opened when the
    lifespan starts, on the loop that serves, and closed at its end."""

    def __init__(self, routes: Sequence[Route], source: Dependencies | Opener) -> None:
        self.router = Router(routes)
        self._opener = None if isinstance(source, Dependencies) else source
        self.dependencies = source if isinstance(source, Dependencies) else None
        self._opened = contextlib.AsyncExitStack()
        #: True where the server puts a request's id into its answer by itself, as Ray Serve does.
        self.ids_echoed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(Call(scope, receive, send, echoed=self.ids_echoed))
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1002})

    async def direct(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What comes through the direct door, which knows HTTP only and puts nothing in."""

        await self._serve(Call(scope, receive, send, direct=True))

    async def open(self) -> None:
        if self._opener is not None and self.dependencies is None:
            self.dependencies = await self._opened.enter_async_context(self._opener())
            door = self.dependencies.door
            if door is not None:
                await self._opened.enter_async_context(door.opened(self.direct))

    async def close(self) -> None:
        await self._opened.aclose()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.open()
        except Exception as error:
            _log.exception("the server cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, call: Call) -> None:
        with log_ids(request_id=call.request_id):
            try:
                answer = await self._handle(call)
                if answer is not None:
                    await call.answer(answer)
            except ClientGone:
                _log.debug("the client went away")
            except Exception as error:
                if call.started:
                    # The status is sent; only a broken connection can still say that it failed.
                    raise
                status, headers, body = render(error, request_id=call.request_id, keyed=call.keyed)
                await call.answer_bytes(status, body, MEDIA_TYPE, headers)
            finally:
                self._count(call)

    def _count(self, call: Call) -> None:
        """A client that left before its answer counts as 499, as in access logs."""

        assert self.dependencies is not None
        metrics = self.dependencies.metrics
        status = str(call.status or 499)
        metrics.count("lakebus_http_requests_total", route=call.route, status=status)
        metrics.observe("lakebus_http_seconds", time.monotonic() - call.arrived_s, route=call.route)

    async def _handle(self, call: Call) -> Answer | None:
        dependencies = self.dependencies
        assert dependencies is not None, "the lifespan has begun"
        found = self.router.find(call.path)
        route = None if found is None else found[0].by_method.get(call.method)
        if route is not None and route.open:
            return await self._routed(call, found, route, dependencies)
        call.principal = await authenticate(call, dependencies.keyring)
        replays = route is not None and route.replays and call.keyed
        call.refusal = dependencies.admission.enter(call.principal, judged_later=replays)
        try:
            return await self._routed(call, found, route, dependencies)
        finally:
            dependencies.admission.leave(call.principal)

    async def _routed(
        self,
        call: Call,
        found: tuple[_Node, Mapping[str, str]] | None,
        route: Route | None,
        dependencies: Dependencies,
    ) -> Answer | None:
        if found is None and call.direct:
            raise NotFound(
                f"there is nothing at {call.path[:200]} behind this direct door (ingest_url's "
                "answers all but SQL, query_url's SQL alone); send it to the server's url"
            )
        if found is None:
            raise NotFound(f"there is nothing at {call.path[:200]}; /openapi.json lists all routes")
        node, call.path_values = found
        call.route = node.template
        if route is None:
            supported = sorted(node.by_method)
            raise MethodNotAllowed(
                f"{call.method[:20]} is not supported at {node.template}; use "
                f"{', '.join(supported)}",
                supported=supported,
            )
        parameters = call.parameters(route.parameters)
        if dependencies.tracing is NO_TRACING:
            return await route.handler(call, parameters, dependencies)
        traceparent = next(
            (v.decode("latin-1") for n, v in call.scope["headers"] if n == b"traceparent"), None
        )
        with dependencies.tracing.span(
            f"{route.method} {route.path}", traceparent=traceparent
        ) as span:
            span.set("lakebus.request_id", call.request_id)
            return await route.handler(call, parameters, dependencies)
