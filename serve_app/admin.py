"""Administration: status, keys, quarantine, the audit log. Every route needs the scope `admin`."""

from __future__ import annotations

import dataclasses
import re

import msgspec

from lakebus.clock import format_time
from lakebus.errors import NotFound
from serve_app.bodies import read_body, read_document, refuse_nul
from serve_app.calls import (
    TIMEOUT_MS_DEFAULT,
    Answer,
    Call,
    Parameters,
    media_type_of,
    time_of,
    time_text,
)
from serve_app.dependencies import Dependencies, present
from serve_app.maintenance import last_jobs
from storage.bus.interface import QuarantineItem
from storage.ingesting.grants import ApiKey, grants_as_json, grants_from_json
from storage.ingesting.quarantine import FixedRows
from storage.ingesting.quotas import quotas_as_json, quotas_from_json
from storage.rows.decode import SUPPORTED_MEDIA_TYPES

_ID_MAX = 2**63 - 1
_QUARANTINE_ID = re.compile(r"[0-9]{1,18}")


class KeyDocument(msgspec.Struct, forbid_unknown_fields=True):
    principal: str
    scopes: list[object]
    label: str = ""
    expires_at: str | None = None
    quotas: dict[str, object] = {}


async def get_status(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("admin")
    head = await app.catalog.head()
    shards = await app.bus.shard_status()
    document: dict[str, object] = {
        "snapshot": {
            "snapshot_id": head.snapshot_id,
            "published_at": format_time(head.published_at),
            "history": str(head.history),
            "oldest_snapshot_id": head.oldest_snapshot_id,
            "closed_until": format_time(head.closed_until),
        },
        "now": format_time(head.now),
        "shards": [
            {
                "shard": shard.shard,
                "end": shard.end,
                "watermark": shard.watermark,
                "lag_entries": shard.backlog_entries,
                "lag_bytes": shard.backlog_bytes,
                "lag_s": round(shard.backlog_age_s, 3),
                "leases": shard.leases,
            }
            for shard in shards
        ],
        "ingest": {"held_bytes": app.budget.held_bytes},
    }
    host = call.header(b"host")
    if app.query_place is not None:
        document["query_url"] = app.query_place.for_client(host)
    if app.door is not None:
        document["ingest_url"] = app.door.url.for_client(host, app.door.port)
        document["direct_door"] = app.door.status()
    document |= await last_jobs(call, app)
    if app.status is not None:
        document |= await app.status()
    return Answer(document)


# --- keys ----------------------------------------------------------------------------------


async def post_key(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    call.idempotency_key()
    document = await read_document(
        call, KeyDocument, deadline_s=call.deadline_s(TIMEOUT_MS_DEFAULT)
    )
    refuse_nul(document.label, "label")
    expires_at = document.expires_at
    issued = await app.keyring.issue(
        principal=document.principal,
        grants=grants_from_json(document.scopes),
        label=document.label,
        expires_at=None if expires_at is None else time_of(expires_at, "expires_at"),
        quotas=quotas_from_json(document.quotas),
    )
    await app.keyring.store.audit(
        principal=call.principal.name,
        action="key.create",
        subject=issued.key.key_id,
        detail={
            "principal": issued.key.principal,
            "scopes": grants_as_json(issued.key.grants),
            "quotas": quotas_as_json(issued.key.quotas),
        },
    )
    return Answer(_key_json(issued.key) | {"key": issued.text}, status=201)


async def get_keys(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    return Answer({"keys": [_key_json(key) for key in await app.keyring.store.list_keys()]})


async def delete_key(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    call.idempotency_key()
    key_id = call.path_values["key_id"]
    if "\0" in key_id or not await app.keyring.revoke(key_id):
        raise NotFound(f"there is no key {key_id[:80]}")
    await app.keyring.store.audit(
        principal=call.principal.name, action="key.revoke", subject=key_id
    )
    return Answer({"key_id": key_id, "revoked": True})


def _key_json(key: ApiKey) -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "principal": key.principal,
        "scopes": grants_as_json(key.grants),
        "quotas": quotas_as_json(key.quotas),
        "label": key.label,
        "created_at": format_time(key.created_at),
        "expires_at": time_text(key.expires_at),
        "last_used_at": time_text(key.last_used_at),
        "revoked_at": time_text(key.revoked_at),
    }


# --- quarantine ----------------------------------------------------------------------------


async def get_quarantine(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    items = await present(app.quarantine).items(
        call.principal,
        limit=parameters.integer("limit", low=1, high=1000, default=100),
        before=parameters.optional_integer("before", low=0, high=_ID_MAX),
    )
    return Answer({"items": [_item_json(item) for item in items]})


async def get_quarantined(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    service = present(app.quarantine)
    item = await service.item(call.principal, _quarantine_id(call))
    return Answer(_item_json(item) | {"rows_json": await service.shown(item)})


async def replay_quarantined(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("admin")
    call.idempotency_key()
    deadline_s = call.deadline_s(parameters.timeout_ms())
    quarantine_id = _quarantine_id(call)
    fixed: FixedRows | None = None
    with app.budget.reserve(call.principal.principal_id) as reservation:
        body = await read_body(
            call,
            limit_bytes=app.limits.body_bytes_max,
            deadline_s=deadline_s,
            reservation=reservation,
            allowance=app.admission.allowance(call.principal),
        )
        if body:
            fixed = FixedRows(media_type_of(call, SUPPORTED_MEDIA_TYPES), body)
        answer = await present(app.quarantine).replay(call.principal, quarantine_id, fixed=fixed)
    return Answer(
        {"receipt": answer.receipt.as_json(), "replayed": answer.replayed},
        status=202,
        headers=((b"idempotent-replayed", b"true"),) if answer.replayed else (),
    )


async def delete_quarantined(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.idempotency_key()
    quarantine_id = _quarantine_id(call)
    await present(app.quarantine).drop(call.principal, quarantine_id)
    return Answer({"quarantine_id": quarantine_id, "dropped": True})


def _quarantine_id(call: Call) -> int:
    text = call.path_values["quarantine_id"]
    if not _QUARANTINE_ID.fullmatch(text):
        raise NotFound(f"there is nothing in quarantine under {text[:80]}")
    return int(text)


def _item_json(item: QuarantineItem) -> dict[str, object]:
    return {
        "quarantine_id": item.quarantine_id,
        "kind": item.kind,
        "batch_id": item.batch_id,
        "target": item.target,
        "rows": item.rows,
        "reason": item.reason,
        "attempts": item.attempts,
        "created_at": format_time(item.created_at),
        "successor_batch_id": item.successor_batch_id,
    }


# --- audit ---------------------------------------------------------------------------------


async def get_audit(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require_everywhere("admin")
    records = await app.keyring.store.audit_records(
        limit=parameters.integer("limit", low=1, high=1000, default=100),
        before=parameters.optional_integer("before", low=0, high=_ID_MAX),
    )
    return Answer(
        {
            "records": [
                dataclasses.asdict(record) | {"at": format_time(record.at)} for record in records
            ]
        }
    )
