"""The API's description, made from the route table that serves it, and a page for people.

`/openapi.json` cannot say what is not routed: paths, methods, parameters, body types and scopes are
read from the routes, the shapes of documents from the types that decode them. What it adds: what
the answers look like (`openapi_answers`), the errors that each route may give (`openapi_problems`),
and the bounds of what may be sent (`openapi_bodies`). Nothing is left to a `default` response, so a
status that is not described is a fault, and `tests.openapi` looks for them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Final, cast

from lakebus import __version__
from serve_app import openapi_bodies, openapi_problems
from serve_app.accept import JSON, SUPPORTED
from serve_app.calls import Answer, Call, Parameters
from serve_app.changes import CHANGES_TYPES
from serve_app.dependencies import Dependencies
from serve_app.openapi_answers import ANSWERS, SHARED
from serve_app.openapi_problems import (
    DOCUMENT,
    KEYED,
    NEWEST,
    ONE_SNAPSHOT,
    OPEN,
    PREDICATE,
    ROWS,
    SCOPED,
    SQL,
    TOKENS,
    WRITE,
    Schema,
    titles_by_code,
)
from serve_app.problems import STATUS
from serve_app.routing import Handler, Route

_PATH_VALUE = re.compile(r"\{(\w+)\}")
_TEXT: Final[Schema] = {"type": "string"}

#: Errors of an operation beside those of every route with a key, and of every scope.
_ERRORS: Final[Mapping[str, Sequence[str]]] = {
    "post_table_rows": ROWS,
    "post_rows": ROWS,
    "get_batch": ("batch_not_found",),
    "post_table": (*DOCUMENT, *WRITE, *NEWEST, "table_not_found", "table_exists", "schema_invalid"),
    "get_tables": TOKENS,
    "get_table": (*TOKENS, "table_not_found"),
    "patch_table": (
        *DOCUMENT,
        *WRITE,
        *NEWEST,
        "table_not_found",
        "schema_invalid",
        "schema_change_invalid",
        "schema_version_mismatch",
    ),
    "delete_table": (*WRITE, "table_not_found"),
    "post_delete": PREDICATE,
    "get_delete": ("job_not_found",),
    "post_erase": PREDICATE,
    "get_erasure": ("job_not_found",),
    "get_files": (*TOKENS, *ONE_SNAPSHOT, "token_not_covered", "table_not_found"),
    "get_changes": (
        *TOKENS,
        *ONE_SNAPSHOT,
        "token_not_covered",
        "table_not_found",
        "result_too_large",
        "query_timeout",
        "unsupported_media_type",
    ),
    "get_snapshots": NEWEST,
    "get_snapshot": (*NEWEST, *ONE_SNAPSHOT),
    "get_visibility": TOKENS,
    "post_visibility": (*DOCUMENT, *TOKENS),
    "get_query": SQL,
    "post_query": (*DOCUMENT, *SQL),
    "delete_query": ("query_not_found",),
    "post_key": (*DOCUMENT, *WRITE),
    "delete_key": WRITE,
    "replay_quarantined": ROWS,
    "delete_quarantined": WRITE,
    "post_maintenance": (*DOCUMENT, *WRITE, "table_not_found", "idempotency_conflict"),
    "get_jobs": ("job_not_found",),
    "get_job": ("job_not_found",),
    "post_tag": (*DOCUMENT, *WRITE, *ONE_SNAPSHOT, "tag_exists"),
    "delete_tag": WRITE,
    "find_trace": ("batch_not_found",),
    "get_trace": ("batch_not_found",),
    "get_readyz": ("unavailable", "history_rewound"),
}
#: Operations that tell of a job that failed.
_JOBS: Final = ("post_delete", "post_erase")

_READ: Final = ("Lakebus-Snapshot-Id", "Lakebus-Visibility-Token", "Cache-Control")
#: Headers of an answer beside the request's id; those with a ? are there sometimes.
_ANSWER_HEADERS: Final[Mapping[str, Sequence[str]]] = {
    "post_query": (*_READ, "Lakebus-Query-Id", "Lakebus-Erased?"),
    "get_query": (*_READ, "Lakebus-Query-Id", "Lakebus-Erased?"),
    "get_changes": (*_READ, "Lakebus-Changes-Cursor?"),
    **dict.fromkeys(
        ("post_table_rows", "post_rows"), ("Idempotent-Replayed?", "Lakebus-Ingest-Url?")
    ),
    **dict.fromkeys(
        (
            "post_table",
            "post_delete",
            "post_erase",
            "post_maintenance",
            "replay_quarantined",
        ),
        ("Idempotent-Replayed?",),
    ),
}
_HEADERS: Final[Mapping[str, tuple[str, Schema]]] = {
    "X-Request-Id": ("The id of the request: the caller's, or one made here", _TEXT),
    "Retry-After": ("Seconds until it is worth trying again", {"type": "integer", "minimum": 1}),
    "WWW-Authenticate": ("How to authenticate", _TEXT),
    "Cache-Control": ("Answers are not kept", {"const": "no-store"}),
    "Idempotent-Replayed": ("The request was carried out before", {"const": "true"}),
    "Lakebus-Snapshot-Id": ("The snapshot that was read", {"type": "integer", "minimum": 0}),
    "Lakebus-Visibility-Token": ("The token of what was read", _TEXT),
    "Lakebus-Query-Id": ("The id of the query while it runs", _TEXT),
    "Lakebus-Changes-Cursor": ("Leads to the next page", _TEXT),
    "Lakebus-Ingest-Url": ("Where rows are taken faster, for who came by the other door", _TEXT),
    "Lakebus-Erased": ("Erasures that changed the snapshot", _TEXT),
}
#: Media types of an answer that is not JSON alone.
_MEDIA_TYPES: Final[Mapping[str, Sequence[str]]] = {
    "post_query": SUPPORTED,
    "get_query": SUPPORTED,
    "get_changes": CHANGES_TYPES,
    "get_docs": ("text/html",),
}


def describe(routes: Sequence[Route]) -> dict[str, object]:
    """The OpenAPI 3.1 document of these routes."""

    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lakebus",
            "version": __version__,
            "description": "Rows in over HTTP, one consistent answer out in SQL.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "headers": {
                name: {"description": words, "required": True, "schema": schema}
                for name, (words, schema) in _HEADERS.items()
            },
            "schemas": {**openapi_problems.components(), **SHARED, **openapi_bodies.components()},
        },
    }


def _operation(route: Route) -> dict[str, object]:
    name = route.handler.__name__
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": name,
        "parameters": [
            *(
                {
                    "name": value,
                    "in": "path",
                    "required": True,
                    "schema": openapi_bodies.PATH_VALUES.get(value, _TEXT),
                }
                for value in _PATH_VALUE.findall(route.path)
            ),
            *openapi_bodies.parameters_of(name, route.parameters),
        ],
        "responses": {
            **{
                str(status): _answer(name, status, words) for status, words in route.answers.items()
            },
            **openapi_problems.responses(_codes(route), job=name in _JOBS),
        },
    }
    if not route.open:
        operation["security"] = [{"key": [route.scope] if route.scope else []}]
    body = openapi_bodies.body_of(name, route.body)
    if body is not None:
        operation["requestBody"] = body
    return operation


def _codes(route: Route) -> list[str]:
    common = OPEN if route.open else KEYED
    scoped = SCOPED if route.scope else ()
    return [*common, *scoped, *_ERRORS.get(route.handler.__name__, ())]


def _answer(operation: str, status: int, words: str) -> dict[str, object]:
    shape = ANSWERS.get(operation, {})
    if status in shape:
        shape = cast(Mapping[int, Schema], shape)[status]
    headers = ("X-Request-Id", *_ANSWER_HEADERS.get(operation, ()))
    return {
        "description": words,
        "headers": {name.rstrip("?"): _header(name) for name in headers},
        "content": {
            media_type: {"schema": shape if media_type == JSON else {}}
            for media_type in _MEDIA_TYPES.get(operation, (JSON,))
        },
    }


def _header(name: str) -> dict[str, object]:
    if not name.endswith("?"):
        return {"$ref": f"#/components/headers/{name}"}
    words, schema = _HEADERS[name.rstrip("?")]
    return {"description": words, "schema": schema}


def openapi_handler(document: dict[str, object]) -> Handler:
    async def get_openapi(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
        return Answer(document)

    return get_openapi


def docs_handler(routes: Sequence[Route]) -> Handler:
    page = docs_page(routes).encode("utf-8")

    async def get_docs(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
        return Answer(body=page, media_type=b"text/html; charset=utf-8")

    return get_docs


def docs_page(routes: Sequence[Route]) -> str:
    """One page without anything from elsewhere: routes, then errors with an anchor for each."""

    titles = titles_by_code()
    calls = "\n".join(
        f"<tr><td><code>{route.method}</code></td><td><code>{html.escape(route.path)}</code></td>"
        f"<td>{html.escape(route.summary)}</td><td>{html.escape(route.scope or '-')}</td>"
        f"<td>{' '.join(f'<code>{name}</code>' for name in route.parameters) or '-'}</td></tr>"
        for route in routes
    )
    errors = "\n".join(
        f'<tr id="{code}"><td><code>{code}</code></td><td>{status}</td>'
        f"<td>{html.escape(titles[code])}</td></tr>"
        for code, status in STATUS.items()
    )
    return _PAGE.format(version=__version__, calls=calls, errors=errors)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lakebus API</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3rem .6rem; text-align: left;
          vertical-align: top }}
tr:target {{ background: #ffd }}
</style></head><body>
<h1>lakebus API, version 1</h1>
<p>Server {version}. Send <code>Authorization: Bearer &lt;key&gt;</code> with every call.
The machine-readable description is at <a href="/openapi.json">/openapi.json</a>.</p>
<h2>Calls</h2>
<table><tr><th>method</th><th>path</th><th>what it does</th><th>scope</th><th>parameters</th></tr>
{calls}
</table>
<h2>Errors</h2>
<p>Every error is <code>application/problem+json</code> with a stable <code>code</code>.</p>
<table><tr><th>code</th><th>status</th><th>meaning</th></tr>
{errors}
</table>
</body></html>
"""
