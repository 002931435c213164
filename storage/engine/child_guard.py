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
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import msgspec

from storage.engine.caches import BoundedCache
from storage.engine.child_faults import (
    Refusal,
    character_position,
    failure_of,
    refuse_sql,
    refuse_statement,
)
from storage.engine.child_functions import CLOCK_FUNCTIONS, TABLE_FUNCTIONS, FunctionRules
from storage.engine.child_references import Reference, Rewriting, rewrite, tree_of_side
from storage.engine.child_relations import SYSTEM_SCHEMAS, Findings, Relations, fold
from storage.engine.child_sandbox import quote_text
from storage.engine.plans import INFORMATION_SCHEMA, LISTINGS, SHAPES, At, rows_at, side_name

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
#: Catalogs and schemas of ours, which only our own SQL names.
_OURS = re.compile(r"\$(s\d|fixed|lists)", re.IGNORECASE)
_EXPLAIN = re.compile(r"\s*explain\s+", re.IGNORECASE)
_EXPLAIN_OPTION = re.compile(r"(analyze|verbose)\b|\(\s*(analyze|format|verbose)\b", re.IGNORECASE)
_CACHE_BYTES = 16 << 20
_PIVOT_DETAIL = (
    "this form is not supported; write a plain SELECT (a PIVOT needs its values listed with IN)"
)
#: DuckDB bounds the nesting of expressions; a tree deeper than this is guarded but not handed on,
#: because whoever walks it in the parent would run out of stack.
_TREE_DEPTH_MAX = 400


@dataclass(frozen=True, slots=True)
class GuardedStatement:
    """What the guard found; the meaning of the fields is `plans.ParsedStatement`'s. `travels`: the
    AT, its tables, its tree. `rewriting`: what is run in place of `sql`."""

    sql: str
    kind: str
    tables: tuple[str, ...]
    parameters: tuple[str, ...]
    positional: bool
    reads_clock: bool
    tree: bytes
    described: tuple[str, ...] = ()
    listings: tuple[str, ...] = ()
    travels: tuple[tuple[At, tuple[str, ...], bytes], ...] = ()
    rewriting: Rewriting | None = None

    def references(self) -> list[tuple[str, str]]:
        """The key of every source that the statement needs, and its name."""

        needed = [(name, name) for name in self.tables]
        needed += ((side_name(SHAPES, name), name) for name in self.described)
        needed += ((side_name(LISTINGS, name), name) for name in self.listings)
        for number, (_, tables, _) in enumerate(self.travels):
            needed += ((side_name(rows_at(number), name), name) for name in tables)
        return needed


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
        self._large: BoundedCache[GuardedStatement] = BoundedCache(
            entries_max=cache_entries, bytes_max=_CACHE_BYTES
        )
        self._plain_show = _around(self._node("SHOW TABLES"))

    def check(self, sql: str) -> GuardedStatement:
        """Raises Refusal with what to change."""

        known = self._cache.get(sql)
        if known is not None:
            return known
        guarded = self._check(sql)
        trees = len(guarded.tree) + sum(len(tree) for _, _, tree in guarded.travels)
        self._cache.put(sql, guarded, trees + 2 * len(sql))
        if sql not in self._cache:
            # The text comes once more, to be run; its trees are not asked for then.
            self._large.put(sql, _without_trees(guarded), 4 * len(sql))
        return guarded

    def judge(self, sql: str) -> GuardedStatement:
        """`check`, but the trees may be missing."""

        return self._large.get(sql) or self.check(sql)

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
        is_show = self._is_plain_show(node)
        findings = Findings()
        walk = _Walk(self._rules, findings, sql, shift, is_show and kind == "select")
        walk.statement(node)
        if findings.references:
            findings.rewriting = rewrite(inner, sql[:shift], node, findings.references, self._node)
        if kind == "select" and findings.shown is not None and is_show:
            kind = findings.shown
        names = tuple(findings.parameters)
        positional = bool(names) and all(name.isdigit() for name in names)
        if positional:
            names = tuple(sorted(names, key=int))
        if both := sorted(findings.described.keys() & findings.tables.keys()):
            raise refuse_statement(
                f"a statement cannot read {both[0]} and describe it, too; ask "
                "information_schema.columns for its columns",
                "describe",
            )
        deep = walk.depth > _TREE_DEPTH_MAX
        travels = tuple(
            (at, tuple(tables), b"{}" if deep else tree_of_side(document, at))
            for at, tables in findings.travels.items()
        )
        if deep:
            tree = b"{}"
        elif travels:
            tree = tree_of_side(document, None)
        return GuardedStatement(
            sql,
            kind,
            tuple(findings.tables),
            names,
            positional,
            findings.reads_clock,
            tree,
            tuple(findings.described),
            tuple(findings.listings),
            travels,
            findings.rewriting,
        )

    def _is_plain_show(self, node: dict[str, Any]) -> bool:
        """Whether a SHOW, DESCRIBE or SUMMARIZE is the whole statement."""

        shown = (node.get("from_table") or {}).get("type") == "SHOW_REF"
        return shown and _around(node) == self._plain_show

    def _node(self, text: str) -> dict[str, Any]:
        """The tree of a text of ours."""

        tree = msgspec.json.decode(self._serialize(text, text, 0))
        node: dict[str, Any] = tree["statements"][0]["node"]
        return node

    def _split(self, sql: str) -> tuple[str, str, int]:
        """(kind, text of the SELECT, where that text begins in characters)."""

        statements = self._kinds(sql, sql, 0)
        if len(statements) != 1:
            raise refuse_sql(
                "the statement is empty; send one SELECT"
                if not statements
                else f"send one statement at a time; this text has {len(statements)}"
            )
        name = statements[0]
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
            if self._kinds(inner, sql, head.end()) != ["SELECT"]:
                raise refuse_statement("only a SELECT can be explained", "explain")
            return "explain", inner, head.end()
        if name == "MULTI":
            raise refuse_statement(_PIVOT_DETAIL, "pivot")
        raise refuse_statement(
            f"{_spoken(name)} statements are not allowed; only SELECT, DESCRIBE, SUMMARIZE and "
            "EXPLAIN of a SELECT are",
            name.lower(),
        )

    def _kinds(self, text: str, sql: str, shift: int) -> list[str]:
        """The kind of each statement in a part of `sql` that begins at `shift`."""

        try:
            return [statement.type.name for statement in self._connection.extract_statements(text)]
        except duckdb.Error as error:
            raise _as_refusal(error, text, shift) from error
        except UnicodeError as error:
            raise refuse_sql("the statement is not valid text") from error
        except ValueError as error:
            # Kinds that the parser has and Python's list of kinds has not.
            raise refuse_statement("this kind of statement is not allowed", "statement") from error

    def _serialize(self, text: str, sql: str, shift: int) -> bytes:
        try:
            # As a literal: a parameter makes DuckDB plan twice, which is a third of the time.
            row = self._connection.execute(
                f"SELECT json_serialize_sql({quote_text(text)})"
            ).fetchone()
        except duckdb.Error as error:
            raise _as_refusal(error, text, shift) from error
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


