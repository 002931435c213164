"""Requests that no client of ours sends, to every route: refused in words, and never a 500."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from urllib.parse import unquote_to_bytes

import pytest

from serve_app.app import API_ROUTES, QUERY_ROUTES
from serve_app.routing import Route
from tests.unit.http_errors_rig import described_parts
from tests.unit.http_rig import RawExchange, Server, server

ROUTES = (*API_ROUTES, *QUERY_ROUTES)
_VALUES = {
    "table": "events",
    "job_id": "00000000-0000-4000-8000-000000000000",
    "snapshot_id": "1",
    "quarantine_id": "1",
    "kind": "validate",
}
_JSON = [("content-type", "application/json")]


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


def path_of(route: Route) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: _VALUES.get(found[1], "x"), route.path)


async def ask(
    lake: Server,
    route: Route,
    *,
    path: str | None = None,
    query: bytes = b"",
    headers: list[tuple[str, str]] | None = None,
    body: bytes = b"",
) -> tuple[int, dict[str, str], bytes]:
    """One request as the server hands it over; `path` may have any bytes behind its percents."""

    asked = path_of(route) if path is None else path
    decoded = unquote_to_bytes(asked).decode("utf-8", "replace")
    exchange = RawExchange()
    key = [("authorization", f"Bearer {lake.key}")]
    given = _JSON if headers is None else headers
    await exchange.run(
        lake.app, route.method, decoded, headers=[*key, *given], parts=[body], query=query
    )
    assert exchange.status is not None
    told = {
        bytes(name).decode(): bytes(value).decode() for name, value in exchange.sent[0]["headers"]
    }
    described_parts(lake, route.method, decoded, exchange.status, told, exchange.body)
    return exchange.status, told, exchange.body


ODD_QUERIES = {
    "unknown": b"nothing=1",
    "no value": b"nothing",
    "empty": b"&",
    "half a percent": b"a=%",
    "not UTF-8": b"a=%ff",
    "not ASCII": b"a=\xff",
    "NUL": b"a=%00",
    "overlong NUL": b"a=%c0%80",
    "surrogate": b"a=%ed%a0%80",
    "a line break": b"a=%0d%0aX-Injected:%201",
    "many": b"&".join(b"a%d=1" % number for number in range(200)),
    "long": b"a=" + b"x" * 100_000,
}


@pytest.mark.parametrize("odd", ODD_QUERIES.values(), ids=list(ODD_QUERIES))
async def test_odd_query_strings_are_refused_by_every_route(lake: Server, odd: bytes) -> None:
    for route in ROUTES:
        status, headers, body = await ask(lake, route, query=odd)
        assert status == 400, (route.path, body)
        assert json.loads(body)["code"] == "malformed_request"
        assert "x-injected" not in headers
    assert lake.untouched


#: Parameters without which a route refuses everything.
_ALSO = {
    "/v1/query": {"sql": b"sql=select"},
    "/v1/visibility": {"token": b"token=x"},
    "/v1/tables/{table}/changes": {"after": b"after=0"},
    "/v1/admin/trace": {"key": b"key=a", "target": b"target=b"},
}


async def test_a_parameter_given_twice_is_refused_where_it_counts_once(lake: Server) -> None:
    values = {"wait": b"visible", "on_invalid": b"reject", "kind": b"compact", "snapshot": b"1"}
    for route in ROUTES:
        for name in sorted({*route.parameters} - {"token", "min_visibility_token"}):
            value = values.get(name, b"true" if name in ("create", "dry_run") else b"1")
            given = b"%b=%b" % (name.encode(), value)
            body = b'[{"id": 1}]' if route.body else b""
            query = given + b"&" + given
            for other, more in _ALSO.get(route.path, {}).items():
                query += b"&" + more if other != name else b""
            status, _, answer = await ask(lake, route, query=query, body=body)
            assert status == 400, (route.path, name, answer)
            assert b"may be given only once" in answer, (route.path, name, answer)
    assert lake.untouched


ODD_VALUES = {
    "NUL": "%00",
    "NUL inside": "a%00b",
    "not UTF-8": "%ff%fe",
    "a surrogate": "%ed%a0%80",
    "a slash": "%2f",
    "dots": "%2e%2e",
    "a line break": "a%0d%0aX-Injected:%201",
    "long": "x" * 20_000,
    "huge": "9" * 400,
    "negative": "-1",
    "fraction": "1.5",
    "digits of others": "%D9%A1%D9%A2",
    "an escape": "%1b[31m",
}


@pytest.mark.parametrize("odd", ODD_VALUES.values(), ids=list(ODD_VALUES))
async def test_odd_names_in_paths_are_not_there(lake: Server, odd: str) -> None:
    for route in ROUTES:
        if "{" not in route.path:
            continue
        path = re.sub(r"\{\w+\}", lambda _: odd, route.path)
        status, headers, answer = await ask(lake, route, path=path)
        assert status in (400, 404), (route.method, path[:99], answer[:300])
        assert "x-injected" not in headers
        assert len(answer) < 2_000, "an answer does not repeat all it was sent"
    assert lake.untouched


ODD_HEADERS = {
    "request id with a line break": ("x-request-id", "a\r\nX-Injected: 1"),
    "request id of bytes": ("x-request-id", "\xff\xfe"),
    "key of bytes": ("idempotency-key", "\xe9"),
    "key with a line break": ("idempotency-key", "a\r\nb"),
    "encoding of nonsense": ("content-encoding", "\xff"),
    "length of nonsense": ("content-length", "1e3"),
    "length of others' digits": ("content-length", "\xb2"),
    "huge length": ("content-length", "9" * 30),
    "accept of nonsense": ("accept", ";;;q=\xff,,"),
    "accept of infinity": ("accept", "application/json;q=nan, text/csv;q=inf"),
    "many accepts": ("accept", "text/html," * 5_000),
    "trace of nonsense": ("traceparent", "\xff-00-zz"),
    "match of nonsense": ("if-match", 'W/"\xff"'),
    "type of nonsense": ("content-type", "application/json; charset=\xff"),
    "type of bytes": ("content-type", "\xff/\xfe"),
    "boundary of nonsense": ("content-type", 'multipart/form-data; boundary="\x00"'),
    "host of bytes": ("host", "\xff:1"),
    "not before of nonsense": ("idempotency-not-before", "9999-12-31T23:59:59-23:59"),
    "order of bytes": ("lakebus-ordering-key", "\x00"),
}


@pytest.mark.parametrize("name", list(ODD_HEADERS))
async def test_odd_headers_never_break_a_route(lake: Server, name: str) -> None:
    odd = ODD_HEADERS[name]
    for route in ROUTES:
        given = [header for header in _JSON if header[0] != odd[0]]
        body = b"{" if route.body else b""
        status, headers, answer = await ask(lake, route, headers=[*given, odd], body=body)
        assert status < 500, (route.method, route.path, answer)
        assert "x-injected" not in headers
        assert "\n" not in headers["x-request-id"]


@pytest.mark.parametrize("said", [0, 1, 11, 12, 1_000])
async def test_a_length_that_is_not_that_of_the_body_stores_the_body_or_nothing(
    lake: Server, said: int
) -> None:
    """A server in front refuses these; the count of what really came decides."""

    route = next(route for route in ROUTES if route.path == "/v1/tables/{table}/rows")
    headers = [*_JSON, ("content-length", str(said))]
    status, _, _ = await ask(lake, route, headers=headers, body=b'[{"id": 1}]')
    assert status == 202
    assert lake.entries == 1
    assert lake.budget.held_bytes == 0


@pytest.mark.parametrize(
    ("method", "path", "document"),
    [
        ("POST", "/v1/admin/keys", {"principal": "p", "scopes": ["query"], "label": "a\0b"}),
        ("POST", "/v1/admin/maintenance/validate", {"parameters": {"a": {"b": ["\0"]}}}),
        ("POST", "/v1/admin/maintenance/validate", {"parameters": {"\0": 1}}),
        ("POST", "/v1/tables/events/delete", {"where": "note = '\0'"}),
        ("POST", "/v1/tables/events/delete", {"where": "note = ?", "parameters": ["\0"]}),
        ("POST", "/v1/tables/events/erase", {"where": "note = $a", "parameters": {"a": "\0"}}),
        ("POST", "/v1/admin/tags", {"name": "\0", "snapshot_id": 1}),
    ],
)
async def test_text_with_nul_is_refused_before_the_database_has_to(
    lake: Server, method: str, path: str, document: object
) -> None:
    """PostgreSQL has no text with NUL; the lake in memory would take it."""

    before = (len(lake.lake.state.jobs), len(await lake.keyring.store.list_keys()))
    answer = await lake.http.request(method, path, json=document, headers=lake.headers())
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request"), answer.text
    assert (len(lake.lake.state.jobs), len(await lake.keyring.store.list_keys())) == before
