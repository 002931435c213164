"""Which conditions of a query certainly apply to the rows of a table, for pruning (contract D11).

The input is DuckDB's own parse tree (`json_serialize_sql`) before binding. Rows of a table may be
left out when every occurrence of the table in the query would discard them anyway, so:

* Every mention of a table counts. The whole tree is searched for them; a mention that the analysis
  did not reach, that has `AT`, a sample, or renamed columns, or whose name is also the name of a
  CTE anywhere, makes the table unpruned. Several mentions are joined by OR.
* A condition counts for a mention only if it stands in the WHERE, or in an inner join's ON, of the
  SELECT whose FROM holds the mention, and no outer join between them pads the table's rows with
  nulls: then a row that fails it can reach nothing, whatever surrounds that SELECT.
* What a condition says about a table's rows, `storage.files.conditions` decides.

What pruning can change: SQL leaves open which of two ANDed conditions is evaluated first, so a
query whose other conditions fail on some rows (a cast of bad text) may fail or not, as it may with
DuckDB's own skipping of row groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from lakebus.schemas import TableSchema
from storage.files.conditions import Condition, Constants, Node, Parameters, Relation, fold
from storage.files.partition_pruning import Versions
from storage.files.predicates import Predicate, all_of, any_of, prune

__all__ = ["Predicate", "prune", "table_predicates"]

_PLAIN_JOINS: Final = frozenset({"REGULAR", "CROSS", "NATURAL"})


def table_predicates(
    tree: Node,
    parameters: Parameters,
    schemas: Mapping[str, TableSchema],
    versions: Mapping[str, Versions] | None = None,
) -> dict[str, Predicate | None]:
    """One predicate for each table of `schemas`, or None where every file must be read.

    `tree` is the whole document or any part of it; `parameters` as bound by the query: a sequence
    for `?`, a mapping for `$name`. `schemas` is keyed by folded `table` or `namespace.table`, each
    in the version that the query reads. Mentions with `AT` get no predicate here. `versions`, keyed
    alike, gives the schemas that older files were written with; without it, the partitions of files
    of other versions are not looked at.
    """

    selects, mentions, cte_names = _collect(tree)
    analysis = _Analysis(parameters, schemas, versions or {})
    for select in selects:
        analysis.read_select(select)
    found: dict[str, list[Predicate | None]] = {name: [] for name in schemas}
    for mention in mentions:
        path = _path(mention)
        first = True
        # A name that could mean several tables is a mention of each of them.
        for name in (".".join(path[start:]) for start in range(len(path))):
            if name in found:
                usable = first and not (len(path) == 1 and name in cte_names)
                found[name].append(analysis.predicates.get(id(mention)) if usable else None)
                first = False
    return {name: any_of(predicates) for name, predicates in found.items()}


def _collect(tree: Node) -> tuple[list[Node], list[Node], set[str]]:
    """Every SELECT node, every mention of a table, and the name of every CTE."""

    selects: list[Node] = []
    mentions: list[Node] = []
    cte_names: set[str] = set()
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            kind = node.get("type")
            if kind == "SELECT_NODE":
                selects.append(node)
            elif kind == "BASE_TABLE":
                mentions.append(node)
            if isinstance(node.get("cte_name"), str):
                cte_names.add(fold(node["cte_name"]))
            if isinstance(node.get("cte_map"), Mapping):
                cte_names.update(fold(entry["key"]) for entry in node["cte_map"].get("map", ()))
            pending.extend(value for value in node.values() if isinstance(value, Mapping | list))
        elif isinstance(node, list):
            pending.extend(node)
    return selects, mentions, cte_names


def _path(mention: Node) -> tuple[str, ...]:
    path = (mention.get("qualified_name") or {}).get("path") or [mention["table_name"]]
    return tuple(fold(part) for part in path)


class _Analysis:
    """The predicate of every mention that some SELECT's FROM reaches, by identity of its node."""

    def __init__(
        self,
        parameters: Parameters,
        schemas: Mapping[str, TableSchema],
        versions: Mapping[str, Versions],
    ) -> None:
        self._constants = Constants(parameters)
        self._schemas = schemas
        self._versions = versions
        self.predicates: dict[int, Predicate | None] = {}

    def read_select(self, select: Node) -> None:
        source = select.get("from_table")
        if not source or select.get("sample") is not None:
            return
        leaves = list(_leaves(source))
        aliases = Counter(_alias(leaf) for leaf in leaves)
        unclear = _unclear_names(select, source)
        where = select.get("where_clause")
        self._read_source(source, (where,) if where else (), aliases, unclear)

    def _read_source(
        self,
        source: Node,
        conditions: tuple[Node, ...],
        aliases: Mapping[str, int],
        unclear: frozenset[str] | None,
    ) -> None:
        if source.get("sample") is not None:
            return
        if source["type"] == "JOIN":
            for side, applied in _sides(source, conditions):
                self._read_source(side, applied, aliases, unclear)
        elif source["type"] == "BASE_TABLE":
            relation = self._relation(source, aliases, unclear)
            if relation is not None:
                condition = Condition(relation, self._constants)
                self.predicates[id(source)] = all_of(condition.read(c, 0) for c in conditions)

    def _relation(
        self, mention: Node, aliases: Mapping[str, int], unclear: frozenset[str] | None
    ) -> Relation | None:
        if mention.get("at_clause") is not None or mention.get("column_name_alias"):
            return None
        path = _path(mention)
        names = (".".join(path[start:]) for start in range(len(path)))
        name = next((name for name in names if name in self._schemas), None)
        if name is None:
            return None
        schema = self._schemas[name]
        alias = _alias(mention)
        qualifiers: frozenset[tuple[str, ...]] = frozenset()
        if aliases[alias] == 1:
            qualifiers = frozenset({(alias,)})
            if not mention.get("alias"):
                qualifiers = frozenset(path[start:] for start in range(len(path)))
        return Relation(schema, qualifiers, unclear, self._versions.get(name, _only(schema)))


