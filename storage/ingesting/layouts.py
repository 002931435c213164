"""How a table's files are to be cut, sorted and kept: `partition_by`, `sort_by`, `retention`.

Everything here names columns, so everything follows a rename and forbids the drop of its columns.

`sort_by` is a list of columns, or one entry `zorder(a, b, …)` of two to four columns or
`hilbert(a, b)`. `retention` is written ``{"rows": {"column": "ts", "for": "90 days"}}`` and stored
``{"rows": {"column": "ts", "for_s": 7776000}}``; both are taken, the second is what GET answers. A
row is kept while its column lies at most so long before now; a null is kept for ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lakebus.errors import SchemaChangeInvalid, SchemaInvalid
from lakebus.schemas import Column, fold_name
from storage.files.partitions import parse_partition_by, renamed_transform, transform_column
from storage.rows.types import NESTED, Family, parse_type

SORT_COLUMNS_MAX: Final = 16
CURVE_COLUMNS_MAX: Final = 4
#: A thousand years: what is longer says "for ever", and that is no retention.
RETENTION_S_MAX: Final = 1_000 * 366 * 86_400

_CURVE = re.compile(r"([A-Za-z]+) ?\((.*)\)", re.DOTALL)
_DURATION = re.compile(r"([0-9]{1,12}) ?(second|minute|hour|day|week)s?")
_UNIT_S: Final = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800}
_TIMES: Final = (Family.DATE, Family.TIMESTAMP, Family.TIMESTAMPTZ)
_UNSORTED: Final = NESTED | {Family.JSON}
_UNCURVED: Final = _UNSORTED | {Family.BLOB}
_DURATION_SHAPE: Final = '{"rows": {"column": "ts", "for": "90 days"}}'


@dataclass(frozen=True, slots=True)
class RowRetention:
    """Rows whose `column` lies more than `for_s` before now may be removed."""

    column: str
    for_s: int

    def stored(self) -> dict[str, object]:
        return {"rows": {"column": self.column, "for_s": self.for_s}}


@dataclass(frozen=True, slots=True)
class SortOrder:
    """`curve`: `zorder`, `hilbert`, or "" for one column after the other."""

    curve: str
    columns: tuple[str, ...]

    def stored(self) -> tuple[str, ...]:
        return (f"{self.curve}({', '.join(self.columns)})",) if self.curve else self.columns


def row_retention(stored: Mapping[str, object]) -> RowRetention | None:
    """The rule in a stored schema's `retention`, if there is one."""

    rows = stored.get("rows")
    if not isinstance(rows, Mapping):
        return None
    return RowRetention(str(rows["column"]), int(rows["for_s"]))


def checked_partition_by(texts: Sequence[str], columns: Sequence[Column]) -> tuple[str, ...]:
    """Canonical transforms. Raises SchemaInvalid."""

    return parse_partition_by(texts, columns).texts


def checked_sort_by(texts: Sequence[str], columns: Sequence[Column]) -> tuple[str, ...]:
    """Canonical entries. Raises SchemaInvalid."""

    order = parse_sort_by(texts)
    by_name = {column.name: column for column in columns}
    for name in order.columns:
        column = by_name.get(name)
        if column is None:
            raise SchemaInvalid(f"sort_by names {name}, which is no column of the table")
        kind = parse_type(column.type)
        if kind.family in (_UNCURVED if order.curve else _UNSORTED):
            raise SchemaInvalid(
                f"the column {name} has the type {kind.sql}, which has no order that "
                f"{order.curve or 'sort_by'} can use; leave it out"
            )
    return order.stored()


