"""The order of a rewrite's rows, as SQL terms for DuckDB.

An entry of `sort_by` is a column's name, or once a curve over several columns: `zorder(a, b, …)`
or `hilbert(a, b)`. For a curve each value becomes the number of its bucket, one of 255 with about
equally many rows (quantiles of a sample), nulls last, so that columns of any type and any skew
weigh the same. Bounds of the buckets stay inside DuckDB (its variables), because not every value
survives the way through Python. Which bucket a row falls into decides only where it lies.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import duckdb

from lakebus.errors import SchemaInvalid
from lakebus.schemas import HIDDEN_COLUMNS, TableSchema

CURVE_BITS: Final = 8
_NULLS: Final = (1 << CURVE_BITS) - 1
_SAMPLE_ROWS = 65_536
_CURVE = re.compile(r"(zorder|hilbert)\( ?([a-z0-9_]+(?: ?, ?[a-z0-9_]+)*) ?\)")
_CURVE_COLUMNS: Final = {"zorder": (2, 4), "hilbert": (2, 2)}


@dataclass(frozen=True, slots=True)
class Curve:
    """A space-filling curve over columns of the table."""

    kind: str
    columns: tuple[str, ...]


def parse_sort_by(schema: TableSchema) -> tuple[str | Curve, ...]:
    """Column names and at most one curve. Raises SchemaInvalid for what the table lacks."""

    entries: list[str | Curve] = []
    for text in schema.sort_by:
        match = _CURVE.fullmatch(text)
        if match is None:
            entries.append(_known(schema, text))
            continue
        names = tuple(_known(schema, name.strip()) for name in match[2].split(","))
        least, most = _CURVE_COLUMNS[match[1]]
        if not least <= len(names) <= most or len(set(names)) != len(names):
            raise SchemaInvalid(f"{match[1]} takes {least} to {most} different columns: {text!r}")
        if any(isinstance(entry, Curve) for entry in entries):
            raise SchemaInvalid("sort_by takes one zorder or hilbert, not several")
        entries.append(Curve(match[1], names))
    return tuple(entries)


def order_terms(
    connection: duckdb.DuckDBPyConnection, schema: TableSchema, relation: str
) -> list[str]:
    """Terms for ORDER BY over `relation`'s columns, the place of a row last. A curve reads the
    relation once for its sample."""

    terms: list[str] = []
    for entry in parse_sort_by(schema):
        if isinstance(entry, Curve):
            terms.append(_curve_term(connection, entry, relation))
        else:
            terms.append(f'"{entry}" ASC NULLS LAST')
    return [*terms, *(f'"{name}"' for name in HIDDEN_COLUMNS)]


def _known(schema: TableSchema, name: str) -> str:
    if schema.column(name) is None:
        raise SchemaInvalid(f"sort_by names {name!r}, and {schema.name} has no such column")
    return name


def _curve_term(connection: duckdb.DuckDBPyConnection, curve: Curve, relation: str) -> str:
    counts = _make_buckets(connection, curve, relation)
    dimensions = len(curve.columns)
    if curve.kind == "zorder":
        return " + ".join(
            _bucket(place, name, counts[place], _spread(dimensions, dimensions - 1 - place))
            for place, name in enumerate(curve.columns)
        )
    side = 1 << CURVE_BITS
    steps = [hilbert_step(x, y) for x in range(side) for y in range(side)]
    connection.execute("SET VARIABLE curve_steps = ?::USMALLINT[]", [steps]).fetchall()
    row, column = (
        _bucket(place, name, counts[place], _times(side if place == 0 else 1))
        for place, name in enumerate(curve.columns)
    )
    return f"getvariable('curve_steps')[{row} + {column} + 1]"


def _make_buckets(connection: duckdb.DuckDBPyConnection, curve: Curve, relation: str) -> list[int]:
    """Sets the variables `curve_0` … to the lower bounds of buckets; returns how many each has."""

    names = ", ".join(f'"{name}"' for name in curve.columns)
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE curve_sample AS SELECT {names} FROM {relation} "
        f"USING SAMPLE reservoir({_SAMPLE_ROWS} ROWS) REPEATABLE (7)"
    ).fetchall()
    counts: list[int] = []
    for place, name in enumerate(curve.columns):
        connection.execute(
            f"""SET VARIABLE curve_{place} = (
                WITH ranked AS (
                    SELECT "{name}" AS v, row_number() OVER (ORDER BY "{name}") AS n,
                        count(*) OVER () AS c
                    FROM curve_sample WHERE "{name}" IS NOT NULL)
                SELECT list(v ORDER BY v) FROM ranked
                WHERE n > 1 AND n * {_NULLS} // c > (n - 1) * {_NULLS} // c)"""
        ).fetchall()
        (row,) = connection.execute(f"SELECT len(getvariable('curve_{place}'))").fetchall()
        counts.append(min(row[0] or 0, _NULLS - 1))
    connection.execute("DROP TABLE curve_sample").fetchall()
    return counts


def _bucket(place: int, name: str, bounds: int, leaf: Callable[[int], int]) -> str:
    """The leaf of the value's bucket, found by halving: one comparison per level and row."""

    def tree(first: int, last: int) -> str:
        if first == last:
            return f"{leaf(first)}::UINTEGER"
        middle = (first + last) // 2
        bound = f"getvariable('curve_{place}')[{middle + 1}]"
        return (
            f'CASE WHEN "{name}" < {bound} THEN {tree(first, middle)} '
            f"ELSE {tree(middle + 1, last)} END"
        )

    nulls = f"{leaf(_NULLS)}::UINTEGER"
    return f'(CASE WHEN "{name}" IS NULL THEN {nulls} ELSE {tree(0, bounds)} END)'


def _times(factor: int) -> Callable[[int], int]:
    return lambda bucket: bucket * factor


def _spread(dimensions: int, offset: int) -> Callable[[int], int]:
    """The bits of a bucket, `dimensions` apart."""

    def spread(bucket: int) -> int:
        return sum(
            ((bucket >> bit) & 1) << (bit * dimensions + offset) for bit in range(CURVE_BITS)
        )

    return spread


def hilbert_step(x: int, y: int) -> int:
    """How far along the Hilbert curve a cell lies (the usual quadrant walk)."""

    step = 0
    side = 1 << (CURVE_BITS - 1)
    while side:
        right, upper = int(bool(x & side)), int(bool(y & side))
        step += side * side * ((3 * right) ^ upper)
        if not upper:
            if right:
                x, y = (1 << CURVE_BITS) - 1 - x, (1 << CURVE_BITS) - 1 - y
            x, y = y, x
        side >>= 1
    return step
