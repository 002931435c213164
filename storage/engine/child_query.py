"""Runs one query on one cursor: guard, parameters, scope, bind, then batches.

Answers are always streamed by `cursor.sql(…).to_arrow_reader(…)`: of DuckDB 2.0's ways to a result
it is the one that does not hold the whole answer in memory, and it obeys `interrupt`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
from msgspec import structs

from storage.engine.child_faults import Refusal, refuse_sql
from storage.engine.child_formats import (
    ArrowWriter,
    CsvWriter,
    JsonWriter,
    NdjsonWriter,
    ParquetWriter,
    ResultWriter,
)
from storage.engine.child_guard import GuardedStatement
from storage.engine.child_sandbox import CLOCK_VARIABLE, quote_name
from storage.engine.child_sink import Sink
from storage.engine.child_small import SMALL_ROWS, are_whole, columns_of, encode_small, is_plain
from storage.engine.child_types import Carrier, export_cast, json_form, spell, uncarried
from storage.engine.wire import End, Header, RunRequest

_TEXT_BATCH_ROWS = 8192
_ARROW_BATCH_ROWS = 32768
_CARRIERS: dict[str, Carrier] = {
    "json": "json",
    "ndjson": "json",
    "csv": "json",
    "arrow": "arrow",
    "parquet": "parquet",
}
_TEXT_FORMATS = frozenset({"json", "ndjson", "csv"})


@dataclass(frozen=True, slots=True)
class Binding:
    """A bound query. `wrapped`: DuckDB sees a projection around the text, so positions are off.

    `relation` is None when the statement was executed already, and gave `rows` (child_small).
    """

    relation: duckdb.DuckDBPyRelation | None
    columns: tuple[tuple[str, str], ...]
    types: tuple[Any, ...]
    wrapped: bool
    rows: tuple[tuple[Any, ...], ...] = ()


def check_parameters(guarded: GuardedStatement, given: list[Any] | dict[str, Any] | None) -> Any:
    """The parameters as DuckDB takes them. Raises Refusal that names what is missing or extra."""

    wanted = guarded.parameters
    if not wanted:
        if given:
            raise refuse_sql("the statement has no parameters, but some were sent; remove them")
        return None
    if guarded.positional:
        if not isinstance(given, list):
            raise refuse_sql(f"the statement has {len(wanted)} positional parameters; send a list")
        highest = int(wanted[-1])
        if len(wanted) != highest:
            missing = next(n for n in range(1, highest + 1) if str(n) not in wanted)
            raise refuse_sql(f"the statement uses ${highest} but not ${missing}")
        if len(given) != highest:
            raise refuse_sql(f"the statement has {highest} parameters, {len(given)} were sent")
        return given
    if not isinstance(given, dict):
        raise refuse_sql(
            "the statement has named parameters; send an object with " + ", ".join(wanted)
        )
    missing_names = [name for name in wanted if name not in given]
    if missing_names:
        raise refuse_sql("values are missing for the parameters " + ", ".join(missing_names))
    extra = [name for name in given if name not in wanted]
    if extra:
        raise refuse_sql("the statement has no parameters named " + ", ".join(extra)[:200])
    return given


def check_sources(guarded: GuardedStatement, request: RunRequest) -> None:
    """Every table must have been resolved by the caller; a name that was not does not exist."""

    known = {source.name for source in request.sources}
    for key, name in guarded.references():
        if key not in known:
            raise Refusal("table_not_found", f"there is no table {name}")


def rewritten(
    guarded: GuardedStatement, request: RunRequest, parameters: Any, catalog: str
) -> tuple[RunRequest, Any]:
    """What DuckDB gets in place of the text, in a scope with this catalog, and its parameters."""

    rewriting = guarded.rewriting
    if rewriting is None:
        return request, parameters
    names = rewriting.parameters
    if not names or parameters is None:
        bound = None
    elif isinstance(parameters, dict):
        bound = {new: parameters[old] for new, old in names.items()}
    else:
        bound = {new: parameters[int(old) - 1] for new, old in names.items()}
    return structs.replace(request, sql=rewriting.text(catalog)), bound


def pin_clock(
    cursor: duckdb.DuckDBPyConnection, guarded: GuardedStatement, started_at: str
) -> None:
    """Contract D8: every spelling of now() answers the query's start."""

    if guarded.reads_clock:
        cursor.execute(f"SET VARIABLE \"{CLOCK_VARIABLE}\" = CAST('{started_at}' AS TIMESTAMPTZ)")


