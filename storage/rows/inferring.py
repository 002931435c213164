"""The columns of a table to be made from the first rows sent to it (`create=true`).

One rule for all formats: a column has the type that holds all its values, and no other is guessed.
Whole numbers are bigint; with any fraction (or NaN, Infinity) among them double; true and false are
boolean; texts that are all spelled as times of RFC 3339 are timestamptz, or timestamp without a
zone; other texts are varchar; arrays and objects are json. Arrow and Parquet name their types. A
column without a value has no type yet, so it is left out and named.

In JSON, values of two kinds in a column are an error that names both. In CSV all values are text,
so such a column is varchar; only times with and without a zone are refused in both.

What is found here decides nothing about a row: the rows are decoded under the columns found, by the
same rules as always, so what does not fit (a number beyond bigint, a time that does not exist) is
a row error.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from lakebus.errors import RowsInvalid, SchemaInvalid
from storage.rows import cells, json_text
from storage.rows.arrow_casts import plain_array
from storage.rows.decode import ARROW_STREAM, CSV, JSON, NDJSON, PARQUET, unsupported
from storage.rows.decode_arrow import read_stream
from storage.rows.decode_csv import read_csv
from storage.rows.decode_parquet import read_parquet
from storage.rows.decoded import ERRORS_REPORTED_MAX, RowError, shorten, shorten_name
from storage.rows.names import fold
from storage.rows.slow_pass import check_row_count
from storage.rows.types import ColumnType, parse_type, type_of_arrow

_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)", re.ASCII)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)


class _Kind(enum.Enum):
    """What a value looks like; the words are for errors."""

    BOOLEAN = "true or false"
    WHOLE = "a whole number"
    FRACTION = "a number with a fraction"
    WORD = "NaN or Infinity"
    ZONED = "a time with a zone"
    LOCAL = "a time without a zone"
    TEXT = "text"
    NESTED = "an array or object"


_TEXTS = {_Kind.WORD, _Kind.ZONED, _Kind.LOCAL, _Kind.TEXT}
_NUMBERS = {_Kind.WHOLE, _Kind.FRACTION, _Kind.WORD}
_ALONE = {
    _Kind.BOOLEAN: "boolean",
    _Kind.WHOLE: "bigint",
    _Kind.ZONED: "timestamptz",
    _Kind.LOCAL: "timestamp",
    _Kind.NESTED: "json",
}


@dataclass(frozen=True, slots=True)
class Inferred:
    """`types` by folded name, in order of appearance; `skipped` are columns without a value."""

    types: Mapping[str, ColumnType]
    skipped: tuple[str, ...]


#: The first value of each kind: its row, and how it is written.
_Seen = dict[_Kind, tuple[int, str]]
#: A column: its type, None when it has no value, or why it can have no type.
_Finding = ColumnType | RowError | None


def infer_columns(table: str, media_type: str, body: bytes, *, rows_max: int) -> Inferred:
    """The columns of the rows in `body`. `table` is for errors.

    Raises RowsInvalid for columns that can have no one type, and what `decode.decode_rows` raises
    for a body that cannot be read.
    """

    findings = _survey(table, media_type, body, rows_max)
    errors = [found for found in findings.values() if isinstance(found, RowError)]
    if errors:
        first = errors[0]
        raise RowsInvalid(
            f"the table {table} cannot be made from these rows, nothing was stored: row "
            f"{first.row}, column {first.column}: {first.reason}",
            errors=[error.as_json() for error in errors[:ERRORS_REPORTED_MAX]],
            error_count=len(errors),
        )
    types = {name: kind for name, kind in findings.items() if isinstance(kind, ColumnType)}
    return Inferred(types, tuple(name for name in findings if name not in types))


def null_columns(table: str, media_type: str, body: bytes, *, rows_max: int) -> tuple[str, ...]:
    """The folded names of the columns that have no value in any row, in order of appearance.
    Raises as `infer_columns` does for a body that cannot be read."""

    findings = _survey(table, media_type, body, rows_max)
    return tuple(name for name, found in findings.items() if found is None)


def _survey(table: str, media_type: str, body: bytes, rows_max: int) -> Mapping[str, _Finding]:
    survey = _SURVEYS.get(media_type)
    if survey is None:
        raise unsupported(media_type)
    return survey(table, body, rows_max)


# --- JSON -----------------------------------------------------------------------------------------


_Members = Iterable[tuple[str, bytes]]
_ROWS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_ROW = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _survey_json(table: str, body: bytes, rows_max: int) -> Mapping[str, _Finding]:
    return _survey_members(_json_rows(body, rows_max))


def _survey_ndjson(table: str, body: bytes, rows_max: int) -> Mapping[str, _Finding]:
    return _survey_members(_json_lines(body, rows_max))


def _json_rows(body: bytes, rows_max: int) -> Iterator[_Members]:
    try:
        single = body.lstrip(b" \t\n\r")[:1] == b"{"
        rows = [_ROW.decode(body)] if single else _ROWS.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _exact_rows(json_text.read_rows(json_text.body_text(body)))
    return _fast_rows(rows, rows_max)


def _json_lines(body: bytes, rows_max: int) -> Iterator[_Members]:
    try:
        rows = _ROW.decode_lines(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _exact_rows(json_text.read_lines(json_text.body_text(body)))
    return _fast_rows(rows, rows_max)


def _fast_rows(rows: list[dict[str, msgspec.Raw]], rows_max: int) -> Iterator[_Members]:
    check_row_count(len(rows), rows_max=rows_max)
    for row in rows:
        yield ((name, bytes(raw)) for name, raw in row.items())


def _exact_rows(rows: Iterable[json_text.JsonRow]) -> Iterator[_Members]:
    """Whatever is wrong with a row, decoding says; here it only has no members."""

    for row in rows:
        yield ((m.key, m.text.encode("utf-8", "surrogatepass")) for m in row.members or ())


def _survey_members(rows: Iterable[_Members]) -> Mapping[str, _Finding]:
    columns: dict[str, _Seen] = {}
    folded: dict[str, str] = {}
    for number, members in enumerate(rows):
        for key, raw in members:
            name = folded.get(key)
            if name is None:
                name = folded[key] = fold(key)
            seen = columns.setdefault(name, {})
            kind = _json_kind(raw)
            if kind is not None and kind not in seen:
                seen[kind] = (number, raw.decode("utf-8", "replace"))
    return {name: _type_of(name, seen) for name, seen in columns.items()}


def _json_kind(raw: bytes) -> _Kind | None:
    first = raw[:1]
    if first == b'"':
        if b"\\" not in raw:
            return _text_kind(raw[1:-1].decode("utf-8", "replace"))
        try:
            return _text_kind(msgspec.json.decode(raw, type=str))
        except (msgspec.MsgspecError, ValueError):
            return _Kind.TEXT  # half of a surrogate pair: decoding refuses it
    if first in (b"{", b"["):
        return _Kind.NESTED
    if first == b"n":
        return None
    if first in (b"t", b"f"):
        return _Kind.BOOLEAN
    return _Kind.FRACTION if raw.strip(b"-0123456789") else _Kind.WHOLE


def _text_kind(text: str) -> _Kind:
    if text in cells.FLOAT_WORDS:
        return _Kind.WORD
    match cells.time_shape(text):
        case "zoned":
            return _Kind.ZONED
        case "local":
            return _Kind.LOCAL
    return _Kind.TEXT


# --- CSV ------------------------------------------------------------------------------------------


def _survey_csv(table: str, body: bytes, rows_max: int) -> Mapping[str, _Finding]:
    names, fields = read_csv(body, rows_max=rows_max)
    findings: dict[str, _Finding] = {}
    for name, column in zip(names, fields.columns, strict=True):
        seen: _Seen = {}
        for number, text in enumerate(column.to_pylist()):
            if text is None or _Kind.TEXT in seen:
                continue
            seen.setdefault(_field_kind(text), (number, text))
        findings[name] = _type_of(name, seen, of_texts=True)
    return findings


def _field_kind(text: str) -> _Kind:
    if _WHOLE.fullmatch(text):
        return _Kind.WHOLE
    if _NUMBER.fullmatch(text):
        return _Kind.FRACTION
    return _Kind.BOOLEAN if text in ("true", "false") else _text_kind(text)


# --- what the values of one column can be together ------------------------------------------------


def _type_of(name: str, seen: _Seen, *, of_texts: bool = False) -> _Finding:
    if not seen:
        return None
    sql = _one_type(set(seen), of_texts=of_texts)
    return _mixed(name, seen, of_texts=of_texts) if sql is None else parse_type(sql)


def _one_type(kinds: set[_Kind], *, of_texts: bool) -> str | None:
    """The type that holds values of all these kinds, None when there is none."""

    if len(kinds) == 1 and (alone := _ALONE.get(next(iter(kinds)))):
        return alone
    if kinds <= _NUMBERS and kinds != {_Kind.WORD}:
        return "double"
    if kinds == {_Kind.ZONED, _Kind.LOCAL}:
        return None
    return "varchar" if of_texts or kinds <= _TEXTS else None


def _mixed(name: str, seen: _Seen, *, of_texts: bool) -> RowError:
    """Names the first two values that cannot be in one column."""

    places = sorted(seen.items(), key=lambda one: one[1][0])
    (first, (row, _)), (other, (other_row, value)) = next(
        pair
        for pair in itertools.combinations(places, 2)
        if _one_type({pair[0][0], pair[1][0]}, of_texts=of_texts) is None
    )
    return RowError(
        other_row,
        shorten_name(name),
        f"{other.value}, and row {row} has {first.value} there: a column has one type. Send values "
        "of one kind, or make the table with POST /v1/tables first",
        shorten(value),
    )


# --- Arrow, Parquet -------------------------------------------------------------------------------


def _survey_arrow(table: str, body: bytes, rows_max: int) -> Mapping[str, _Finding]:
    return _survey_batch(read_stream(body), rows_max)


def _survey_parquet(table: str, body: bytes, rows_max: int) -> Mapping[str, _Finding]:
    return _survey_batch(read_parquet(body, table=table, rows_max=rows_max), rows_max)


def _survey_batch(batch: pa.RecordBatch, rows_max: int) -> Mapping[str, _Finding]:
    check_row_count(batch.num_rows, rows_max=rows_max)
    findings: dict[str, _Finding] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        # Of two fields with one name decoding says that it comes twice.
        findings.setdefault(fold(field.name), _arrow_type(field, column))
    return findings


def _arrow_type(field: pa.Field, column: pa.Array) -> _Finding:
    if pc.all(pc.is_null(plain_array(column))).as_py():
        return None
    try:
        return type_of_arrow(field.type)
    except SchemaInvalid as error:
        return RowError(0, shorten_name(field.name), error.detail, None)


_SURVEYS: dict[str, Callable[[str, bytes, int], Mapping[str, _Finding]]] = {
    JSON: _survey_json,
    NDJSON: _survey_ndjson,
    CSV: _survey_csv,
    ARROW_STREAM: _survey_arrow,
    PARQUET: _survey_parquet,
}
