"""What goes into the engine and what parsing tells about a statement: plain nouns, no work."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ResultFormat = Literal["json", "ndjson", "csv", "arrow", "parquet"]
Integers = Literal["string", "number"]
ParameterValue = None | bool | int | float | str
Parameters = Sequence[ParameterValue] | Mapping[str, ParameterValue] | None


@dataclass(frozen=True, slots=True)
class ParsedStatement:
    """A statement that passed the guard.

    `kind`: `select`, `describe`, `summarize` or `explain`. `tables`: exactly the base tables it
    reads, folded, as `table` or `namespace.table`, in order of appearance; names of CTEs are not
    tables. `parameters`: names without `$`; positions are `"1"`, `"2"`, …; `positional` says which.
    `tree`: DuckDB's `json_serialize_sql` document (of the inner SELECT for EXPLAIN); empty when it
    nests too deeply to walk, then nothing can be pruned. Do not change it: it is shared.
    `reads_clock`: the statement asks for the current time.
    """

    sql: str
    kind: str
    tables: tuple[str, ...]
    parameters: tuple[str, ...]
    positional: bool
    reads_clock: bool
    tree: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class SourceTable:
    """How one table is read by one query.

    `columns`: (name, column id, SQL type), the only columns the statement can see.
    `relation_sql`: what may stand after FROM, e.g. `read_parquet([…])` or `(SELECT … ORDER BY …)`;
    made by the catalog side, never from a caller's text.
    """

    columns: tuple[tuple[str, int, str], ...]
    relation_sql: str


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """One query, resolved: every table of the statement has its source.

    `deadline_s`: seconds left of the caller's budget, counted from the call of `execute`.
    `started_at`: the query's start by the database clock; `now()` and its kin answer exactly it.
    `rows_max`, `bytes_max`: limits of the answer; more is an error, never a shorter answer.
    `deterministic`: one thread and source order.
    """

    sql: str
    sources: Mapping[str, SourceTable]
    started_at: dt.datetime
    query_id: str
    deadline_s: float
    parameters: Parameters = None
    result_format: ResultFormat = "json"
    integers: Integers = "string"
    rows_max: int = 1_000_000
    bytes_max: int = 1 << 30
    deterministic: bool = False
