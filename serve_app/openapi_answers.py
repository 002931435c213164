"""The shapes of what the API answers with, as JSON Schema 2020-12 (as OpenAPI 3.1 has it).

Members may be added to an answer in any version (`additionalProperties` is left open); the tests
close the shapes before they compare, so that a member that is not described here is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from serve_app.openapi_problems import Schema
from storage.bus.interface import BatchState
from storage.ingesting.grants import SCOPES
from storage.maintenance.jobs import JobKind, JobState

TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
FLAG: Final[Schema] = {"type": "boolean"}
TIME: Final[Schema] = {"type": "string", "format": "date-time"}
UUID: Final[Schema] = {"type": "string", "format": "uuid"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
ANYTHING: Final[Schema] = {"type": "object", "additionalProperties": True}
TOKEN: Final[Schema] = {"type": "string", "description": "A visibility token; opaque"}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str):
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def record(always: Mapping[str, Schema], sometimes: Mapping[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "required": [*always],
        "properties": {**always, **(sometimes or {})},
    }


def _one_of(values: type[BatchState] | type[JobKind] | type[JobState]) -> Schema:
    return {"type": "string", "enum": [*values]}


_COLUMN = record({"column_id": COUNT, "name": TEXT, "type": TEXT, "nullable": FLAG})
_TABLE: Final[Mapping[str, Schema]] = {
    "name": TEXT,
    "schema_version": COUNT,
    "columns": listed(_COLUMN),
    "partition_by": listed(TEXT),
    "sort_by": listed(TEXT),
    "retention": nullable(ANYTHING),
}
_DESCRIBED: Final[Mapping[str, Schema]] = {
    **_TABLE,
    "rows": COUNT,
    "bytes": COUNT,
    "files": COUNT,
    "last_snapshot_id": COUNT,
}
_READ_AT: Final[Mapping[str, Schema]] = {"snapshot_id": COUNT, "visibility_token": TOKEN}
_RECEIPT = record(
    {
        "batch_id": TEXT,
        "target": {"type": "string", "description": "The table, or * for several"},
        "rows": COUNT,
        "rows_rejected": COUNT,
        "payload_fingerprint": TEXT,
        "visibility_token": TOKEN,
        "accepted_at": TIME,
        "idempotency_expires_at": TIME,
    }
)
_FILE = record(
    {
        "file_id": UUID,
        "rows": COUNT,
        "bytes": COUNT,
        "sha256": TEXT,
        "schema_version": COUNT,
        "first_snapshot_id": COUNT,
        "partition": {},
        "sorted_by": {},
        "statistics": {
            "type": "object",
            "additionalProperties": record({"null_count": {}, "minimum": {}, "maximum": {}}),
        },
    }
)
_RESULT: Final[Mapping[str, Schema]] = {
    "columns": listed(record({"name": TEXT, "type": TEXT})),
    "rows": listed(listed({})),
    "row_count": COUNT,
}
_JOB_DONE: Final[Mapping[str, Schema]] = {
    "job_id": UUID,
    "table": TEXT,
    "state": _one_of(JobState),
    "dry_run": FLAG,
    "replayed": FLAG,
    "snapshot_id": nullable(COUNT),
    "visibility_token": nullable(TOKEN),
}
_CHANGED_ROWS: Final[Mapping[str, Schema]] = {
    "rows_added": COUNT,
    "rows_removed": COUNT,
    "files_added": COUNT,
    "files_removed": COUNT,
}
_TOUCHED = record(
    {"table": TEXT},
    {
        **_CHANGED_ROWS,
        "created": TEXT,
        "dropped": TEXT,
        "version": WHOLE,
        "reason": TEXT,
        "cut": {},
        "job_id": TEXT,
        "erasure_id": TEXT,
    },
)
_SNAPSHOT: Final[Mapping[str, Schema]] = {
    "snapshot_id": COUNT,
    "parent_id": nullable(COUNT),
    "published_at": TIME,
    "operation": TEXT,
    "tables": listed(_TOUCHED),
    **_CHANGED_ROWS,
    "tags": listed(TEXT),
}
_TAG: Final[Mapping[str, Schema]] = {
    "name": TEXT,
    "snapshot_id": COUNT,
    "created_at": TIME,
    "created_by": TEXT,
}
_KEY: Final[Mapping[str, Schema]] = {
    "key_id": TEXT,
    "principal": TEXT,
    "scopes": listed(
        record({"scope": {"type": "string", "enum": [*SCOPES]}, "tables": listed(TEXT)})
    ),
    "quotas": {"type": "object", "additionalProperties": NUMBER},
    "label": TEXT,
    "created_at": TIME,
    "expires_at": nullable(TIME),
    "last_used_at": nullable(TIME),
    "revoked_at": nullable(TIME),
}
_SET_ASIDE: Final[Mapping[str, Schema]] = {
    "quarantine_id": COUNT,
    "kind": {"type": "string", "enum": ["entry", "rejects"]},
    "batch_id": TEXT,
    "target": TEXT,
    "rows": COUNT,
    "reason": TEXT,
    "attempts": COUNT,
    "created_at": TIME,
    "successor_batch_id": nullable(TEXT),
}
_JOB = record(
    {
        "job_id": UUID,
        "kind": _one_of(JobKind),
        "state": _one_of(JobState),
        "table": nullable(TEXT),
        "table_id": nullable(COUNT),
        "parameters": ANYTHING,
        "dry_run": FLAG,
        "requested_by": TEXT,
        "attempt": COUNT,
        "created_at": TIME,
        "started_at": nullable(TIME),
        "ended_at": nullable(TIME),
        "report": ANYTHING,
        "error": nullable(ANYTHING),
    }
)
_LEASE = record(
    {
        "epoch": COUNT,
        "state": TEXT,
        "lo": COUNT,
        "hi": COUNT,
        "owner": nullable(UUID),
        "claimed_at": nullable(TIME),
        "expires_at": nullable(TIME),
        "attempt": COUNT,
        "last_error": nullable(TEXT),
    }
)
_TRACE = record(
    {
        "batch_id": TEXT,
        "shard": COUNT,
        "position": COUNT,
        "watermark": COUNT,
        "head_snapshot_id": COUNT,
        "entry": record(
            {
                "principal_id": COUNT,
                "target": TEXT,
                "rows": COUNT,
                "rows_rejected": COUNT,
                "size_bytes": COUNT,
                "lo": COUNT,
                "hi": COUNT,
                "accepted_at": TIME,
                "idempotency_expires_at": nullable(TIME),
            }
        ),
        "lease": nullable(_LEASE),
        "publication": nullable(
            record(
                {
                    "lo": COUNT,
                    "hi": COUNT,
                    "commit_id": nullable(UUID),
                    "owner": nullable(UUID),
                    "snapshot_id": COUNT,
                    "published_at": TIME,
                    "readable": FLAG,
                }
            )
        ),
        "files": listed(
            record(
                {
                    "table": TEXT,
                    "file_id": UUID,
                    "rows": COUNT,
                    "size_bytes": COUNT,
                    "last_snapshot_id": nullable(COUNT),
                }
            )
        ),
        "quarantine": listed(
            record(
                {
                    "quarantine_id": COUNT,
                    "kind": TEXT,
                    "rows": COUNT,
                    "reason": TEXT,
                    "attempts": COUNT,
                    "created_at": TIME,
                    "successor_batch_id": nullable(TEXT),
                }
            )
        ),
        "state": {"type": "string", "enum": ["accepted", "claimed", "published", "quarantined"]},
        "terminal": FLAG,
    }
)
_STATUS = record(
    {
        "snapshot": record(
            {
                "snapshot_id": COUNT,
                "published_at": TIME,
                "history": UUID,
                "oldest_snapshot_id": COUNT,
                "closed_until": TIME,
            }
        ),
        "now": TIME,
        "shards": listed(
            record(
                {
                    "shard": COUNT,
                    "end": COUNT,
                    "watermark": COUNT,
                    "lag_entries": COUNT,
                    "lag_bytes": COUNT,
                    "lag_s": NUMBER,
                    "leases": COUNT,
                }
            )
        ),
        "ingest": record({"held_bytes": COUNT}),
    },
    {
        "jobs": listed(ref("Job")),
        "ingest_url": nullable(TEXT),
        "query_url": nullable(TEXT),
        "direct_door": ANYTHING,
    },
) | {"additionalProperties": True}

#: Shapes by name: those that several operations answer with, or that are long.
SHARED: Final[Mapping[str, Schema]] = {
    "Receipt": _RECEIPT,
    "Accepted": record(
        {
            "receipt": ref("Receipt"),
            "replayed": FLAG,
            "visible": FLAG,
            "snapshot_id": nullable(COUNT),
            "columns_skipped": listed(TEXT),
        }
    ),
    "Batch": record(
        {
            "batch_id": TEXT,
            "state": _one_of(BatchState),
            "snapshot_id": nullable(COUNT),
            "reason": nullable(TEXT),
            "successor_batch_id": nullable(TEXT),
        }
    ),
    "Table": record(_DESCRIBED),
    "TableMade": record(
        {**_TABLE, "created": FLAG, "snapshot_id": nullable(COUNT), "visibility_token": TOKEN}
    ),
    "Delete": record(
        {**_JOB_DONE, "evaluated_at_snapshot_id": nullable(COUNT), "deleted_rows": nullable(COUNT)},
        {"error": ANYTHING},
    ),
    "Erasure": record(
        {
            **_JOB_DONE,
            "erasure_id": nullable(TEXT),
            "erased_rows": nullable(COUNT),
            "report": ANYTHING,
        },
        {"error": ANYTHING},
    ),
    "Visible": record(
        {"visible": {"const": True}, **_READ_AT, "snapshot_time": TIME, "waited_ms": NUMBER}
    ),
    "Result": record(
        {
            **_RESULT,
            **_READ_AT,
            "snapshot_time": TIME,
            "statistics": record(
                {
                    "wait_ms": NUMBER,
                    "plan_ms": NUMBER,
                    "execute_ms": NUMBER,
                    "files_scanned": COUNT,
                    "files_pruned": COUNT,
                    "bytes_scanned": COUNT,
                    "snapshots": listed(COUNT),
                },
                {"erasures": listed(TEXT)},
            ),
        }
    ),
    "Job": _JOB,
    "Tag": record(_TAG),
    "Trace": _TRACE,
}

#: The JSON that an operation answers with, by the name of its handler; by status where it differs.
ANSWERS: Final[Mapping[str, Schema | Mapping[int, Schema]]] = {
    "post_table_rows": ref("Accepted"),
    "post_rows": ref("Accepted"),
    "get_batch": ref("Batch"),
    "post_table": ref("TableMade"),
    "get_tables": record({"tables": listed(ref("Table")), **_READ_AT}),
    "get_table": record({**_DESCRIBED, **_READ_AT}),
    "patch_table": record({**_TABLE, **_READ_AT}),
    "delete_table": {
        200: record({"name": TEXT, "state": {"const": "dropped"}, **_READ_AT}),
        202: record({"name": TEXT, "state": {"const": "closing"}, "snapshot_id": {"type": "null"}}),
    },
    "post_delete": ref("Delete"),
    "get_delete": ref("Delete"),
    "post_erase": ref("Erasure"),
    "get_erasure": ref("Erasure"),
    "get_files": record({"table": TEXT, "files": listed(_FILE), **_READ_AT}),
    "get_changes": record(
        {
            **_RESULT,
            "cursor": nullable(TEXT),
            "table": TEXT,
            "after": COUNT,
            "until": COUNT,
            **_READ_AT,
        }
    ),
    "get_snapshots": record({"snapshots": listed(record(_SNAPSHOT))}),
    "get_snapshot": record(
        {
            **_SNAPSHOT,
            "erasures": listed(record({"erasure_id": UUID, "table": TEXT, "rows": COUNT})),
            "visibility_token": TOKEN,
        }
    ),
    "get_visibility": ref("Visible"),
    "post_visibility": ref("Visible"),
    "post_query": ref("Result"),
    "get_query": ref("Result"),
    "get_queries": record(
        {"queries": listed(record({"query_id": TEXT, "sql": TEXT, "started_at": TIME}))}
    ),
    "delete_query": record({"query_id": TEXT, "cancelled": {"const": True}}),
    "get_status": _STATUS,
    "post_key": record({**_KEY, "key": {"type": "string", "description": "Shown only here"}}),
    "get_keys": record({"keys": listed(record(_KEY))}),
    "delete_key": record({"key_id": TEXT, "revoked": {"const": True}}),
    "get_quarantine": record({"items": listed(record(_SET_ASIDE))}),
    "get_quarantined": record({**_SET_ASIDE, "rows_json": {}}),
    "replay_quarantined": record({"receipt": ref("Receipt"), "replayed": FLAG}),
    "delete_quarantined": record({"quarantine_id": COUNT, "dropped": {"const": True}}),
    "post_maintenance": ref("Job"),
    "get_jobs": record({"jobs": listed(ref("Job"))}),
    "get_job": ref("Job"),
    "post_tag": ref("Tag"),
    "get_tags": record({"tags": listed(ref("Tag"))}),
    "delete_tag": record({**_TAG, "dropped": {"const": True}}),
    "find_trace": ref("Trace"),
    "get_trace": ref("Trace"),
    "get_audit": record(
        {
            "records": listed(
                record(
                    {
                        "audit_id": COUNT,
                        "at": TIME,
                        "principal": TEXT,
                        "action": TEXT,
                        "subject": TEXT,
                        "detail": ANYTHING,
                    }
                )
            )
        }
    ),
    "get_healthz": record({"status": {"const": "ok"}}),
    "get_readyz": record({"status": {"const": "ready"}, "checks": listed(TEXT)}),
    "get_openapi": ANYTHING,
}
