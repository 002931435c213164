"""What goes into the engine and what parsing tells about a statement: plain nouns, no work."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from storage.turns import OURSELVES, Party

ResultFormat = Literal["json", "ndjson", "csv", "arrow", "parquet"]
Integers = Literal["string", "number"]
ParameterValue = None | bool | int | float | str
Parameters = Sequence[ParameterValue] | Mapping[str, ParameterValue] | None

#: Parts of a SELECT in its tree, as they are when nothing was said of them.
PLAIN_SELECT: Mapping[str, object] = {
    "group_expressions": [],
    "group_sets": [],
    "aggregate_handling": "STANDARD_HANDLING",
    "having": None,
    "sample": None,
    "qualify": None,
}


@dataclass(frozen=True, slots=True)
class At:
    """The snapshot that an `AT` names. `unit`: `version` or `timestamp`. Exactly one of `literal`
    (its text) and `parameter` (its name, without `$`) is not None."""

    unit: str
    literal: str | None
    parameter: str | None


@dataclass(frozen=True, slots=True)
class Travel:
    """What a statement reads at one snapshot of its own: names as in `ParsedStatement`. `tree`:
    the statement's, in which the mentions at this snapshot are plain ones and all other tables have
    other names, so that what it says of a table is about these mentions alone."""

    at: At
    tables: tuple[str, ...]
    tree: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ParsedStatement:
    """A statement that passed the guard.

    `kind`: `select`, `show`, `describe`, `summarize` or `explain`. `tables`: exactly the base
    tables whose rows it reads, folded, as `table` or `namespace.table`, in order of appearance;
    names of CTEs are not tables. `parameters`: names without `$`; positions are `"1"`, `"2"`, …;
    `positional` says which. `tree`: DuckDB's `json_serialize_sql` document (of the inner SELECT for
    EXPLAIN); empty when it nests too deeply to walk, then nothing can be pruned. Do not change it:
    it is shared. `reads_clock`: the statement asks for the current time. `described`: tables whose
    columns it asks for. `listings`: lists of tables that it reads (`storage.reading.listings`).
    `travels`: what it reads at other snapshots, in the order in which they are first named.
    """

    sql: str
    kind: str
    tables: tuple[str, ...]
    parameters: tuple[str, ...]
    positional: bool
    reads_clock: bool
    tree: Mapping[str, Any] = field(repr=False)
    described: tuple[str, ...] = ()
    listings: tuple[str, ...] = ()
    travels: tuple[Travel, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceTable:
    """How one table is read by one query.

    `columns`: (name, column id, SQL type), the only columns the statement can see.
    `relation_sql`: what may stand after FROM, e.g. `read_parquet([…])` or `(SELECT … ORDER BY …)`;
    made by the catalog side, never from a caller's text. For a table that is only described: what
    stands between the parentheses of CREATE TABLE.
    """

    columns: tuple[tuple[str, int, str], ...]
    relation_sql: str


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """One query, resolved: every table of the statement has its source.

    `sources`: by name; what is not a table at the query's snapshot stands behind a side and a colon
    (`side_name`).
    `deadline_s`: seconds left of the caller's budget, counted from the call of `execute`.
    `started_at`: the query's start by the database clock; `now()` and its kin answer exactly it.
    `rows_max`, `bytes_max`: limits of the answer; more is an error, never a shorter answer.
    `deterministic`: one thread and source order. `party`: whose turn the query waits for.
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
    party: Party = OURSELVES


#: Relations of `information_schema`, and the answers of whole statements that are lists, too. SHOW
#: TABLES FROM a namespace is `show_tables.<namespace>`.
INFORMATION_SCHEMA = "information_schema"
LISTED = frozenset({"tables", "columns", "schemata"})
SHOW_TABLES, SHOW_ALL_TABLES, SHOW_SCHEMAS = "show_tables", "show_all_tables", "show_schemas"

#: Sides of a statement: besides the rows of its tables it reads their columns, lists, and rows at
#: other snapshots, by the number in `ParsedStatement.travels`.
SHAPES, LISTINGS = "d", "i"


def rows_at(travel: int) -> str:
    return f"r{travel}"


def side_name(side: str, name: str) -> str:
    """The key of a source; neither sides nor names have a colon."""

    return f"{side}:{name}"
