"""Tables: create, look, change, drop, and the data files of one."""

from __future__ import annotations

import json
import re

import msgspec

from lakebus.errors import MalformedRequest, SchemaInvalid
from lakebus.schemas import TableSchema, fold_table_name
from lakebus.snapshots import DataFile
from lakebus.tokens import VisibilityToken
from serve_app.bodies import read_document
from serve_app.calls import Answer, Call, Parameters
from serve_app.dependencies import Dependencies, present
from storage.ingesting.definitions import ColumnDefinition, TableChangeRequest, TableDefinition
from storage.reading.manifest import SnapshotView
from storage.reading.query import QueryService, TableDescription
from storage.reading.resolve import LATEST, Resolved, SnapshotChoice

_VERSION = re.compile(r"[0-9]{1,9}")
_SNAPSHOT_ID = re.compile(r"[0-9]{1,18}")


class ColumnDocument(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    type: str
    nullable: bool = True

    def definition(self) -> ColumnDefinition:
        return ColumnDefinition(self.name, self.type, self.nullable)


class CreateDocument(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    columns: list[ColumnDocument]
    partition_by: list[str] = []
    sort_by: list[str] = []
    retention: dict[str, object] | None = None
    if_not_exists: bool = False


class ChangeDocument(msgspec.Struct, forbid_unknown_fields=True):
    add_columns: list[ColumnDocument] = []
    rename_columns: dict[str, str] = {}
    drop_columns: list[str] = []
    widen_columns: dict[str, str] = {}
    relax_columns: list[str] = []
    partition_by: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    sort_by: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    retention: dict[str, object] | msgspec.UnsetType | None = msgspec.UNSET

    def request(self) -> TableChangeRequest:
        """A member that is null removes what it names; one that is absent leaves it."""

        return TableChangeRequest(
            drop_columns=tuple(self.drop_columns),
            rename_columns=self.rename_columns,
            widen_columns=self.widen_columns,
            relax_columns=tuple(self.relax_columns),
            add_columns=tuple(column.definition() for column in self.add_columns),
            partition_by=_replacement(self.partition_by),
            sort_by=_replacement(self.sort_by),
            retention=None if self.retention is msgspec.UNSET else self.retention or {},
        )


def _replacement(given: list[str] | msgspec.UnsetType | None) -> tuple[str, ...] | None:
    return None if isinstance(given, msgspec.UnsetType) else tuple(given or ())


async def post_table(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("create")
    keyed = call.idempotency_key() is not None
    deadline_s = call.deadline_s(parameters.timeout_ms())
    document = await read_document(call, CreateDocument, deadline_s=deadline_s)
    answer = await present(app.tables).create(
        call.principal,
        TableDefinition(
            name=document.name,
            columns=tuple(column.definition() for column in document.columns),
            partition_by=tuple(document.partition_by),
            sort_by=tuple(document.sort_by),
            retention=document.retention,
        ),
        if_not_exists=document.if_not_exists,
        keyed=keyed,
    )
    rendered = schema_json(answer.schema) | {
        "created": answer.created or answer.replayed,
        "snapshot_id": answer.snapshot_id or None,
        "visibility_token": await _token_of(app, answer.snapshot_id, deadline_s),
    }
    return Answer(
        rendered,
        status=201 if answer.created or answer.replayed else 200,
        headers=((b"idempotent-replayed", b"true"),) if answer.replayed else (),
    )


async def patch_table(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("create")
    call.idempotency_key()
    deadline_s = call.deadline_s(parameters.timeout_ms())
    expected_version = _if_match(call)
    document = await read_document(call, ChangeDocument, deadline_s=deadline_s)
    answer = await present(app.tables).alter(
        call.principal,
        call.path_values["table"],
        document.request(),
        expected_version=expected_version,
    )
    return Answer(
        schema_json(answer.schema)
        | {
            "snapshot_id": answer.snapshot_id,
            "visibility_token": await _token_of(app, answer.snapshot_id, deadline_s),
        }
    )


async def delete_table(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("create")
    call.idempotency_key()
    deadline_s = call.deadline_s(parameters.timeout_ms())
    answer = await present(app.tables).drop(
        call.principal, call.path_values["table"], deadline_s=deadline_s
    )
    if answer.snapshot_id is None:
        return Answer({"name": answer.name, "state": "closing", "snapshot_id": None}, status=202)
    return Answer(
        {
            "name": answer.name,
            "state": "dropped",
            "snapshot_id": answer.snapshot_id,
            "visibility_token": await _token_of(app, answer.snapshot_id, deadline_s),
        }
    )


async def get_tables(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    resolved, view = await snapshot_view(call, parameters, app, LATEST)
    tables = QueryService.describe_all(view, call.principal.sees)
    return Answer({"tables": [_described(table) for table in tables], **_read_at(app, resolved)})


async def get_table(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    resolved, view = await snapshot_view(call, parameters, app, LATEST)
    name = folded_table(call)
    table = QueryService.describe(view, name, call.principal.sees)
    return Answer(_described(table) | _read_at(app, resolved))


async def get_files(call: Call, parameters: Parameters, app: Dependencies) -> Answer:
    call.principal.require("query")
    choice = _choice(parameters.text("snapshot"))
    resolved, view = await snapshot_view(call, parameters, app, choice)
    name = folded_table(call)
    if call.principal.sees(name):
        call.principal.require_table("query", name)
    table = QueryService.describe(view, name, call.principal.sees)
    files = view.files(table.schema.table_id).files
    names = {column.column_id: column.name for column in table.schema.columns}
    return Answer(
        {"table": name, "files": [_file_json(file, names) for file in files]}
        | _read_at(app, resolved)
    )


async def snapshot_view(
    call: Call, parameters: Parameters, app: Dependencies, choice: SnapshotChoice
) -> tuple[Resolved, SnapshotView]:
    """The snapshot that a request about tables reads."""

    deadline_s = call.deadline_s(parameters.timeout_ms())
    tokens = parameters.many("min_visibility_token")
    resolved = await app.resolver.resolve(choice, tokens=tokens, deadline_s=deadline_s)
    return resolved, await app.manifest.at(resolved.snapshot_id, resolved.head)


def schema_json(schema: TableSchema) -> dict[str, object]:
    return {
        "name": schema.name,
        "schema_version": schema.version,
        "columns": [
            {
                "column_id": column.column_id,
                "name": column.name,
                "type": column.type,
                "nullable": column.nullable,
            }
            for column in schema.columns
        ],
        "partition_by": list(schema.partition_by),
        "sort_by": list(schema.sort_by),
        "retention": schema.retention or None,
    }


def _described(table: TableDescription) -> dict[str, object]:
    return schema_json(table.schema) | {
        "rows": table.rows,
        "bytes": table.size_bytes,
        "files": table.files,
        "last_snapshot_id": table.last_snapshot,
    }


def _file_json(file: DataFile, names: dict[int, str]) -> dict[str, object]:
    return {
        "file_id": str(file.file_id),
        "rows": file.rows,
        "bytes": file.size_bytes,
        "sha256": file.sha256,
        "schema_version": file.schema_version,
        "first_snapshot_id": file.first_snapshot,
        "partition": None if file.partition is None else json.loads(file.partition),
        "sorted_by": file.layout or None,
        "statistics": {
            names[column_id]: {
                "null_count": statistics.null_count,
                "minimum": statistics.minimum,
                "maximum": statistics.maximum,
            }
            for column_id, statistics in file.statistics.items()
            if column_id in names
        },
    }


def _read_at(app: Dependencies, resolved: Resolved) -> dict[str, object]:
    return {
        "snapshot_id": resolved.snapshot_id,
        "visibility_token": app.codec.encode(resolved.token),
    }


async def _token_of(app: Dependencies, snapshot_id: int, deadline_s: float) -> str:
    """The token of a call that published `snapshot_id`; with 0, of the newest snapshot (D6)."""

    if snapshot_id:
        identity = await app.catalog.identity()
        return app.codec.encode(VisibilityToken(identity.history, snapshot_id))
    resolved = await app.resolver.resolve(deadline_s=deadline_s)
    return app.codec.encode(resolved.token)


def folded_table(call: Call) -> str:
    """The table that the path names. Raises TableNotFound for what can be no table's name."""

    text = call.path_values["table"]
    try:
        return fold_table_name(text)
    except SchemaInvalid:
        raise call.principal.table_not_found(text[:80]) from None


def _choice(text: str | None) -> SnapshotChoice:
    if text is None or text == "latest":
        return LATEST
    if not _SNAPSHOT_ID.fullmatch(text):
        raise MalformedRequest("the parameter snapshot must be latest or the id of a snapshot")
    return SnapshotChoice(snapshot_id=int(text))


def _if_match(call: Call) -> int | None:
    text = call.header(b"if-match")
    if text is None or text == "*":
        return None
    if not _VERSION.fullmatch(text.strip('"')):
        raise MalformedRequest('If-Match must be the schema version, like "3"')
    return int(text.strip('"'))
