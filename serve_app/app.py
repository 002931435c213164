"""The HTTP API on one screen: every route, and the applications made of them.

`api` is everything but SQL, `query` is SQL. They run as two deployments, and as one application
in tests and wherever one process is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve_app import (
    admin,
    changes,
    deletes,
    erasures,
    health,
    ingest,
    maintenance,
    query,
    snapshots,
    tables,
    trace,
)
from serve_app.accept import SUPPORTED as RESULT_TYPES
from serve_app.dependencies import Dependencies
from serve_app.openapi import describe, docs_handler, openapi_handler
from serve_app.routing import HttpApplication, Opener, Route
from storage.rows.decode import JSON, SUPPORTED_MEDIA_TYPES

_ROWS: Mapping[int, str] = {
    200: "The rows are durable and visible",
    202: "The rows are durable; with wait=visible the wait ran out: do not send them again",
}
_WAIT = ("timeout_ms", "min_visibility_token")
_PAGE = ("limit", "before")
_DOCUMENT = (JSON,)
_R = Route
_BATCHES, _SNAPSHOT = "/v1/batches/{batch_id}", "/v1/snapshots/{snapshot_id}"
_TABLES, _TABLE = "/v1/tables", "/v1/tables/{table}"
_DELETE = "/v1/tables/{table}/delete"
_KEYS, _QUARANTINE = "/v1/admin/keys", "/v1/admin/quarantine"
_QUARANTINED = "/v1/admin/quarantine/{quarantine_id}"
_JOBS, _TAGS = "/v1/admin/jobs", "/v1/admin/tags"
_MADE = {201: "Made", 200: "It was there already"}

# fmt: off
API_ROUTES: tuple[Route, ...] = (
    _R("POST", "/v1/tables/{table}/rows", ingest.post_table_rows, "Rows for a table",
       ingest.INGEST_PARAMETERS, "ingest", SUPPORTED_MEDIA_TYPES, _ROWS, replays=True),
    _R("POST", "/v1/rows", ingest.post_rows, "Rows for several tables, all or nothing",
       ingest.INGEST_PARAMETERS, "ingest", ingest.SEVERAL_TABLES_MEDIA_TYPES, _ROWS,
       replays=True),
    _R("GET", _BATCHES, ingest.get_batch, "What became of a batch of one's own", ("timeout_ms",)),
    _R("POST", _TABLES, tables.post_table, "Create a table", ("timeout_ms",), "create", _DOCUMENT,
       _MADE),
    _R("GET", _TABLES, tables.get_tables, "The tables one may see", _WAIT),
    _R("GET", _TABLE, tables.get_table, "One table", _WAIT),
    _R("PATCH", _TABLE, tables.patch_table, "Add, rename, drop columns", ("timeout_ms",), "create",
       _DOCUMENT),
    _R("DELETE", _TABLE, tables.delete_table, "Drop a table", ("timeout_ms",), "create",
       answers={200: "Dropped", 202: "Closed; dropped once what was accepted is published"}),
    _R("POST", _DELETE, deletes.post_delete, "Delete rows", (), "ingest and query", _DOCUMENT,
       {200: "Deleted", 202: "The time was up; the delete goes on"}),
    _R("GET", _DELETE + "s/{job_id}", deletes.get_delete, "What became of a delete of one's own",
       ("timeout_ms",), "ingest and query"),
    _R("POST", _TABLE + "/erase", erasures.post_erase,
       "Erase rows for good, from every snapshot, the bus and quarantine", (), "admin and query",
       _DOCUMENT, {200: "Erased", 202: "The time was up; the erasure goes on"}),
    _R("GET", _TABLE + "/erasures/{job_id}", erasures.get_erasure,
       "What became of an erasure of one's own", ("timeout_ms",), "admin and query"),
    _R("GET", "/v1/tables/{table}/files", tables.get_files, "The data files of a table",
       ("snapshot", *_WAIT), "query"),
    _R("GET", "/v1/tables/{table}/changes", changes.get_changes,
       "The rows published between two snapshots, a page at a time", changes.CHANGES_PARAMETERS,
       "query", answers={200: f"A page, as {' or '.join(changes.CHANGES_TYPES)}"}),
    _R("GET", "/v1/snapshots", snapshots.get_snapshots, "Snapshots, newest first", _PAGE, "query"),
    _R("GET", _SNAPSHOT, snapshots.get_snapshot, "One snapshot, or latest", ("timeout_ms",),
       "query"),
    _R("GET", "/v1/visibility", snapshots.get_visibility, "Wait for tokens",
       ("token", "timeout_ms"), "query"),
    _R("POST", "/v1/visibility", snapshots.post_visibility, "Wait for tokens", (), "query",
       _DOCUMENT),
    _R("GET", "/v1/queries", query.get_queries, "One's own running queries", (), "query"),
    _R("DELETE", "/v1/queries/{query_id}", query.delete_query, "Cancel a query", (), "query"),
    _R("GET", "/v1/admin/status", admin.get_status, "How the system does", (), "admin"),
    _R("POST", _KEYS, admin.post_key, "Make an API key", (), "admin", _DOCUMENT, {201: "Made"}),
    _R("GET", _KEYS, admin.get_keys, "API keys", (), "admin"),
    _R("DELETE", "/v1/admin/keys/{key_id}", admin.delete_key, "Revoke an API key", (), "admin"),
    _R("GET", _QUARANTINE, admin.get_quarantine, "What was set aside", _PAGE, "admin"),
    _R("GET", _QUARANTINED, admin.get_quarantined, "One of them, with its rows", (), "admin"),
    _R("POST", _QUARANTINED + "/replay", admin.replay_quarantined, "Send again, fixed or as it is",
       ("timeout_ms",), "admin", SUPPORTED_MEDIA_TYPES, {202: "The rows are durable"}),
    _R("DELETE", _QUARANTINED, admin.delete_quarantined, "Forget for good", (), "admin"),
    _R("POST", "/v1/admin/maintenance/{kind}", maintenance.post_maintenance,
       "Run compact, retain, collect or validate now", maintenance.MAINTENANCE_PARAMETERS, "admin",
       answers={202: "The job", 200: "The job, which has ended within timeout_ms"}),
    _R("GET", _JOBS, maintenance.get_jobs, "Jobs of maintenance, newest first",
       maintenance.JOBS_PARAMETERS, "admin"),
    _R("GET", _JOBS + "/{job_id}", maintenance.get_job, "What a job did, or would do",
       ("timeout_ms",), "admin"),
    _R("POST", _TAGS, maintenance.post_tag, "Keep a snapshot for ever", (), "admin", _DOCUMENT,
       {201: "Made, or there already"}),
    _R("GET", _TAGS, maintenance.get_tags, "Tags, by name", (), "admin"),
    _R("DELETE", _TAGS + "/{name}", maintenance.delete_tag, "Drop a tag", (), "admin"),
    _R("GET", "/v1/admin/trace", trace.find_trace, "The life of the request with a key",
       trace.TRACE_PARAMETERS, "admin"),
    _R("GET", "/v1/admin/trace/{batch_id}", trace.get_trace, "The life of one request", (),
       "admin"),
    _R("GET", "/v1/admin/audit", admin.get_audit, "Who did what, when", _PAGE, "admin"),
    _R("GET", "/healthz", health.get_healthz, "The process lives", open=True),
    _R("GET", "/readyz", health.get_readyz, "Catalog, bus and object store answer", open=True),
)
QUERY_ROUTES: tuple[Route, ...] = (
    _R("POST", "/v1/query", query.post_query, "Run a statement", (), "query", _DOCUMENT,
       {200: f"The result, as {' or '.join(RESULT_TYPES)}"}),
    _R("GET", "/v1/query", query.get_query, "Run a statement", query.QUERY_PARAMETERS, "query",
       answers={200: f"The result, as {' or '.join(RESULT_TYPES)}"}),
)
# fmt: on


def create_app(source: Dependencies | Opener) -> HttpApplication:
    """The whole API in one process."""

    return HttpApplication([*API_ROUTES, *QUERY_ROUTES, *_described()], source)


def create_api_app(source: Dependencies | Opener) -> HttpApplication:
    """Everything but SQL."""

    return HttpApplication([*API_ROUTES, *_described()], source)


def create_query_app(source: Dependencies | Opener) -> HttpApplication:
    """SQL, and the health of its process."""

    health_routes = [route for route in API_ROUTES if route.open]
    return HttpApplication([*QUERY_ROUTES, *health_routes], source)


def _described() -> Sequence[Route]:
    """The routes that describe all others (of both applications, wherever they run)."""

    own: list[Route] = []
    routes = (*API_ROUTES, *QUERY_ROUTES)
    document: dict[str, object] = {}
    own.append(Route("GET", "/openapi.json", openapi_handler(document), "This description"))
    own.append(Route("GET", "/docs", docs_handler(routes), "The same for people"))
    document |= describe([*routes, *own])
    return own
