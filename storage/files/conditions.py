"""One condition of a query, read as a predicate on one mention of a table (contract D11).

Only plain columns, resolved without doubt, beside constants whose comparison is certain
(`storage.files.constants`); everything else gives None, "nothing certain about the rows". Of an AND
what is not understood is dropped, an OR is dropped whole, and NOT is read only before a test for
null and before a boolean column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lakebus.errors import SchemaInvalid
from lakebus.schemas import Column, TableSchema
from storage.files.constants import Interval, Number, Typed, interval_of
from storage.files.partition_pruning import Versions, may_equal_one_of
from storage.files.predicates import (
    Predicate,
    all_of,
    any_of,
    equal_to_one_of,
    in_partition,
    is_not_null,
    is_null,
    starts_with,
    within,
)
from storage.rows.types import ColumnType, Family, parse_type

#: A node of DuckDB's parse tree.
Node = Mapping[str, Any]
#: Bound values: a sequence for `?`, a mapping for `$name`.
Parameters = Sequence[object] | Mapping[str, object] | None

_ASCII_LOWER: Final = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
#: Deeper conditions are not looked into; they come from programs, and recursion is bounded.
_DEPTH_MAX: Final = 100
_FLIPPED: Final = {
    "COMPARE_EQUAL": "COMPARE_EQUAL",
    "COMPARE_NOT_DISTINCT_FROM": "COMPARE_NOT_DISTINCT_FROM",
    "COMPARE_LESSTHAN": "COMPARE_GREATERTHAN",
    "COMPARE_LESSTHANOREQUALTO": "COMPARE_GREATERTHANOREQUALTO",
    "COMPARE_GREATERTHAN": "COMPARE_LESSTHAN",
    "COMPARE_GREATERTHANOREQUALTO": "COMPARE_LESSTHANOREQUALTO",
}
_PREFIX_FUNCTIONS: Final = frozenset({"^@", "starts_with", "prefix"})


def fold(name: str) -> str:
    """Names compare as DuckDB compares them: without ASCII case."""

    return name.translate(_ASCII_LOWER)


@dataclass(frozen=True, slots=True)
class Relation:
    """One mention of a table: how columns may be qualified, and which bare names are its own.
    `versions`: the table's schema as older files were written with it."""

    schema: TableSchema
    qualifiers: frozenset[tuple[str, ...]]
    unclear_names: frozenset[str] | None
    versions: Versions

    def column(self, reference: Node) -> tuple[Column, ColumnType] | None:
        """The column that a COLUMN_REF certainly means, if it is one of this relation."""

        if reference.get("class") != "COLUMN_REF":
            return None
        *qualifier, name = (fold(part) for part in reference["column_names"])
        if qualifier:
            if tuple(qualifier) not in self.qualifiers:
                return None
        elif self.unclear_names is None or name in self.unclear_names:
            return None
        column = self.schema.column(name)
        return None if column is None else (column, parse_type(column.type))


class Constants:
    """Values of constant expressions: literals, typed literals and parameters."""

    def __init__(self, parameters: Parameters) -> None:
        self._by_name: dict[str, object] = {}
        if isinstance(parameters, Mapping):
            self._by_name = {fold(str(name)): value for name, value in parameters.items()}
        elif parameters is not None:
            self._by_name = {str(i): value for i, value in enumerate(parameters, start=1)}

    def value(self, node: Node) -> object | None:
        """What `interval_of` takes, or None: a null, or not a constant that is understood."""

        match node.get("class"):
            case "CONSTANT":
                return _literal(node.get("literal") or {})
            case "PARAMETER":
                return self._by_name.get(fold(str(node.get("identifier"))))
            case "CAST":
                return self._typed(node)
            case _:
                return None

    def _typed(self, node: Node) -> Typed | None:
        text = None
        if node["child"].get("class") in ("CONSTANT", "PARAMETER"):
            text = self.value(node["child"])
        target = node.get("type_expr") or {}
        if not isinstance(text, str) or target.get("class") != "TYPE" or target.get("children"):
            return None
        if len(target.get("qualified_name", {}).get("path", ())) != 1:
            return None
        try:
            return Typed(parse_type(target["type_name"]).sql, text)
        except SchemaInvalid:
            return None


def _literal(literal: Node) -> object | None:
    match literal.get("kind"):
        case "INTEGER" | "NUMERIC":
            return Number(literal["text"])
        case "STRING":
            return str(literal.get("text", ""))
        case "BOOLEAN":
            return literal.get("text") == "true"
        case _:
            return None


