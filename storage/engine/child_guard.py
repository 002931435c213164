"""The guard: decides on the parse tree, before binding, what a stranger's statement may do.

Everything is an allow-list: one statement, of kind SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE of
one); known node kinds; allowed functions; tables by plain names. A node of a kind the guard does
not know refuses the statement, so a new grammar cannot slip through. The tree is DuckDB's own
`json_serialize_sql`, made by the parser that will run the text, so both see the same statement.

The guard is the first wall. The second: every query sees a catalog that holds nothing but its own
views (child_scopes). The third: the locked DuckDB (child_sandbox).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import duckdb
import msgspec

from lakebus.errors import SchemaInvalid
from lakebus.schemas import fold_name
from storage.engine.caches import BoundedCache
from storage.engine.child_faults import (
    Refusal,
    character_position,
    failure_of,
    refuse_sql,
    refuse_statement,
)
from storage.engine.child_functions import CLOCK_FUNCTIONS, TABLE_FUNCTIONS, FunctionRules

#: Schemas and catalogs of DuckDB itself; a namespace cannot have such a name.
SYSTEM_SCHEMAS = frozenset({"information_schema", "pg_catalog", "main", "temp", "system", "memory"})

_EXPRESSIONS = frozenset(
    {
        "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION",
        "CONSTANT", "FUNCTION", "LAMBDA", "LAMBDA_REF", "OPERATOR", "PARAMETER",
        "POSITIONAL_REFERENCE", "STAR", "SUBQUERY", "TYPE", "WINDOW",
    }
)  # fmt: skip
_RELATIONS = frozenset(
    {
        "BASE_TABLE", "EMPTY", "EXPRESSION_LIST", "JOIN", "PIVOT", "SHOW_REF", "SUBQUERY",
        "TABLE_FUNCTION",
    }
)  # fmt: skip
_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_SHOWN = {"DESCRIBE": "describe", "SUMMARY": "summarize"}
_EXPLAIN = re.compile(r"\s*explain\s+", re.IGNORECASE)
_EXPLAIN_OPTION = re.compile(r"(analyze|verbose)\b|\(\s*(analyze|format|verbose)\b", re.IGNORECASE)
_CACHE_BYTES = 16 << 20
_PIVOT_DETAIL = (
    "this form is not supported; write a plain SELECT (a PIVOT needs its values listed with IN)"
)
#: DuckDB bounds the nesting of expressions; a tree deeper than this is guarded but not handed on,
#: because whoever walks it in the parent would run out of stack.
_TREE_DEPTH_MAX = 400
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


@dataclass(frozen=True, slots=True)
class GuardedStatement:
    """What the guard found; the meaning of the fields is `plans.ParsedStatement`'s."""

    sql: str
    kind: str
    tables: tuple[str, ...]
    parameters: tuple[str, ...]
    positional: bool
    reads_clock: bool
    tree: bytes


@dataclass(slots=True)
class _Findings:
    tables: dict[str, None] = field(default_factory=dict)
    parameters: dict[str, None] = field(default_factory=dict)
    reads_clock: bool = False
    shown: str | None = None