def parse_sort_by(texts: Sequence[str]) -> SortOrder:
    """The shape of `sort_by`, as written or as stored. Raises SchemaInvalid."""

    curves = [match for text in texts if (match := _CURVE.fullmatch(text.strip()))]
    if not curves:
        names = tuple(fold_name(text.strip()) for text in texts)
        if len(names) > SORT_COLUMNS_MAX:
            raise SchemaInvalid(f"sort_by takes at most {SORT_COLUMNS_MAX} columns")
        return SortOrder("", _distinct(names))
    if len(texts) > 1:
        raise SchemaInvalid("zorder(…) or hilbert(…) must be the only entry of sort_by")
    curve, inside = curves[0][1].lower(), curves[0][2]
    most = {"zorder": CURVE_COLUMNS_MAX, "hilbert": 2}.get(curve)
    if most is None:
        raise SchemaInvalid(
            f"{texts[0][:80]!r} is no sort order; use columns, zorder(a, b) or hilbert(a, b)"
        )
    names = _distinct(tuple(fold_name(name.strip()) for name in inside.split(",")))
    if not 2 <= len(names) <= most:
        count = "2" if most == 2 else f"2 to {most}"
        raise SchemaInvalid(f"{curve} takes {count} columns; for one column, name it in sort_by")
    return SortOrder(curve, names)


def checked_retention(
    given: Mapping[str, object] | None, columns: Sequence[Column]
) -> dict[str, object]:
    """The stored form; empty for none. Raises SchemaInvalid."""

    if not given:
        return {}
    rows = given.get("rows")
    if set(given) != {"rows"} or not (rows is None or isinstance(rows, Mapping)):
        raise SchemaInvalid(f"retention has one member, rows: {_DURATION_SHAPE}")
    if not rows:
        return {}
    if set(rows) not in ({"column", "for"}, {"column", "for_s"}):
        raise SchemaInvalid(f"retention of rows needs a column and a duration: {_DURATION_SHAPE}")
    if not isinstance(rows["column"], str):
        raise SchemaInvalid("the column of retention must be the name of a column")
    name = fold_name(rows["column"])
    column = next((column for column in columns if column.name == name), None)
    if column is None:
        raise SchemaInvalid(f"retention names {name}, which is no column of the table")
    if parse_type(column.type).family not in _TIMES:
        raise SchemaInvalid(
            f"the column {name} has the type {column.type}, and retention needs a date, timestamp "
            "or timestamptz"
        )
    for_s = _seconds(rows["for"]) if "for" in rows else rows["for_s"]
    if not isinstance(for_s, int) or isinstance(for_s, bool) or not 0 < for_s <= RETENTION_S_MAX:
        raise SchemaInvalid("the duration of retention must be positive and at most 1,000 years")
    return RowRetention(name, for_s).stored()


def _seconds(text: object) -> int:
    match = _DURATION.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    if match is None:
        raise SchemaInvalid(
            "the duration of retention must be a whole number and a unit: seconds, minutes, hours, "
            "days or weeks, like '90 days'"
        )
    return int(match[1]) * _UNIT_S[match[2]]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise SchemaInvalid(f"sort_by names {name} twice")
    return names


# --- changes of columns --------------------------------------------------------------------


def refuse_drops(
    dropped: Sequence[str],
    *,
    partition_by: Sequence[str],
    sort_by: Sequence[str],
    retention: Mapping[str, object],
) -> None:
    """Raises SchemaChangeInvalid when one of the columns is used."""

    rule = row_retention(retention)
    used = {
        "partition_by": {transform_column(text) for text in partition_by},
        "sort_by": set(parse_sort_by(sort_by).columns),
        "retention": set() if rule is None else {rule.column},
    }
    for name in dropped:
        for what, names in used.items():
            if name in names:
                raise SchemaChangeInvalid(
                    f"the column {name} is used by {what} and cannot be dropped; change {what} "
                    "in the same request"
                )


def renamed_partition_by(texts: Sequence[str], renames: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(renamed_transform(text, renames) for text in texts)


def renamed_sort_by(texts: Sequence[str], renames: Mapping[str, str]) -> tuple[str, ...]:
    order = parse_sort_by(texts)
    return SortOrder(order.curve, tuple(renames.get(n, n) for n in order.columns)).stored()


def renamed_retention(
    retention: Mapping[str, object], renames: Mapping[str, str]
) -> dict[str, object]:
    rule = row_retention(retention)
    if rule is None:
        return {}
    return RowRetention(renames.get(rule.column, rule.column), rule.for_s).stored()
