"""The first rows of a table by one column: which files can hold them, and which are read first.

`SELECT … FROM t ORDER BY ts DESC LIMIT 10` is what dashboards ask all day. DuckDB passes over what
comes behind the rows that it has found already, so it is quicker the earlier it meets the right
ones: files are read in the order of their bounds. And where the statement is nothing but this, the
bounds tell that most files need not be opened at all.

Why that is safe: a file is left out only when as many rows as are wanted certainly come before each
of its rows. With `ORDER BY … DESC LIMIT n`, files whose least values are at least T hold n rows or
more that are not null; a file whose greatest value is below T holds none of the first n, nor one
that is equal to the last of them, so the rest of the order cannot tell either. Nulls come last.
Bounds may be wider than the values; what makes no claim is read and counts for nothing. Whether a
row is among the first must not depend on other rows: so no condition, no grouping, no window,
and nothing in the select list but columns and constants. What is not understood reads every file.

Answers with `deterministic` are left alone: in them even rows that are equal in the order have one.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.engine.plans import PLAIN_SELECT, ParsedStatement
from storage.files.conditions import fold
from storage.rows.types import Family, parse_type


def _day(text: str) -> int:
    return dt.date.fromisoformat(text).toordinal()


#: Bounds as whole numbers in the order of the values, by the column's family.
_NUMBERS: Mapping[Family, Callable[[str], int]] = {
    Family.INTEGER: int,
    Family.TIMESTAMP: int,
    Family.TIMESTAMPTZ: int,
    Family.DATE: _day,
}
#: Parts of a SELECT, and what they are when nothing was said.
_PLAIN: Mapping[str, object] = {"where_clause": None, **PLAIN_SELECT}
_PLAIN_STAR: Mapping[str, object] = {"replace_list": [], "columns": False, "expr": None}
_KNOWN = frozenset({"type", "modifiers", "cte_map", "select_list", "from_table", *_PLAIN})
_NULLS_LAST = frozenset({"ORDER_DEFAULT", "NULLS LAST"})
_LIMIT_DIGITS_MAX = 9


@dataclass(frozen=True, slots=True)
class Leading:
    """The order in which a statement wants the rows of its table. `rows`: it wants so many of the
    first ones and nothing else; None when that is not certain."""

    column: Column
    descending: bool
    rows: int | None


def leading(parsed: ParsedStatement, schema: TableSchema) -> Leading | None:
    """Of a statement that reads one table; None when it has no such order."""

    if len(parsed.tables) != 1 or parsed.travels or parsed.described or parsed.listings:
        return None
    statements = parsed.tree.get("statements", ())
    node = statements[0].get("node") if len(statements) == 1 else None
    if not node or node.get("type") != "SELECT_NODE" or not _is_table(node.get("from_table") or {}):
        return None
    orders, limit = _modifiers(node.get("modifiers") or ())
    if not orders or limit is None or node.get("sample") is not None:
        return None
    if (node.get("cte_map") or {}).get("map"):
        return None
    first = orders[0]
    column = _column(first.get("expression") or {}, schema)
    if column is None or first.get("null_order") not in _NULLS_LAST:
        return None
    descending = first.get("type") == "DESCENDING"
    return Leading(column, descending, _rows(limit) if _is_plain(node, orders, column) else None)


@dataclass(frozen=True, slots=True)
class _Bounded:
    """A file whose rows, but for nulls, come at or behind `first` and at or before `last`."""

    first: int
    last: int
    rows: int
    file: DataFile


def arrange(files: Sequence[DataFile], wanted: Leading, *, pruning: bool) -> list[DataFile]:
    """The files that may hold the wanted rows, the most promising first; without `pruning` all."""

    bounded: list[_Bounded] = []
    others: list[DataFile] = []
    for file in files:
        found = _bounded(file, wanted)
        if found is None:
            others.append(file)
        else:
            bounded.append(found)
    if pruning and wanted.rows is not None:
        bounded = _needed(bounded, wanted.rows)
    bounded.sort(key=lambda one: one.first)
    return [*others, *(one.file for one in bounded)]


def _needed(bounded: list[_Bounded], rows: int) -> list[_Bounded]:
    """Those that begin no later than files end that hold so many rows together."""

    certain = 0
    for one in sorted(bounded, key=lambda one: one.last):
        certain += one.rows
        if certain >= rows:
            return [each for each in bounded if each.first <= one.last]
    return bounded


def _bounded(file: DataFile, wanted: Leading) -> _Bounded | None:
    """None where there is no claim."""

    found = file.statistics.get(wanted.column.column_id)
    if found is None or found.minimum is None or found.maximum is None:
        return None
    read = _NUMBERS[parse_type(wanted.column.type).family]
    try:
        least, greatest = read(found.minimum), read(found.maximum)
    except ValueError:  # bounds of another type, from before a widening
        return None
    if wanted.descending:
        least, greatest = -greatest, -least
    return _Bounded(least, greatest, file.rows - found.null_count, file)


# --- the statement -------------------------------------------------------------------------------


def _is_table(source: Mapping[str, Any]) -> bool:
    return (
        source.get("type") == "BASE_TABLE"
        and source.get("at_clause") is None
        and source.get("sample") is None
        and not source.get("column_name_alias")
    )


def _modifiers(
    modifiers: Sequence[Mapping[str, Any]],
) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
    """The order and the limit of a SELECT that has these two and nothing else."""

    if [one.get("type") for one in modifiers] != ["ORDER_MODIFIER", "LIMIT_MODIFIER"]:
        return (), None
    if modifiers[1].get("limit") is None:
        return (), None
    return modifiers[0].get("orders") or (), modifiers[1]


def _column(expression: Mapping[str, Any], schema: TableSchema) -> Column | None:
    """The table's column that an expression names, if its bounds are understood."""

    names: Sequence[str] = expression.get("column_names", [])
    if expression.get("class") != "COLUMN_REF" or len(names) != 1:
        return None
    name = fold(names[0])
    column = next((one for one in schema.columns if one.name == name), None)
    if column is None or parse_type(column.type).family not in _NUMBERS:
        return None
    return column


