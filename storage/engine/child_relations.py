"""What a statement reads: tables, their columns, lists of tables, tables at other snapshots.

A part of the guard (child_guard): it judges the names that stand in FROM, and what SHOW, DESCRIBE
and SUMMARIZE are about. Every name is folded here and must be one that a table of the lake can
have; what the names mean is decided elsewhere, from the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lakebus.errors import SchemaInvalid
from lakebus.schemas import fold_name
from storage.engine.child_faults import refuse_sql, refuse_statement
from storage.engine.child_functions import FunctionRules
from storage.engine.child_references import (
    LISTS,
    TRAVELS_MAX,
    Reference,
    Rewriting,
    has_place,
    read_at,
    whole,
)
from storage.engine.plans import (
    INFORMATION_SCHEMA,
    LISTED,
    LISTINGS,
    SHAPES,
    SHOW_ALL_TABLES,
    SHOW_SCHEMAS,
    SHOW_TABLES,
    At,
    rows_at,
)

#: Schemas and catalogs of DuckDB itself; a namespace cannot have such a name.
SYSTEM_SCHEMAS = frozenset({"information_schema", "pg_catalog", "main", "temp", "system", "memory"})

_SHOWN = {"DESCRIBE": "describe", "SUMMARY": "summarize"}
#: Statements that are lists, by DuckDB's names for them.
_LISTS = {
    '"tables"': SHOW_TABLES,
    '"schemas"': SHOW_SCHEMAS,
    "__show_tables_expanded": SHOW_ALL_TABLES,
}
#: Names of WITH that are read: nothing that could be a file, a pattern or an address.
_CTE_NAME = re.compile(r"[^./\\\\:*?\[\]{}~$]*")
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


@dataclass(slots=True)
class Findings:
    """What the walk over one statement has found."""

    tables: dict[str, None] = field(default_factory=dict)
    described: dict[str, None] = field(default_factory=dict)
    listings: dict[str, None] = field(default_factory=dict)
    travels: dict[At, dict[str, None]] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    parameters: dict[str, None] = field(default_factory=dict)
    reads_clock: bool = False
    shown: str | None = None
    rewriting: Rewriting | None = None


def fold(text: object) -> str:
    """Folds as DuckDB does: ASCII only. str.lower would take U+212A (Kelvin) for a k."""

    return str(text).translate(_ASCII_LOWER)


class Relations:
    """For one statement. `is_show`: a SHOW, DESCRIBE or SUMMARIZE is all of it."""

    def __init__(
        self,
        rules: FunctionRules,
        findings: Findings,
        position: Callable[[dict[str, Any]], int | None],
        *,
        is_show: bool,
    ) -> None:
        self._rules = rules
        self._findings = findings
        self._position = position
        self._is_show = is_show
        self._judged: set[int] = set()

    def show(self, node: dict[str, Any], ctes: frozenset[str]) -> None:
        kind, query = str(node.get("show_type")), node.get("query")
        shown = _SHOWN.get(kind)
        if shown is None or not query:
            self._list(kind, node)
            return
        self._findings.shown = self._findings.shown or shown
        source = query.get("from_table") or {}
        if source.get("type") != "BASE_TABLE" or has_place(source):
            return
        # `DESCRIBE t`: DuckDB writes a SELECT around the name, whose parts stand nowhere.
        self._judged.add(id(source))
        path = _relation_path(source)
        if len(path) == 2 and fold(path[0]) == INFORMATION_SCHEMA and self._is_show:
            relation = self._listed(path)
            word = "DESCRIBE " if shown == "describe" else "SUMMARIZE "
            self._findings.rewriting = whole(word, LISTINGS, LISTS, relation)
        elif shown == "summarize" or (len(path) == 1 and fold(path[0]) in ctes):
            self._read(source, ctes)
        else:
            self._findings.described[self._table_name(path, source)] = None

    def _list(self, kind: str, node: dict[str, Any]) -> None:
        """SHOW TABLES and its kin, as whole statements."""

        path = _relation_path(node)
        if kind in ("SHOW", "SHOW_SPECIAL", "SHOW_FROM") and not self._is_show:
            raise refuse_statement(
                "SHOW is a statement of its own here; in a SELECT read information_schema.tables",
                "show",
            )
        if kind == "SHOW":
            self._findings.shown = "describe"
            self._judged.add(id((node.get("query") or {}).get("from_table")))
            name = self._table_name(path, node)
            self._findings.described[name] = None
            namespace, _, table = name.rpartition(".")
            self._findings.rewriting = whole("DESCRIBE ", SHAPES, namespace or "main", table)
            return
        if kind == "SHOW_SPECIAL" and len(path) == 1 and path[0] in _LISTS:
            listing = _LISTS[path[0]]
        elif kind == "SHOW_FROM" and len(path) == 2 and not path[1]:
            listing = f"{SHOW_TABLES}.{self._folded(path[:1])}"
        else:
            raise refuse_statement(
                "this SHOW is not allowed; SHOW TABLES, SHOW ALL TABLES, SHOW TABLES FROM a "
                "namespace, SHOW SCHEMAS and SHOW of a table are",
                "show",
            )
        self._findings.shown = "show"
        self._findings.listings[listing] = None
        self._findings.rewriting = whole("FROM ", LISTINGS, LISTS, listing)

    def table(self, node: dict[str, Any], ctes: frozenset[str]) -> None:
        if id(node) not in self._judged:
            self._read(node, ctes)

    def _read(self, node: dict[str, Any], ctes: frozenset[str]) -> None:
        path = _relation_path(node)
        at = None if node.get("at_clause") is None else read_at(node["at_clause"])
        if len(path) == 1 and fold(path[0]) in ctes:
            self._cte(path[0], at, node)
            return
        if len(path) == 2 and fold(path[0]) == INFORMATION_SCHEMA:
            relation = self._listed(path)
            if at is not None:
                raise refuse_statement(
                    "AT is for tables; read lists of other snapshots with the member snapshot", "at"
                )
            self._findings.references.append(Reference(node, LISTINGS, (LISTS, relation)))
            return
        name = self._table_name(path, node)
        if at is None:
            self._findings.tables[name] = None
            return
        travels = self._findings.travels
        travels.setdefault(at, {})[name] = None
        if len(travels) > TRAVELS_MAX:
            raise refuse_statement(
                f"a statement can read at most {TRAVELS_MAX} snapshots with AT", "at"
            )
        namespace, _, table = name.rpartition(".")
        side = rows_at(list(travels).index(at))
        self._findings.references.append(Reference(node, side, (namespace or "main", table)))

    def _cte(self, name: str, at: At | None, node: dict[str, Any]) -> None:
        if fold(name) in self._rules.internal_relations or not _CTE_NAME.fullmatch(name):
            # A name that this scope does not hold must not mean a file or a relation of DuckDB's.
            raise refuse_statement(f"choose another name than {name[:80]} in WITH", "with")
        if at is not None:
            raise refuse_sql(f"AT reads tables, and {name} is a name of WITH", self._position(node))

    def _listed(self, path: list[str]) -> str:
        relation = fold(path[1])
        if relation not in LISTED:
            raise refuse_statement(
                "of information_schema only tables, columns and schemata can be read",
                "system schema",
            )
        self._findings.listings[relation] = None
        return relation

    def _table_name(self, path: list[str], node: dict[str, Any]) -> str:
        """The folded name. Raises Refusal for what cannot be a table of the lake."""

        if not 1 <= len(path) <= 2 or node.get("catalog_name"):
            raise refuse_sql(
                f"{'.'.join(path)[:200]!r} is no table name; use table or namespace.table",
                self._position(node),
            )
        if len(path) == 2 and fold(path[0]) in SYSTEM_SCHEMAS:
            raise refuse_statement(f"the schema {path[0]} cannot be read", "system schema")
        return self._folded(path)

    def _folded(self, path: list[str]) -> str:
        try:
            return ".".join(fold_name(part) for part in path)
        except SchemaInvalid as error:
            raise refuse_statement(
                f"{'.'.join(path)[:200]!r} is no table name: files cannot be read, and names have "
                "letters, digits and underscores only",
                "table name",
            ) from error


def _relation_path(node: dict[str, Any]) -> list[str]:
    return [str(part) for part in (node.get("qualified_name") or {}).get("path", [])]
