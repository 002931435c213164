"""The API's description, made from the route table that serves it, and a page for people.

`/openapi.json` cannot say what is not routed: paths, methods, parameters, body types and scopes are
read from the routes. What it adds are words: what a parameter is, and the errors that exist.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from lakebus import __version__
from lakebus.errors import LakebusError, all_errors
from serve_app.calls import TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX, Answer, Call, Parameters
from serve_app.dependencies import Dependencies
from serve_app.problems import STATUS
from serve_app.routing import Handler, Route
from storage.maintenance.jobs import JobKind

_INTEGER: dict[str, object] = {"type": "integer", "minimum": 0}
_TEXT: dict[str, object] = {"type": "string"}
_BOOLEAN: dict[str, object] = {"type": "boolean", "default": False}

#: (schema, what it means) of every query parameter that any route knows.
PARAMETERS: dict[str, tuple[dict[str, object], str]] = {
    "wait": (
        {"type": "string", "enum": ["durable", "visible"], "default": "durable"},
        "What to wait for: that the rows are durable, or that a snapshot shows them",
    ),
    "timeout_ms": (
        {"type": "integer", "minimum": 0, "maximum": TIMEOUT_MS_MAX, "default": TIMEOUT_MS_DEFAULT},
        "The time budget from arrival to the last byte",
    ),
    "on_invalid": (
        {"type": "string", "enum": ["reject", "quarantine"], "default": "reject"},
        "What happens to rows that do not fit",
    ),
    "create": (_BOOLEAN, "Make missing tables from their rows; needs the scope create"),
    "sql": (_TEXT, "One statement"),
    "parameters": (_TEXT, "Values for ? (a JSON list) or $name (a JSON object)"),
    "snapshot": (_TEXT, 'latest, a snapshot id, {"id": n} or {"timestamp": "…"}'),
    "min_visibility_token": (_TEXT, "A token that the snapshot must cover; may be repeated"),
    "token": (_TEXT, "A token to wait for; may be repeated"),
    "max_rows": (_INTEGER, "A limit: more rows are result_too_large"),
    "max_staleness_ms": (_INTEGER, "How old the newest snapshot may be"),
    "deterministic": (_BOOLEAN, "One thread, rows in stored order"),
    "limit": ({"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}, "At most"),
    "before": (
        {"oneOf": [_INTEGER, {"type": "string", "format": "uuid"}]},
        "Only what has a lower id; of jobs, those made before the job of this id",
    ),
    "kind": ({"type": "string", "enum": [*JobKind]}, "Only jobs of this kind"),
    "table": (_TEXT, "Only this table"),
    "key": (_TEXT, "The Idempotency-Key of a request of one's own"),
    "target": (_TEXT, "The table of that request; * for several"),
    "dry_run": (_BOOLEAN, "Only say what would be done"),
    "after": (_INTEGER, "The snapshot whose rows are known; 0 for none"),
    "until": (_INTEGER, "The last snapshot whose rows are wanted; the newest if left out"),
    "cursor": (_TEXT, "Where the last page ended; after and until are in it"),
}

_PROBLEM = {"$ref": "#/components/responses/problem"}
_PATH_VALUE = re.compile(r"\{(\w+)\}")


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
            "responses": {
                "problem": {
                    "description": "An error; `code` is stable",
                    "content": {
                        "application/problem+json": {
                            "schema": {"$ref": "#/components/schemas/Problem"}
                        }
                    },
                }
            },
            "schemas": {"Problem": _problem_schema()},
        },
    }


def _operation(route: Route) -> dict[str, object]:
    parameters: list[dict[str, object]] = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT}
        for name in _PATH_VALUE.findall(route.path)
    ]
    for name in route.parameters:
        schema, words = PARAMETERS[name]
        parameters.append({"name": name, "in": "query", "schema": schema, "description": words})
    operation: dict[str, object] = {
        "summary": route.summary,
        "operationId": route.handler.__name__,
        "parameters": parameters,
        "responses": {
            **{str(status): {"description": words} for status, words in route.answers.items()},
            "default": _PROBLEM,
        },
    }
    if not route.open:
        operation["security"] = [{"key": [route.scope] if route.scope else []}]
    if route.body:
        operation["requestBody"] = {
            "required": True,
            "content": {media_type: {"schema": {}} for media_type in route.body},
        }
    return operation


def _problem_schema() -> dict[str, object]:
    return {
        "type": "object",
        "required": ["type", "title", "status", "detail", "code", "retryable", "request_id"],
        "properties": {
            "type": _TEXT,
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": _TEXT,
            "code": {"type": "string", "enum": [*sorted(STATUS), "internal_error"]},
            "retryable": {"type": "boolean"},
            "request_id": _TEXT,
        },
        "additionalProperties": True,
    }


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

    calls = "\n".join(
        f"<tr><td><code>{route.method}</code></td><td><code>{html.escape(route.path)}</code></td>"
        f"<td>{html.escape(route.summary)}</td><td>{html.escape(route.scope or '-')}</td>"
        f"<td>{' '.join(f'<code>{name}</code>' for name in route.parameters) or '-'}</td></tr>"
        for route in routes
    )
    errors = "\n".join(
        f'<tr id="{code}"><td><code>{code}</code></td><td>{status}</td>'
        f"<td>{html.escape(_titles()[code])}</td></tr>"
        for code, status in STATUS.items()
    )
    return _PAGE.format(version=__version__, calls=calls, errors=errors)


def _titles() -> dict[str, str]:
    titles: dict[str, str] = {}
    kinds: list[type[LakebusError]] = all_errors()
    for kind in kinds:
        titles.setdefault(kind.code, kind.title)
    return titles


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