class Guard:
    """Checks statements; answers are kept by text. Not for use by several threads at once."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        rules: FunctionRules,
        *,
        sql_bytes_max: int,
        cache_entries: int,
    ) -> None:
        self._connection = connection
        self._rules = rules
        self._sql_bytes_max = sql_bytes_max
        self._cache: BoundedCache[GuardedStatement] = BoundedCache(
            entries_max=cache_entries, bytes_max=_CACHE_BYTES
        )

    def check(self, sql: str) -> GuardedStatement:
        """Raises Refusal with what to change."""

        known = self._cache.get(sql)
        if known is not None:
            return known
        guarded = self._check(sql)
        self._cache.put(sql, guarded, len(guarded.tree) + 2 * len(sql))
        return guarded

    def _check(self, sql: str) -> GuardedStatement:
        if len(sql.encode()) > self._sql_bytes_max:
            raise refuse_sql(
                f"the statement is longer than {self._sql_bytes_max} bytes; pass long lists as a "
                "parameter or store them in a table"
            )
        if "\0" in sql:
            raise refuse_sql("the statement holds a NUL character; remove it", sql.index("\0"))
        kind, inner, shift = self._split(sql)
        tree = self._serialize(inner, sql, shift)
        document = msgspec.json.decode(tree)
        node = document["statements"][0]["node"]
        findings = _Findings()
        walk = _Walk(self._rules, findings, sql, shift)
        walk.statement(node)
        if walk.depth > _TREE_DEPTH_MAX:
            tree = b"{}"
        if kind == "select" and findings.shown is not None and _is_plain_show(node):
            kind = findings.shown
        names = tuple(findings.parameters)
        positional = bool(names) and all(name.isdigit() for name in names)
        if positional:
            names = tuple(sorted(names, key=int))
        return GuardedStatement(
            sql, kind, tuple(findings.tables), names, positional, findings.reads_clock, tree
        )

    def _split(self, sql: str) -> tuple[str, str, int]:
        """(kind, text of the SELECT, where that text begins in characters)."""

        try:
            statements = self._connection.extract_statements(sql)
        except duckdb.Error as error:
            raise _as_refusal(error, sql) from error
        except UnicodeError as error:
            raise refuse_sql("the statement is not valid text") from error
        if len(statements) != 1:
            raise refuse_sql(
                "the statement is empty; send one SELECT"
                if not statements
                else f"send one statement at a time; this text has {len(statements)}"
            )
        name = statements[0].type.name
        if name == "SELECT":
            return "select", sql, 0
        if name == "EXPLAIN":
            head = _EXPLAIN.match(sql)
            if head is None or _EXPLAIN_OPTION.match(sql, head.end()):
                raise refuse_statement(
                    "EXPLAIN takes no options here and must be the first word; write "
                    "EXPLAIN SELECT …",
                    "explain",
                )
            inner = sql[head.end() :]
            again = self._connection.extract_statements(inner)
            if len(again) != 1 or again[0].type.name != "SELECT":
                raise refuse_statement("only a SELECT can be explained", "explain")
            return "explain", inner, head.end()
        if name == "MULTI":
            raise refuse_statement(_PIVOT_DETAIL, "pivot")
        raise refuse_statement(
            f"{_spoken(name)} statements are not allowed; only SELECT, DESCRIBE, SUMMARIZE and "
            "EXPLAIN of a SELECT are",
            name.lower(),
        )

    def _serialize(self, text: str, sql: str, shift: int) -> bytes:
        try:
            row = self._connection.execute(
                "SELECT json_serialize_sql(CAST(? AS VARCHAR))", [text]
            ).fetchone()
        except duckdb.Error as error:
            raise _as_refusal(error, sql) from error
        tree = (row[0] if row else "{}").encode()
        document = msgspec.json.decode(tree)
        if document.get("error"):
            found = str(document.get("position", ""))
            position = character_position(text, int(found)) if found.isdigit() else None
            detail = str(document.get("error_message", "the statement cannot be read"))
            if "Only SELECT" in detail:
                raise refuse_statement(_PIVOT_DETAIL, "pivot")
            raise refuse_sql(detail, None if position is None else position + shift)
        if len(document["statements"]) != 1:
            raise refuse_sql("send one statement at a time")
        return bytes(tree)


def _lower(text: object) -> str:
    """Folds as DuckDB does: ASCII only. str.lower would take U+212A (Kelvin) for a k."""

    return str(text).translate(_ASCII_LOWER)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _as_refusal(error: duckdb.Error, sql: str) -> Refusal:
    failure = failure_of(error, sql, positions_hold=True)
    return Refusal(failure.code, failure.detail, **failure.members)


def _is_plain_show(node: dict[str, Any]) -> bool:
    return (node.get("from_table") or {}).get("type") == "SHOW_REF"


class _Walk:
    """Visits every node of the tree once. `ctes` are the CTE names in scope at a node."""

    def __init__(self, rules: FunctionRules, findings: _Findings, sql: str, shift: int) -> None:
        self._rules = rules
        self._findings = findings
        self._sql = sql
        self._shift = shift
        self.depth = 0

    def statement(self, node: dict[str, Any]) -> None:
        self._visit(node, frozenset(), 0)

    def _visit(self, value: Any, ctes: frozenset[str], depth: int) -> None:
        self.depth = max(self.depth, depth)
        if isinstance(value, list):
            for item in value:
                self._visit(item, ctes, depth + 1)
            return
        if not isinstance(value, dict):
            return
        if "cte_map" in value:
            ctes = self._query_node(value, ctes, depth)
        elif "class" in value:
            self._expression(value)
        elif "sample" in value and "type" in value:
            self._relation(value, ctes)
        elif str(value.get("type", "")).endswith("_NODE"):
            raise refuse_statement("this statement is not supported here", "node")
        for child in _children(value):
            self._visit(child, ctes, depth + 1)

    def _query_node(self, node: dict[str, Any], ctes: frozenset[str], depth: int) -> frozenset[str]:
        """Visits the node's CTEs, each with the names before it; gives the names in scope."""

        kind = node.get("type")
        if kind not in _NODES:
            raise refuse_statement(f"{kind} is not supported here", str(kind).lower())
        for entry in node["cte_map"]["map"]:
            name, value = _lower(entry["key"]), entry["value"]
            body = value.get("query_node") or (value.get("query") or {}).get("node")
            if not isinstance(body, dict):
                raise refuse_statement("this form of WITH is not supported", "with")
            inside = ctes | {name} if body.get("type") == "RECURSIVE_CTE_NODE" else ctes
            self._visit(body, inside, depth + 1)
            for key, part in value.items():
                if key not in ("query_node", "query"):
                    self._visit(part, inside, depth + 1)
            ctes = ctes | {name}
        if kind in ("RECURSIVE_CTE_NODE", "CTE_NODE") and node.get("cte_name"):
            ctes = ctes | {_lower(node["cte_name"])}
        return ctes

    def _expression(self, node: dict[str, Any]) -> None:
        kind = node["class"]
        if kind not in _EXPRESSIONS:
            raise refuse_statement(f"{kind} expressions are not supported here", str(kind).lower())
        if kind in ("FUNCTION", "WINDOW"):
            self._function(node)
        elif kind == "COLUMN_REF":
            names = node.get("column_names") or []
            if len(names) == 1 and _lower(names[0]) in CLOCK_FUNCTIONS:
                self._findings.reads_clock = True
        elif kind == "PARAMETER":
            self._findings.parameters[str(node.get("identifier"))] = None

    def _function(self, node: dict[str, Any]) -> None:
        name = _lower(node.get("function_name", ""))
        if name in CLOCK_FUNCTIONS:
            self._findings.reads_clock = True
        # A path in front is a column (`name.upper()`), unless it names a schema of DuckDB's, which
        # would step around the pinned clock.
        if any(_lower(part) in SYSTEM_SCHEMAS or "$" in str(part) for part in _path(node)[:-1]):
            raise refuse_statement(f"call {name} by its plain name, without a schema", name)
        if name in self._rules.allowed:
            return
        if name in self._rules.known:
            raise refuse_statement(f"the function {name} is not allowed", name)
        raise refuse_sql(f"there is no function {name[:80]}", self._position(node))

    def _relation(self, node: dict[str, Any], ctes: frozenset[str]) -> None:
        kind = node["type"]
        if kind not in _RELATIONS:
            raise refuse_statement(f"{kind} in FROM is not supported here", str(kind).lower())
        if kind == "TABLE_FUNCTION":
            self._table_function(node.get("function") or {})
        elif kind == "SHOW_REF":
            self._show(node)
        elif kind == "BASE_TABLE":
            self._table(node, ctes)

    def _table_function(self, call: dict[str, Any]) -> None:
        name = _lower(call.get("function_name", ""))
        if call.get("class") != "FUNCTION" or call.get("schema") or call.get("catalog"):
            raise refuse_statement("this function cannot be read as a table", name or "function")
        if name not in TABLE_FUNCTIONS:
            raise refuse_statement(
                f"the function {name[:80]} cannot be read as a table; allowed are "
                + ", ".join(sorted(TABLE_FUNCTIONS)),
                name,
            )

    def _show(self, node: dict[str, Any]) -> None:
        shown = _SHOWN.get(str(node.get("show_type")))
        if shown is None or not node.get("query"):
            raise refuse_statement(
                "SHOW is not supported yet; list tables with the tables route", "show"
            )
        self._findings.shown = self._findings.shown or shown

    def _table(self, node: dict[str, Any], ctes: frozenset[str]) -> None:
        path = [str(part) for part in (node.get("qualified_name") or {}).get("path", [])]
        if node.get("at_clause") is not None:
            raise refuse_statement("AT is not supported yet", "at")
        name = ".".join(path)
        if len(path) == 1 and _lower(path[0]) in ctes:
            if _lower(path[0]) in self._rules.internal_relations:
                raise refuse_statement(f"choose another name than {name} in WITH", "with")
            return
        if not 1 <= len(path) <= 2 or node.get("catalog_name"):
            raise refuse_sql(
                f"{name[:200]!r} is no table name; use table or namespace.table",
                self._position(node),
            )
        if len(path) == 2 and _lower(path[0]) in SYSTEM_SCHEMAS:
            raise refuse_statement(f"the schema {path[0]} cannot be read", "system schema")
        try:
            folded = ".".join(fold_name(part) for part in path)
        except SchemaInvalid as error:
            raise refuse_statement(
                f"{name[:200]!r} is no table name: files cannot be read, and names have letters, "
                "digits and underscores only",
                "table name",
            ) from error
        self._findings.tables[folded] = None

    def _position(self, node: dict[str, Any]) -> int | None:
        offset = node.get("query_location")
        if not isinstance(offset, int):
            return None
        position = character_position(self._sql[self._shift :], offset)
        return None if position is None else position + self._shift


def _path(node: dict[str, Any]) -> list[Any]:
    found = list((node.get("qualified_name") or {}).get("path", []))
    return found or [node.get("catalog"), node.get("schema"), node.get("function_name")]


def _children(node: dict[str, Any]) -> Iterator[Any]:
    for key, child in node.items():
        if key == "cte_map" or not isinstance(child, dict | list):
            continue
        if isinstance(child, dict) and key == "function" and node.get("type") == "TABLE_FUNCTION":
            # The call itself was judged as a table function; only its arguments go on.
            yield from (part for name, part in child.items() if name != "class")
            continue
        yield child
