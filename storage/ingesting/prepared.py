"""A request's body as an entry for the bus: decoded per table, with its payload's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from lakebus.errors import RowsInvalid
from lakebus.schemas import TableSchema
from storage.bus.interface import NewEntry, RejectSet
from storage.ingesting.reject_identity import with_rejected
from storage.ingesting.requests import IngestRequest
from storage.rows.decode import decode_rows, decode_rows_value
from storage.rows.decode_json import arrow_schema
from storage.rows.decoded import DecodedRows, OnInvalid
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart
from storage.rows.types import parse_type

_ERRORS_REPORTED_MAX = 100


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """What a body holds under certain schema versions (`schema_versions`, by table id)."""

    parts: tuple[EntryPart, ...]
    rejects: tuple[RejectSet, ...]
    fingerprint: bytes
    schema_versions: Mapping[int, int]

    def as_entry(self, request: IngestRequest) -> NewEntry:
        return NewEntry(
            principal_id=request.principal.principal_id,
            target=request.target,
            parts=self.parts,
            fingerprint=self.fingerprint,
            idempotency_key=request.idempotency_key,
            first_attempt_at=request.first_attempt_at,
            ordering_key=request.ordering_key,
            rejects=self.rejects,
        )


def prepare_one(
    schema: TableSchema, media_type: str, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> PreparedRows:
    """The rows of a body for one table. Raises what `decode_rows` raises."""

    decoded = decode_rows(schema, media_type, body, on_invalid=on_invalid, rows_max=rows_max)
    return _prepared({schema.name: (schema, decoded)})


def prepare_several(
    schemas: Mapping[str, TableSchema],
    bodies: Mapping[str, bytes],
    *,
    on_invalid: OnInvalid,
    rows_max: int,
) -> PreparedRows:
    """The rows of a body `{table: [rows]}` as `split_tables` cut it. Raises what `decode_rows`
    raises; the errors of all tables are reported together, each naming its table."""

    decoded: dict[str, tuple[TableSchema, DecodedRows]] = {}
    refused: dict[str, RowsInvalid] = {}
    left = rows_max
    for name, body in bodies.items():
        schema = schemas[name]
        try:
            rows = decode_rows_value(schema, body, on_invalid=on_invalid, rows_max=left)
        except RowsInvalid as error:
            refused[name] = error
            continue
        decoded[name] = (schema, rows)
        left -= rows.batch.num_rows + len(rows.rejected)
    if refused:
        raise _joined(refused)
    return _prepared(decoded)


def _prepared(decoded: Mapping[str, tuple[TableSchema, DecodedRows]]) -> PreparedRows:
    tables = list(decoded.values())
    parts = tuple(
        EntryPart(schema.table_id, schema.version, rows.batch)
        for schema, rows in tables
        if rows.batch.num_rows
    )
    rejected = {schema.table_id: rows.rejected for schema, rows in tables if rows.rejected}
    identity = fingerprint(parts)
    return PreparedRows(
        parts=parts,
        rejects=tuple(_reject_set(schema, rows) for schema, rows in tables if rows.rejected),
        fingerprint=with_rejected(identity, rejected) if rejected else identity,
        schema_versions={schema.table_id: schema.version for schema, _ in tables},
    )


def _reject_set(schema: TableSchema, rows: DecodedRows) -> RejectSet:
    document = {
        "table": schema.name,
        "schema_version": schema.version,
        "rows": [
            {
                "row": rejected.row,
                "errors": [error.as_json() for error in rejected.errors],
                "value": msgspec.Raw(rejected.value),
            }
            for rejected in rows.rejected
        ],
    }
    return RejectSet(
        table_id=schema.table_id,
        schema_version=schema.version,
        rows=len(rows.rejected),
        document=msgspec.json.encode(document),
    )


def _joined(refused: Mapping[str, RowsInvalid]) -> RowsInvalid:
    errors = [
        {"table": name, **found}
        for name, error in refused.items()
        for found in error.members["errors"]
    ]
    return RowsInvalid(
        " ".join(error.detail for error in refused.values()),
        errors=errors[:_ERRORS_REPORTED_MAX],
        error_count=sum(error.members["error_count"] for error in refused.values()),
    )


def prepare_parts(schemas: Mapping[int, TableSchema], parts: Sequence[EntryPart]) -> PreparedRows:
    """Stored rows once more, under the schemas (by table id) that their tables have now: columns
    dropped since are left out, columns added since are null. Raises RowsInvalid."""

    moved = tuple(_moved(schemas[part.table_id], part) for part in parts)
    return PreparedRows(
        parts=moved,
        rejects=(),
        fingerprint=fingerprint(moved),
        schema_versions={schema.table_id: schema.version for schema in schemas.values()},
    )


def _moved(schema: TableSchema, part: EntryPart) -> EntryPart:
    if part.schema_version == schema.version:
        return part
    kinds = [parse_type(column.type) for column in schema.columns]
    arrays = []
    for column, kind in zip(schema.columns, kinds, strict=True):
        place = part.batch.schema.get_field_index(str(column.column_id))
        if place < 0 and not column.nullable:
            raise RowsInvalid(
                f"the table {schema.name} now needs a value in {column.name}, and the rows have "
                "none; send fixed rows",
                errors=[{"row": 0, "column": column.name, "reason": "missing", "value": None}],
                error_count=part.batch.num_rows,
            )
        arrays.append(
            pa.nulls(part.batch.num_rows, kind.arrow) if place < 0 else part.batch.column(place)
        )
    batch = pa.RecordBatch.from_arrays(arrays, schema=arrow_schema(schema, kinds))
    return EntryPart(schema.table_id, schema.version, batch)
