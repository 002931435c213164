"""A caller's row predicate: the text after WHERE of a delete, judged before it is run.

The text is run only in the caged engine, like every statement of a stranger (the same guard, the
same functions, the same walls). What is added here is that it must be one expression over the rows
of one table:

* It must not leave its place. It is parsed twice, as `… WHERE (text)` and as the first of two
  arguments, `… WHERE coalesce(text, false)`. Both trees must be one plain SELECT from that one
  table with nothing but its WHERE, the second must have exactly two arguments, and both must hold
  the same expression: so the text is a whole expression by itself, not two halves of others.
* It sees one row: no subquery, no window, no star, no hidden column.
* It answers the same whenever it is asked, so that a retry of a delete removes what the first try
  would have removed: no random values; now() and its kin are a time that is given.
* It is true, false or null: an integer or a text that DuckDB would read as a truth is refused.

Null keeps the row, as SQL's DELETE does.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lakebus.errors import LakebusError, SqlError, StatementNotAllowed
from lakebus.schemas import TableSchema
from storage.engine.plans import PLAIN_SELECT, Parameters, QueryPlan, SourceTable
from storage.files.parquet import scan_expression
from storage.reading.query import Engine
from storage.turns import OURSELVES, Party

#: What the guard allows in queries and what answers differently each time. `error` is volatile to
#: DuckDB as well, and answers nothing.
VOLATILE_FUNCTIONS = frozenset({"random", "uuid", "uuidv4", "uuidv7", "gen_random_uuid"})
#: Words of SQL that need no parentheses and tell about the session, unless a column is named so.
_SESSION_WORDS = frozenset(
    {
        "current_catalog", "current_database", "current_role", "current_schema", "current_user",
        "session_user", "user",
    }
)  # fmt: skip
_REFUSED = {
    "SUBQUERY": "a subquery: a predicate sees the columns of one row, so select the values first "
    "and send them as parameters",
    "WINDOW": "a window function: a predicate sees one row",
    "STAR": "a star: name the columns",
    "POSITIONAL_REFERENCE": "a column by number: name it",
}
#: The parts of a SELECT that must be there, and what they are when nothing was said.
_PLAIN: Mapping[str, object] = {
    "modifiers": [],
    "cte_map": {"map": []},
    **PLAIN_SELECT,
}
_PLAIN_SOURCE: Mapping[str, object] = {
    "type": "BASE_TABLE",
    "alias": "",
    "sample": None,
    "column_name_alias": [],
    "at_clause": None,
}
_LOCATIONS = frozenset({"query_location", "query_location_length"})


@dataclass(frozen=True, slots=True)
class PredicateRequest:
    """`schema`: the table now. `now`: what now() answers. `timeout_ms` bounds the check."""

    schema: TableSchema
    where: str
    parameters: Parameters
    now: dt.datetime
    timeout_ms: int
    party: Party = OURSELVES


class Predicates(Protocol):
    """Whoever has the cage: this process, or another replica."""

    def check(self, request: PredicateRequest) -> Coroutine[Any, Any, None]:
        """Raises SqlError, StatementNotAllowed, MalformedRequest, QueryTimeout, Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class RowPredicate:
    """A predicate that stands in its place. `tree` is that of `SELECT 1 FROM table WHERE (text)`,
    for the pruner; `names` are the folded names that may mean columns."""

    where: str
    table: str
    tree: Mapping[str, Any]
    names: frozenset[str]

    def select(self, items: str) -> str:
        """`SELECT items FROM table WHERE (text)`; `items` are ours."""

        return _statement(items, self.table, f"(\n{self.where}\n)")


async def read_predicate(engine: Engine, schema: TableSchema, where: str) -> RowPredicate:
    """Raises SqlError (`position` counts in the predicate) and StatementNotAllowed."""

    plain, tree = await _where_of(engine, schema, where, "(\n", "\n)")
    alone, _ = await _where_of(engine, schema, where, "coalesce(\n", "\n, false)")
    arguments = alone.get("children", ())
    if (
        alone.get("type") != "OPERATOR_COALESCE"
        or len(arguments) != 2
        or _unplaced(arguments[0]) != _unplaced(plain)
    ):
        raise SqlError("the predicate must be one expression by itself, with its own parentheses")
    names = frozenset(_check_expression(plain))
    for word in _SESSION_WORDS & names - {column.name for column in schema.columns}:
        raise StatementNotAllowed(f"a predicate cannot use {word}", kind=word)
    return RowPredicate(where, schema.name, tree, names)