def _is_plain(node: Mapping[str, Any], orders: Sequence[Mapping[str, Any]], column: Column) -> bool:
    """Whether nothing but a row itself decides what becomes of it."""

    return (
        all(node.get(name) == value for name, value in _PLAIN.items())
        and not any(value for name, value in node.items() if name not in _KNOWN)
        and all(_is_of_a_row(item, column) for item in node.get("select_list") or ())
        and all((o.get("expression") or {}).get("class") == "COLUMN_REF" for o in orders)
    )


def _is_of_a_row(item: Mapping[str, Any], column: Column) -> bool:
    if fold(item.get("alias") or "") == column.name:
        return False  # the order may mean this one
    if item.get("class") == "STAR":
        renamed = item.get("rename_list")
        return not renamed and all(item.get(name) == value for name, value in _PLAIN_STAR.items())
    if item.get("class") == "COLUMN_REF":
        names = [str(name) for name in item.get("column_names") or ()]
        return len(names) < 2 or fold(names[-1]) != column.name  # a struct's field may be meant
    return item.get("class") == "CONSTANT"


def _rows(limit: Mapping[str, Any]) -> int | None:
    if limit.get("limit_type") != "ROW_COUNT":
        return None
    total = 0
    for part in (limit.get("limit"), limit.get("offset")):
        if part is None:
            continue
        literal = part.get("literal") or {}
        text = str(literal.get("text", ""))
        whole = part.get("class") == "CONSTANT" and literal.get("kind") == "INTEGER"
        if not whole or not text.isascii() or not text.isdigit() or len(text) > _LIMIT_DIGITS_MAX:
            return None
        total += int(text)
    return total
