"""CSV bodies (RFC 4180, header line): compiled parsing, then the same rules as for JSON values.

Each field is the text of a value: a number for number columns, `true` or `false`, the strings that
JSON would hold for everything else, JSON text for json columns and for lists, structs and maps. An
unquoted empty field is null, a quoted one is an empty string. Text becomes numbers by the column's
type, never through a double.

pyarrow cuts the body into fields, because it tells `""` from nothing; but it also takes a quote
that is never closed, and text behind a closing quote. So a body with quotes is read a second time
by the strict reader of the standard library, only to find such faults and their lines.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from lakebus.errors import MalformedBody
from lakebus.schemas import TableSchema
from storage.rows import columns as column_builders
from storage.rows import slow_pass
from storage.rows.decode_json import DecodePlan, check_keys, plan_of
from storage.rows.decoded import DecodedRows, OnInvalid, shorten_name
from storage.rows.json_text import JsonRow, Member, NumberText, body_text, compact_json
from storage.rows.names import fold
from storage.rows.nested_columns import KeysSeen, nested_plan
from storage.rows.text_columns import Texts, json_value, text_builder
from storage.rows.types import NESTED, ColumnType, Family

_FIELD_CHARACTERS_MAX = 2**31 - 1
_COLUMNS_MAX = 10_000
#: Families whose fields hold JSON text.
_DOCUMENTS = NESTED | {Family.JSON}


def decode_csv(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """The rows of a CSV body. Raises as `decode.decode_rows` says."""

    names, fields = read_csv(body, rows_max=rows_max)
    try:
        return DecodedRows(_fast_batch(schema, names, fields))
    except column_builders.REFUSALS:
        return _exactly(schema, names, fields, on_invalid, rows_max)


def fast_csv(schema: TableSchema, body: bytes, *, rows_max: int) -> pa.RecordBatch:
    """The fast path alone. Raises one of REFUSALS for what the exact pass must decide."""

    return _fast_batch(schema, *read_csv(body, rows_max=rows_max))


def exact_csv(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """The exact pass alone."""

    return _exactly(schema, *read_csv(body, rows_max=rows_max), on_invalid, rows_max)


def read_csv(body: bytes, *, rows_max: int) -> tuple[list[str], pa.Table]:
    """The folded names of the header, and all fields as text, null where nothing stands."""

    names, rest = _header(body_text(body).removeprefix("\ufeff"))
    fields = _fields(rest, len(names))
    slow_pass.check_row_count(fields.num_rows, rows_max=rows_max)
    return names, fields


def _exactly(
    schema: TableSchema,
    names: Sequence[str],
    fields: pa.Table,
    on_invalid: OnInvalid,
    rows_max: int,
) -> DecodedRows:
    plan = plan_of(schema)
    return slow_pass.decode_exactly(
        schema,
        plan.kinds,
        plan.arrow,
        _rows(schema, plan, names, fields),
        on_invalid=on_invalid,
        rows_max=rows_max,
    )


# --- fields -------------------------------------------------------------------------------------


def _header(text: str) -> tuple[list[str], str]:
    """The column names, and what follows their line."""

    lines = io.StringIO(text, newline="")
    reader = _strict(lines)
    try:
        names: list[str] = next(reader, [])
    except csv.Error as fault:
        raise MalformedBody(f"line 1 of the CSV body: {fault}") from None
    if not any(names):
        raise MalformedBody("the CSV body has no header line; begin with the names of the columns")
    if len(names) > _COLUMNS_MAX:
        raise MalformedBody(f"the header names more than {_COLUMNS_MAX} columns")
    folded = [fold(name) for name in names]
    double = next((name for name in folded if folded.count(name) > 1), None)
    if double is not None:
        raise MalformedBody(
            f"the header names the column {shorten_name(double)} twice (names fold to lower case)"
        )
    return folded, lines.read()


def _strict(lines: io.StringIO) -> Any:
    # For the whole process, but only upwards: nothing else here reads CSV.
    csv.field_size_limit(_FIELD_CHARACTERS_MAX)
    # Line by line, so that nothing behind the header is taken from the file with it.
    return csv.reader(iter(lines.readline, ""), strict=True)


def _fields(text: str, width: int) -> pa.Table:
    """All fields as text, columns named by their number."""

    if '"' in text:
        reader = _strict(io.StringIO(text, newline=""))
        try:
            for _ in reader:
                pass
        except csv.Error as fault:
            line = reader.line_num + 1
            raise MalformedBody(f"the CSV body is broken at line {line}: {fault}") from None
    names = [str(number) for number in range(width)]
    data = text.encode("utf-8")
    if not data.strip(b"\r\n") and (width > 1 or not data):
        return pa.table({name: pa.array([], pa.string()) for name in names})
    try:
        return pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(
                use_threads=False, block_size=len(data) + 1, column_names=names
            ),
            # An empty line is a null where there is one column, and nothing where there are more.
            parse_options=pa_csv.ParseOptions(
                newlines_in_values=True, ignore_empty_lines=width > 1
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        ).combine_chunks()
    except pa.ArrowException as fault:
        # "Row #n" counts from 1 and without the header, which is the caller's line less one.
        raise MalformedBody(f"the CSV body cannot be read: {str(fault)[:200]}") from None


# --- the fast way -------------------------------------------------------------------------------


def _fast_batch(schema: TableSchema, names: Sequence[str], fields: pa.Table) -> pa.RecordBatch:
    plan = plan_of(schema)
    places = {name: place for place, name in enumerate(names)}
    if not places.keys() <= {column.name for column in schema.columns}:
        raise ValueError("the header names a column that the table does not have")
    arrays = []
    for column, kind in zip(schema.columns, plan.kinds, strict=True):
        place = places.get(column.name)
        if place is None:
            array = pa.nulls(fields.num_rows, kind.arrow)
        else:
            array = _column(kind, fields.column(place))
        if array.null_count and not column.nullable:
            raise ValueError("null where none may be")
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=plan.arrow)


def _column(kind: ColumnType, texts: pa.ChunkedArray) -> pa.Array:
    whole = texts.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no rows
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], pa.string())
    if kind.is_nested:
        return _nested_column(kind, whole.to_pylist())
    if kind.family is Family.VARCHAR:
        return pc.cast(whole, kind.arrow)
    return text_builder(kind)(whole.to_pylist())


def _nested_column(kind: ColumnType, texts: Texts) -> pa.Array:
    """One by one, because no text may borrow a bracket from its neighbour."""

    plan, seen = nested_plan(kind), KeysSeen()
    written = [None if text is None else text.strip().encode("utf-8") for text in texts]
    values = [None if text is None else plan.decoder.decode(text) for text in written]
    array = plan.build(values, seen)
    check_keys(b"\n".join(filter(None, written)), seen.present, seen.raws)
    return array


# --- the exact way ------------------------------------------------------------------------------


def _rows(
    schema: TableSchema, plan: DecodePlan, names: Sequence[str], fields: pa.Table
) -> Iterator[JsonRow]:
    """The rows as the JSON that says the same, for the rules and the reports of JSON rows."""

    kinds = {c.name: kind for c, kind in zip(schema.columns, plan.kinds, strict=True)}
    families = [kinds[name].family if name in kinds else None for name in names]
    labels = [json.dumps(name, ensure_ascii=False) + ": " for name in names]
    columns = [column.to_pylist() for column in fields.columns]
    for values in zip(*columns, strict=True):
        members, shown = [], []
        for name, family, label, text in zip(names, families, labels, values, strict=True):
            member = _member(name, family, text)
            members.append(member)
            is_json = member.text is not text or isinstance(member.value, NumberText | bool)
            shown.append(label + (member.text if is_json else _in_json(member)))
        yield JsonRow("{" + ", ".join(shown) + "}", members)


def _member(name: str, family: Family | None, text: str | None) -> Member:
    """A field as the JSON member that says the same; of a column that holds JSON the text."""

    if text is None or (family in _DOCUMENTS and text.strip() == "null"):
        return Member(name, None, "null")
    if family in _DOCUMENTS:
        return Member(name, text, text)
    value = text if family is None else json_value(family, text)
    if isinstance(value, NumberText | bool):
        return Member(name, value, text)
    return Member(name, text, json.dumps(text, ensure_ascii=False))


def _in_json(member: Member) -> str:
    """A field that holds JSON inside of a row: as it is, or as a string if it is no JSON."""

    try:
        return compact_json(member.text.encode("utf-8")).decode("utf-8")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return json.dumps(member.text, ensure_ascii=False)
