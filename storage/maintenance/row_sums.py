"""Sums of row hashes: how a rewrite proves that it changed no row (contract E1, D8, D12).

A row's hash has 128 bits, and the sum of a relation's hashes modulo 2^128 does not depend on the
order of its rows: equal multisets have equal sums. The hash enters every hidden column and every
column of the schema by id. Its halves are DuckDB's 64-bit `hash` over the columns forwards and
backwards. That function is a bijection for values of up to 64 bits, but weaker beyond: it maps
-0.0 to 0.0 and all NaNs to one, and may give two wide values the same hash. So floats enter as
their bits, and the second half takes text and blobs with a character more, and wide numbers as
text, so that a collision of the first half is not one of the second. Lists, structs and maps enter
as text from which each value can be told: JSON whose scalars are strings, floats by their bits.

Hashes are compared within one process of one DuckDB only; they are no format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import duckdb

from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from storage.maintenance.rewriting import RowSum
from storage.rows.types import ColumnType, Family, parse_type, with_leaves

_WIDE_DIGITS = 18  # decimals with more digits take 128 bits


@dataclass(frozen=True, slots=True)
class Sums:
    """`rows` over everything, `places` over the hidden columns alone. `text_bytes` of all texts
    and blobs, and of the one row that has most: what a row takes in memory."""

    rows: RowSum
    places: RowSum
    text_bytes: int = 0
    text_bytes_max: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.rows + other.rows,
            self.places + other.places,
            self.text_bytes + other.text_bytes,
            max(self.text_bytes_max, other.text_bytes_max),
        )


NO_SUMS: Final = Sums(RowSum(0, 0), RowSum(0, 0))


def sums_of(
    connection: duckdb.DuckDBPyConnection,
    schema: TableSchema,
    relation: str,
    *,
    left_out: str | None = None,
) -> tuple[Sums, Sums]:
    """Sums over a relation with the hidden columns and the schema's, and over those of its rows
    for which `left_out` is true."""

    hashes = dict(zip(("h", "l", "p"), _hashes(schema), strict=True))
    inner = ", ".join(f"{sql} AS {name}" for name, sql in hashes.items())
    inner += f", {_text_bytes(schema)} AS t"
    outer = ["count(*)", *(f"sum({name})" for name in hashes), "sum(t)", "max(t)"]
    if left_out is not None:
        inner += f", ({left_out}) AS o"
        outer += [f"{term} FILTER (WHERE o)" for term in list(outer)]
    query = f"SELECT {', '.join(outer)} FROM (SELECT {inner} FROM {relation})"
    (found,) = connection.execute(query).fetchall()
    width = len(outer) // 2 if left_out is not None else len(outer)
    return _sums(*found[:width]), _sums(*found[width:]) if left_out is not None else NO_SUMS


def _sums(rows: int, *sums: int | None) -> Sums:
    high, low, places, text_bytes, text_bytes_max = (found or 0 for found in sums)
    return Sums(
        rows=RowSum(rows, ((high << 64) + low) % 2**128),
        places=RowSum(rows, places % 2**128),
        text_bytes=text_bytes,
        text_bytes_max=text_bytes_max,
    )


def _text_bytes(schema: TableSchema) -> str:
    terms = ["0::BIGINT"]
    for column in schema.columns:
        match parse_type(column.type).family:
            case Family.VARCHAR | Family.JSON:
                terms.append(f'coalesce(strlen("{column.name}"::VARCHAR), 0)')
            case Family.BLOB:
                terms.append(f'coalesce(octet_length("{column.name}"), 0)')
            case Family.LIST | Family.STRUCT | Family.MAP:
                text = _nested_text(f'"{column.name}"', parse_type(column.type))
                terms.append(f"coalesce(strlen({text}), 0)")
            case _:
                pass
    return " + ".join(terms)


def _hashes(schema: TableSchema) -> tuple[str, str, str]:
    places = [f'"{name}"' for name in HIDDEN_COLUMNS]
    columns = sorted(schema.columns, key=lambda column: column.column_id)
    kinds = [(f'"{column.name}"', parse_type(column.type)) for column in columns]
    forwards = [*places, *(_exact(name, kind) for name, kind in kinds)]
    backwards = [*(_other(name, kind) for name, kind in reversed(kinds)), *reversed(places)]
    return (
        f"hash({', '.join(forwards)})",
        f"hash({', '.join(backwards)})",
        f"hash({', '.join(places)})",
    )


def _exact(name: str, kind: ColumnType) -> str:
    if kind.is_nested:
        return _nested_text(name, kind)
    return f"{name}::BIT" if kind.family is Family.FLOAT else name


def _nested_text(name: str, kind: ColumnType) -> str:
    """NULL for a null; else the same text exactly for the same value."""

    bits = with_leaves(kind, lambda leaf: "BIT" if leaf.family is Family.FLOAT else leaf.sql)
    texts = with_leaves(kind, lambda _: "VARCHAR")
    return f"to_json({name}::{bits}::{texts})::VARCHAR"


def _other(name: str, kind: ColumnType) -> str:
    match kind.family:
        case Family.VARCHAR | Family.JSON:
            return f"({name}::VARCHAR || '~')"
        case Family.LIST | Family.STRUCT | Family.MAP:
            return f"({_nested_text(name, kind)} || '~')"
        case Family.BLOB:
            return f"({name} || '\\x7E'::BLOB)"
        case Family.UUID:
            return f"{name}::VARCHAR"
        case Family.DECIMAL if kind.precision > _WIDE_DIGITS:
            return f"{name}::VARCHAR"
        case _:
            return _exact(name, kind)