def _only(schema: TableSchema) -> Versions:
    return lambda version: schema if version == schema.version else None


def _leaves(source: Node) -> Iterator[Node]:
    if source["type"] == "JOIN":
        yield from _leaves(source["left"])
        yield from _leaves(source["right"])
    else:
        yield source


def _alias(leaf: Node) -> str:
    return fold(leaf.get("alias") or leaf.get("table_name") or "")


def _unclear_names(select: Node, source: Node) -> frozenset[str] | None:
    """Bare names that may not mean a table's column: merged by USING, or aliases of the SELECT
    list. None: all of them, because of a NATURAL join."""

    unclear = {fold(item["alias"]) for item in select.get("select_list", ()) if item.get("alias")}
    pending = [source]
    while pending:
        node = pending.pop()
        if node["type"] == "JOIN":
            if node.get("ref_type") == "NATURAL":
                return None
            unclear.update(fold(name) for name in node.get("using_columns") or ())
            pending += (node["left"], node["right"])
    return frozenset(unclear)


def _sides(join: Node, conditions: tuple[Node, ...]) -> list[tuple[Node, tuple[Node, ...]]]:
    """Both sides of a join with the conditions that every row of each side must meet to matter."""

    left, right = join["left"], join["right"]
    on = (join["condition"],) if join.get("condition") else ()
    if join.get("ref_type") not in _PLAIN_JOINS or join.get("ranking_expression") is not None:
        return [(left, ()), (right, ())]  # positional, as-of and nearest joins count neighbours
    match join.get("join_type"):
        case "INNER":
            return [(left, conditions + on), (right, conditions + on)]
        case "LEFT":
            return [(left, conditions), (right, on)]
        case "RIGHT":
            return [(left, on), (right, conditions)]
        case "SEMI":
            return [(left, conditions + on), (right, on)]
        case "ANTI":
            return [(left, conditions), (right, on)]
        case _:
            return [(left, ()), (right, ())]