class PredicateChecker:
    """Checks predicates with the SQL engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def check(self, request: PredicateRequest) -> None:
        """Binds it against no rows: unknown columns, types and parameters fail here."""

        predicate = await read_predicate(self._engine, request.schema, request.where)
        await self._bind(request, predicate.select("1"))
        sql = f"SELECT (\n{request.where}\n) FROM {quoted(request.schema.name)}"
        columns = await self._bind(request, sql)
        if [column["type"] for column in columns] != ["boolean"]:
            found = columns[0]["type"] if columns else "nothing"
            raise SqlError(
                f"the predicate is of type {found}, not true or false: compare it with something"
            )

    async def _bind(self, request: PredicateRequest, sql: str) -> list[dict[str, str]]:
        schema = request.schema
        source = SourceTable(
            tuple((c.name, c.column_id, c.type) for c in schema.columns),
            scan_expression(schema, ()),
        )
        try:
            answer = await self._engine.execute(
                QueryPlan(
                    sql=sql,
                    sources={schema.name: source},
                    started_at=request.now,
                    query_id=uuid.uuid4().hex,
                    deadline_s=request.timeout_ms / 1000,
                    parameters=request.parameters,
                    party=request.party,
                )
            )
        except SqlError as error:
            raise moved(error, sql.index("(\n") + 2, request.where) from error
        try:
            async for _ in answer:
                pass
        finally:
            await answer.aclose()
        return answer.columns


def quoted(table: str) -> str:
    """A folded `table` or `namespace.table` as SQL."""

    return ".".join(f'"{part}"' for part in table.split("."))


def moved(error: LakebusError, shift: int, where: str) -> SqlError:
    """The error of a statement as one of the predicate in it: positions count in the predicate."""

    members = dict(error.members)
    position = members.pop("position", None)
    if isinstance(position, int) and 0 <= position - shift <= len(where):
        members["position"] = position - shift
    return SqlError(error.detail, **members)


def _statement(items: str, table: str, condition: str) -> str:
    return f"SELECT {items} FROM {quoted(table)} WHERE {condition}"


async def _where_of(
    engine: Engine, schema: TableSchema, where: str, before: str, behind: str
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(the WHERE, the whole tree) of a statement that has nothing else. Raises SqlError,
    StatementNotAllowed."""

    sql = _statement("1", schema.name, before + where + behind)
    try:
        parsed = await engine.parse(sql)
    except SqlError as error:
        raise moved(error, sql.index(before) + len(before), where) from error
    statements = parsed.tree.get("statements", ())
    if not statements:
        raise SqlError("the predicate nests too deeply; make it simpler")
    node = statements[0]["node"]
    source, items = node.get("from_table") or {}, node.get("select_list") or []
    known = {"type", "select_list", "from_table", "where_clause", *_PLAIN}
    plain = (
        parsed.kind == "select"
        and parsed.tables == (schema.name,)
        and len(statements) == 1
        and node.get("type") == "SELECT_NODE"
        and all(node.get(name) == value for name, value in _PLAIN.items())
        and all(source.get(name) == value for name, value in _PLAIN_SOURCE.items())
        and not any(value for name, value in node.items() if name not in known)
        and [item.get("class") for item in items] == ["CONSTANT"]
        and isinstance(node.get("where_clause"), dict)
    )
    if not plain:
        raise StatementNotAllowed(
            "the predicate must be what stands after WHERE, one condition and nothing else",
            kind="predicate",
        )
    return node["where_clause"], parsed.tree


def _check_expression(root: Mapping[str, Any]) -> Iterator[str]:
    """The names in it. Raises StatementNotAllowed, SqlError."""

    pending: list[Any] = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
            continue
        if not isinstance(node, dict):
            continue
        kind = str(node.get("class", ""))
        if kind in _REFUSED or str(node.get("type", "")).endswith("_NODE"):
            what = _REFUSED.get(kind, _REFUSED["SUBQUERY"])
            raise StatementNotAllowed(f"a predicate cannot have {what}", kind=kind.lower())
        if kind == "FUNCTION":
            _check_function(str(node.get("function_name", "")).lower())
        elif kind == "COLUMN_REF":
            for name in node.get("column_names", ()):
                if "$" in name:
                    raise SqlError(f"there is no column {name[:80]} that a predicate may use")
                yield str(name).lower()
        pending += node.values()


def _check_function(name: str) -> None:
    if name in VOLATILE_FUNCTIONS:
        raise StatementNotAllowed(
            f"a predicate cannot use {name}: it must answer the same each time it is asked",
            kind=name,
        )


def _unplaced(node: Any) -> Any:
    """A tree without where its parts stood in the text."""

    if isinstance(node, dict):
        return {name: _unplaced(part) for name, part in node.items() if name not in _LOCATIONS}
    if isinstance(node, list):
        return [_unplaced(part) for part in node]
    return node