def _without_trees(guarded: GuardedStatement) -> GuardedStatement:
    travels = tuple((at, tables, b"{}") for at, tables, _ in guarded.travels)
    return replace(guarded, tree=b"{}", travels=travels)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _as_refusal(error: duckdb.Error, text: str, shift: int) -> Refusal:
    failure = failure_of(error, text, positions_hold=True)
    members = dict(failure.members)
    if isinstance(position := members.get("position"), int):
        members["position"] = position + shift
    return Refusal(failure.code, failure.detail, **members)


def _around(node: dict[str, Any]) -> dict[str, Any]:
    """A SELECT without its FROM and without places."""

    around = {key: value for key, value in node.items() if key != "from_table"}
    around["select_list"] = [
        {key: part for key, part in item.items() if not key.startswith("query_location")}
        for item in node.get("select_list", ())
    ]
    return around


class _Walk:
    """Visits every node of the tree once. `ctes` are the CTE names in scope at a node."""

    def __init__(
        self, rules: FunctionRules, findings: Findings, sql: str, shift: int, is_show: bool
    ) -> None:
        self._rules = rules
        self._findings = findings
        self._sql = sql
        self._shift = shift
        self._relations = Relations(rules, findings, self._position, is_show=is_show)
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
            name, value = fold(entry["key"]), entry["value"]
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
            ctes = ctes | {fold(node["cte_name"])}
        return ctes

    def _expression(self, node: dict[str, Any]) -> None:
        kind = node["class"]
        if kind not in _EXPRESSIONS:
            raise refuse_statement(f"{kind} expressions are not supported here", str(kind).lower())
        if kind in ("FUNCTION", "WINDOW"):
            self._function(node)
        elif kind == "COLUMN_REF":
            names = node.get("column_names") or []
            if len(names) == 1 and fold(names[0]) in CLOCK_FUNCTIONS:
                self._findings.reads_clock = True
            if len(names) > 1 and _OURS.match(str(names[0])):
                raise refuse_sql(f"there is no {str(names[0])[:80]} here", self._position(node))
            if len(names) > 2 and fold(names[0]) == INFORMATION_SCHEMA:
                self._findings.references.append(Reference(node, "", ()))
        elif kind == "PARAMETER":
            self._findings.parameters[str(node.get("identifier"))] = None

    def _function(self, node: dict[str, Any]) -> None:
        name = fold(node.get("function_name", ""))
        if name in CLOCK_FUNCTIONS:
            self._findings.reads_clock = True
        # A path in front is a column (`name.upper()`), unless it names a schema of DuckDB's, which
        # would step around the pinned clock.
        if any(fold(part) in SYSTEM_SCHEMAS or "$" in str(part) for part in _path(node)[:-1]):
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
            self._relations.show(node, ctes)
        elif kind == "BASE_TABLE":
            self._relations.table(node, ctes)

    def _table_function(self, call: dict[str, Any]) -> None:
        name = fold(call.get("function_name", ""))
        if call.get("class") != "FUNCTION" or call.get("schema") or call.get("catalog"):
            raise refuse_statement("this function cannot be read as a table", name or "function")
        if name not in TABLE_FUNCTIONS:
            raise refuse_statement(
                f"the function {name[:80]} cannot be read as a table; allowed are "
                + ", ".join(sorted(TABLE_FUNCTIONS)),
                name,
            )

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