def bind(cursor: duckdb.DuckDBPyConnection, request: RunRequest, parameters: Any) -> Binding:
    """Binds the statement and casts the columns that cannot leave DuckDB as they are."""

    carrier = _CARRIERS[request.result_format]
    relation = _bind_text(cursor, request.sql, parameters)
    types = tuple(relation.types)
    names = tuple(relation.columns)
    for name, kind in zip(names, types, strict=True):
        _check_carried(name, kind, carrier)
    casts = [export_cast(kind, carrier=carrier) for kind in types]
    columns = tuple((name, spell(kind)) for name, kind in zip(names, types, strict=True))
    if not any(casts):
        return Binding(relation, columns, types, False)
    items = (
        (f"#{n}" if cast is None else f"CAST(#{n} AS {cast})") + f" AS {quote_name(name)}"
        for n, (name, cast) in enumerate(zip(names, casts, strict=True), start=1)
    )
    return Binding(relation.project(", ".join(items)), columns, types, True)


def _check_carried(name: str, kind: Any, carrier: Carrier) -> None:
    found = uncarried(kind, carrier=carrier)
    if found is not None:
        within = "" if found == spell(kind) else f" with {found[:80]} in it"
        raise refuse_sql(
            f"the column {name[:80]} is {spell(kind)[:200]}{within}, which this form of answer "
            f"cannot carry: cast it, CAST({quote_name(name[:80])} AS VARCHAR), or leave it out"
        )


def execute_small(
    cursor: duckdb.DuckDBPyConnection, request: RunRequest, parameters: Any
) -> Binding | None:
    """Executes at once. None when the answer turns out not to be small and plain: bind it then."""

    cursor.execute(request.sql, parameters)
    described = cursor.description or []
    types = tuple(column[1] for column in described)
    if all(map(is_plain, types)):
        rows = tuple(cursor.fetchmany(SMALL_ROWS + 1))
        if len(rows) <= SMALL_ROWS and are_whole(rows, types):
            return Binding(None, columns_of(described), types, False, rows)
    cursor.abort()
    return None


def _bind_text(
    cursor: duckdb.DuckDBPyConnection, sql: str, parameters: Any
) -> duckdb.DuckDBPyRelation:
    try:
        relation = cursor.sql(sql, params=parameters)
    except duckdb.Error:
        # Only the plain path reports where in the text an error is, so ask it again.
        cursor.execute(sql, parameters)
        cursor.abort()
        raise
    if relation is None:
        raise refuse_sql("the statement gives no rows; send a SELECT")
    return relation


def stream(
    binding: Binding,
    request: RunRequest,
    sink: Sink,
    check: Callable[[], None],
) -> int:
    """Sends header, data and end; gives the rows. `check` raises when nobody wants the query."""

    began = time.perf_counter()
    sink.header(Header(binding.columns))
    if binding.relation is None:
        rows = _counted(0, len(binding.rows), request.rows_max)
        sink.write(encode_small(binding.rows, binding.types, integers=request.integers))
    else:
        is_text = request.result_format in _TEXT_FORMATS
        size = _TEXT_BATCH_ROWS if is_text else _ARROW_BATCH_ROWS
        reader = binding.relation.to_arrow_reader(min(size, request.rows_max + 1))
        try:
            if is_text:
                writer = _text_writer(binding, request, sink)
            elif request.result_format == "parquet":
                writer = ParquetWriter(sink.write, reader.schema)
            else:
                writer = ArrowWriter(sink.write, reader.schema)
            rows = _write(writer, reader, request, check)
        finally:
            reader.close()
    sink.finish(End(rows, (time.perf_counter() - began) * 1000))
    return rows


def _text_writer(binding: Binding, request: RunRequest, sink: Sink) -> ResultWriter:
    forms = tuple(json_form(kind, integers=request.integers) for kind in binding.types)
    names = [name for name, _ in binding.columns]
    if request.result_format == "ndjson":
        return NdjsonWriter(sink.write, forms, names)
    if request.result_format == "csv":
        return CsvWriter(sink.write, forms, names)
    return JsonWriter(sink.write, forms)


def _write(
    writer: ResultWriter,
    batches: Iterable[pa.RecordBatch],
    request: RunRequest,
    check: Callable[[], None],
) -> int:
    rows = 0
    for batch in batches:
        check()
        rows = _counted(rows, batch.num_rows, request.rows_max)
        writer.batch(batch)
    writer.end(rows)
    return rows


def _counted(rows: int, more: int, rows_max: int) -> int:
    rows += more
    if rows > rows_max:
        raise Refusal(
            "result_too_large",
            f"the result has more than {rows_max} rows; ask for fewer or raise max_rows",
            limit_rows=rows_max,
        )
    return rows
