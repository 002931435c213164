"""A request's body as an entry for the bus: decoded per table, with its payload's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import pyarrow as pa

from lakebus.errors import RowsInvalid
from lakebus.schemas import TableSchema
from storage.bus.interface import NewEntry, NewTable, RejectSet, TableNumbers
from storage.ingesting.new_tables import TableBody, TableRows, decode_for_new, decode_leniently
from storage.ingesting.reject_identity import with_rejected
from storage.ingesting.requests import IngestRequest
from storage.rows.decode import JSON, decode_rows
from storage.rows.decode_together import IdentifiedRows
from storage.rows.decoded import OnInvalid
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart
from storage.rows.shapes import shape_of

_ERRORS_REPORTED_MAX = 100


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """What a body holds under certain schema versions (`schema_versions`, by table id). `creates`
    are tables that do not exist yet, `skipped` columns that were left out for want of a value."""

    parts: tuple[EntryPart, ...]
    rejects: tuple[RejectSet, ...]
    fingerprint: bytes
    schema_versions: Mapping[int, int]
    creates: tuple[NewTable, ...] = ()
    skipped: tuple[str, ...] = ()

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
            creates=self.creates,
        )


def prepare_one(
    schema: TableSchema, media_type: str, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> PreparedRows:
    """The rows of a body for one table. Raises what `decode_rows` raises."""

    rows = decode_rows(schema, media_type, body, on_invalid=on_invalid, rows_max=rows_max)
    return prepare_decoded([TableRows(schema, rows)], several=False)


def prepare_identified(schema: TableSchema, rows: IdentifiedRows) -> PreparedRows:
    """Rows for one table that were decoded with those of others."""

    return PreparedRows(
        parts=(EntryPart(schema.table_id, schema.version, rows.batch, rows.size_bytes),),
        rejects=(),
        fingerprint=rows.fingerprint,
        schema_versions={schema.table_id: schema.version},
    )


def prepare_several(
    schemas: Mapping[str, TableSchema],
    bodies: Mapping[str, bytes],
    *,
    on_invalid: OnInvalid,
    rows_max: int,
) -> PreparedRows:
    """The rows of a body `{table: [rows]}` as `split_tables` cut it. Raises what `decode_rows`
    raises; the errors of all tables are reported together, each naming its table."""

    decoded = decode_tables(
        schemas,
        {name: TableBody(JSON, body) for name, body in bodies.items()},
        several=True,
        create=False,
        on_invalid=on_invalid,
        rows_max=rows_max,
    )
    return prepare_decoded(decoded, several=True)


def decode_tables(
    schemas: Mapping[str, TableSchema],
    bodies: Mapping[str, TableBody],
    *,
    several: bool,
    create: bool,
    on_invalid: OnInvalid,
    rows_max: int,
) -> list[TableRows]:
    """The rows of each table, under its schema; with `create`, tables without one are new.

    Raises what `decode_rows` raises. Errors of `several` tables are reported together.
    """

    decoded: list[TableRows] = []
    refused: dict[str, RowsInvalid] = {}
    left = rows_max
    for name, body in bodies.items():
        try:
            rows = _decode(schemas.get(name), name, body, create, on_invalid, left)
        except RowsInvalid as error:
            if not several:
                raise
            refused[name] = error
            continue
        decoded.append(rows)
        left -= rows.rows.batch.num_rows + len(rows.rows.rejected)
    if refused:
        raise _joined(refused)
    return decoded


def _decode(
    schema: TableSchema | None,
    name: str,
    body: TableBody,
    create: bool,
    on_invalid: OnInvalid,
    rows_max: int,
) -> TableRows:
    if schema is None:
        assert create, "whoever asks for no new table has looked up every name"
        return decode_for_new(name, body, on_invalid=on_invalid, rows_max=rows_max)
    if create:
        return decode_leniently(schema, body, on_invalid=on_invalid, rows_max=rows_max)
    rows = decode_rows(schema, body.media_type, body.body, on_invalid=on_invalid, rows_max=rows_max)
    return TableRows(schema, rows)


def prepare_decoded(
    decoded: Sequence[TableRows], *, several: bool, numbers: TableNumbers | None = None
) -> PreparedRows:
    """`numbers` has an id for each new table."""

    creates: list[NewTable] = []
    tables: list[TableRows] = []
    for table in decoded:
        if table.is_new:
            assert numbers is not None, "new tables are numbered before"
            schema = replace(table.schema, table_id=numbers.table_ids[len(creates)])
            creates.append(NewTable(schema, numbers.history_serial))
            table = replace(table, schema=schema)
        tables.append(table)
    parts = tuple(
        EntryPart(table.schema.table_id, table.schema.version, table.rows.batch)
        for table in tables
        if table.rows.batch.num_rows
    )
    rejecting = [table for table in tables if table.rows.rejected]
    rejected = {table.schema.table_id: table.rows.rejected for table in rejecting}
    identity = fingerprint(parts)
    return PreparedRows(
        parts=parts,
        rejects=tuple(map(_reject_set, rejecting)),
        fingerprint=with_rejected(identity, rejected) if rejected else identity,
        schema_versions={table.schema.table_id: table.schema.version for table in tables},
        creates=tuple(creates),
        skipped=tuple(
            f"{table.schema.name}.{name}" if several else name
            for table in tables
            for name in table.skipped
        ),
    )


def _reject_set(table: TableRows) -> RejectSet:
    schema = table.schema
    document = {
        "table": schema.name,
        "schema_version": schema.version,
        "rows": [
            {
                "row": rejected.row,
                "errors": [error.as_json() for error in rejected.errors],
                "value": msgspec.Raw(rejected.value),
            }
            for rejected in table.rows.rejected
        ],
    }
    return RejectSet(
        table_id=schema.table_id,
        schema_version=schema.version,
        rows=len(table.rows.rejected),
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
    shape = shape_of(schema)
    arrays = []
    for column, kind in zip(schema.columns, shape.kinds, strict=True):
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
    batch = pa.RecordBatch.from_arrays(arrays, schema=shape.arrow)
    return EntryPart(schema.table_id, schema.version, batch)