class Condition:
    """Reads an expression as a predicate on one relation; None: nothing certain about its rows."""

    def __init__(self, relation: Relation, constants: Constants) -> None:
        self._relation = relation
        self._constants = constants

    def read(self, node: Node, depth: int) -> Predicate | None:
        if depth > _DEPTH_MAX:
            return None
        match node.get("class"):
            case "CONJUNCTION":
                parts = [self.read(child, depth + 1) for child in node["children"]]
                if node["type"] == "CONJUNCTION_AND":
                    return all_of(parts)
                return any_of(parts) if node["type"] == "CONJUNCTION_OR" else None
            case "COMPARISON":
                return self._comparison(node)
            case "BETWEEN":
                return self._between(node)
            case "OPERATOR":
                return self._operator(node)
            case "COLUMN_REF":
                return self._boolean(node, wanted=True)
            case "FUNCTION":
                return self._prefix(node)
            case _:
                return None

    def _intervals(self, kind: ColumnType, nodes: Sequence[Node]) -> list[Interval] | None:
        """The constants beside a column, if all are understood and compare in the same manner."""

        found: list[Interval] = []
        for node in nodes:
            value = self._constants.value(node)
            interval = None if value is None else interval_of(kind, value)
            if interval is None or (found and interval.manner is not found[0].manner):
                return None
            found.append(interval)
        return found

    def _comparison(self, node: Node) -> Predicate | None:
        operator, left, right = node["type"], node["left"], node["right"]
        if operator not in _FLIPPED:
            return None
        if left.get("class") != "COLUMN_REF":
            operator, left, right = _FLIPPED[operator], right, left
        found = self._relation.column(left)
        intervals = found and self._intervals(found[1], [right])
        if not found or not intervals:
            return None
        column_id, kind, constant = found[0].column_id, found[1], intervals[0]
        match operator:
            case "COMPARE_EQUAL" | "COMPARE_NOT_DISTINCT_FROM":
                bounded = within(column_id, kind, least=constant, most=constant)
                return self._placed(column_id, intervals, bounded)
            case "COMPARE_LESSTHAN":
                return within(column_id, kind, most=constant, strict=True)
            case "COMPARE_LESSTHANOREQUALTO":
                return within(column_id, kind, most=constant)
            case "COMPARE_GREATERTHAN":
                return within(column_id, kind, least=constant, strict=True)
            case _:
                return within(column_id, kind, least=constant)

    def _placed(
        self, column_id: int, constants: Sequence[Interval], bounded: Predicate
    ) -> Predicate:
        """`bounded`, and the partition of a file must be that of one of the constants."""

        may_hold = may_equal_one_of(column_id, constants, self._relation.versions)
        return bounded if may_hold is None else in_partition(may_hold, bounded)

    def _between(self, node: Node) -> Predicate | None:
        found = self._relation.column(node["input"])
        if found is None or node["type"] != "COMPARE_BETWEEN":
            return None
        bounds = self._intervals(found[1], [node["lower"], node["upper"]])
        if not bounds:
            return None
        return within(found[0].column_id, found[1], least=bounds[0], most=bounds[1])

    def _operator(self, node: Node) -> Predicate | None:
        first = node["children"][0]
        found = self._relation.column(first)
        match node["type"]:
            case "OPERATOR_IS_NULL":
                return is_null(found[0].column_id) if found else None
            case "OPERATOR_IS_NOT_NULL":
                return is_not_null(found[0].column_id) if found else None
            case "COMPARE_IN" if found:
                values = self._intervals(found[1], node["children"][1:])
                if not values:
                    return None
                bounded = equal_to_one_of(found[0].column_id, found[1], values)
                return self._placed(found[0].column_id, values, bounded)
            case "OPERATOR_NOT":
                return self._negation(first)
            case _:
                return None

    def _negation(self, node: Node) -> Predicate | None:
        if node.get("class") == "OPERATOR" and node["type"] == "OPERATOR_IS_NULL":
            return self._operator({**node, "type": "OPERATOR_IS_NOT_NULL"})
        if node.get("class") == "OPERATOR" and node["type"] == "OPERATOR_IS_NOT_NULL":
            return self._operator({**node, "type": "OPERATOR_IS_NULL"})
        return self._boolean(node, wanted=False)

    def _boolean(self, node: Node, *, wanted: bool) -> Predicate | None:
        found = self._relation.column(node)
        constant = found and interval_of(found[1], wanted)
        if not found or found[1].family is not Family.BOOLEAN or constant is None:
            return None
        return within(found[0].column_id, found[1], least=constant, most=constant)

    def _prefix(self, node: Node) -> Predicate | None:
        name = node["function_name"]
        arguments = [argument.get("expression") or {} for argument in node.get("arguments", ())]
        if len(arguments) != 2 or (name != "~~" and name not in _PREFIX_FUNCTIONS):
            return None
        found = self._relation.column(arguments[0])
        text = self._constants.value(arguments[1])
        if found is None or found[1].family is not Family.VARCHAR or not isinstance(text, str):
            return None
        if name == "~~":  # LIKE: what stands before the first wildcard; no escape character
            text = text.partition("%")[0].partition("_")[0]
        interval = interval_of(found[1], text)
        return None if interval is None else starts_with(found[0].column_id, interval.lower)
