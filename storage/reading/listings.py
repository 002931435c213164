"""Lists of tables as SQL sees them: SHOW TABLES, DESCRIBE and `information_schema`.

DuckDB's own lists tell of everything in its catalogs, so none of them is reachable. These are made
of the tables that the caller may see at the snapshot that is read, and of nothing else: what is not
among `schemas` cannot be in the text that the engine gets (contract D10). Names, types and order of
columns are those of DuckDB's lists, so that programs written for them work; a test compares them.

A list travels as one JSON constant, column by column: 50,000 columns of tables are 4 MB of text
that DuckDB reads at once, where as many rows of VALUES would be parsed one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from lakebus.errors import TableNotFound
from lakebus.schemas import Column, TableSchema
from storage.engine.plans import SHOW_ALL_TABLES, SHOW_SCHEMAS, SHOW_TABLES, SourceTable
from storage.reading.kept import Kept
from storage.rows.types import ColumnType, Family, duckdb_spelling, parse_type

#: What lists call the lake, and the place of tables without a namespace.
CATALOG: Final = "lakebus"
MAIN: Final = "main"

#: Columns of `information_schema.columns` of which the standard knows and DuckDB says nothing.
_UNSAID: Final = (
    ("datetime_precision", "INTEGER"),
    ("interval_type", "VARCHAR"),
    ("interval_precision", "INTEGER"),
    *(
        (f"{what}_{part}", "VARCHAR")
        for what in ("character_set", "collation", "domain", "udt", "scope")
        for part in ("catalog", "schema", "name")
    ),
    ("maximum_cardinality", "BIGINT"),
    ("dtd_identifier", "VARCHAR"),
    ("is_self_referencing", "BOOLEAN"),
    ("is_identity", "BOOLEAN"),
    ("identity_generation", "VARCHAR"),
    ("identity_start", "VARCHAR"),
    ("identity_increment", "VARCHAR"),
    ("identity_maximum", "VARCHAR"),
    ("identity_minimum", "VARCHAR"),
    ("identity_cycle", "BOOLEAN"),
)

#: A column of a list: its name, its type, and what stands in it: values, or the same everywhere.
_Given = tuple[str, str, Sequence[object] | str | bool | None]


def spelled(kind: str) -> str:
    """A column's type as DuckDB's lists and DESCRIBE spell it."""

    return duckdb_spelling(parse_type(kind))


def shape_source(schema: TableSchema) -> SourceTable:
    """A table without rows that DESCRIBE answers about, NOT NULL columns among them."""

    text = ", ".join(
        f'"{c.name}" {spelled(c.type)}{"" if c.nullable else " NOT NULL"}' for c in schema.columns
    )
    return SourceTable(tuple((c.name, c.column_id, c.type) for c in schema.columns), text)


def listing_source(listing: str, schemas: Sequence[TableSchema]) -> SourceTable:
    """A list of exactly these tables, which are in order of names. Raises TableNotFound."""

    kind, _, namespace = listing.partition(".")
    if namespace:
        inside = [schema for schema in schemas if _place(schema)[0] == namespace]
        if not inside and namespace != MAIN:
            raise TableNotFound(
                f"there is no namespace {namespace} in this snapshot", did_you_mean=[]
            )
        return _source([("name", "VARCHAR", [_place(schema)[1] for schema in inside])])
    return _source(_LISTINGS[kind](schemas))


class Listings:
    """Lists that were made, kept while the caller's tables are the same: 20,000 columns take 40 ms.
    A version of a table never changes, so its numbers say what is in a list."""

    def __init__(self, *, characters_max: int = 16_000_000) -> None:
        self._kept: Kept[SourceTable] = Kept(characters_max)

    def source(self, listing: str, schemas: Sequence[TableSchema]) -> SourceTable:
        """As `listing_source`."""

        key = (listing, *((schema.table_id, schema.version) for schema in schemas))
        found = self._kept.get(key)
        if found is None:
            found = listing_source(listing, schemas)
            self._kept.put(key, found, len(found.relation_sql))
        return found


def _place(schema: TableSchema) -> tuple[str, str]:
    namespace, _, name = schema.name.rpartition(".")
    return namespace or MAIN, name


def _show_tables(schemas: Sequence[TableSchema]) -> list[_Given]:
    return [("name", "VARCHAR", [schema.name for schema in schemas])]


def _show_schemas(schemas: Sequence[TableSchema]) -> list[_Given]:
    return [
        ("database_name", "VARCHAR", CATALOG),
        ("schema_name", "VARCHAR", _namespaces(schemas)),
    ]


def _show_all_tables(schemas: Sequence[TableSchema]) -> list[_Given]:
    return [
        ("database", "VARCHAR", CATALOG),
        ("schema", "VARCHAR", [_place(schema)[0] for schema in schemas]),
        ("name", "VARCHAR", [_place(schema)[1] for schema in schemas]),
        ("column_names", "VARCHAR[]", [[c.name for c in s.columns] for s in schemas]),
        ("column_types", "VARCHAR[]", [[spelled(c.type) for c in s.columns] for s in schemas]),
        ("temporary", "BOOLEAN", False),
    ]


def _namespaces(schemas: Sequence[TableSchema]) -> list[str]:
    return sorted({MAIN, *(_place(schema)[0] for schema in schemas)})


def _schemata(schemas: Sequence[TableSchema]) -> list[_Given]:
    return [
        ("catalog_name", "VARCHAR", CATALOG),
        ("schema_name", "VARCHAR", _namespaces(schemas)),
        ("schema_owner", "VARCHAR", CATALOG),
        ("default_character_set_catalog", "VARCHAR", None),
        ("default_character_set_schema", "VARCHAR", None),
        ("default_character_set_name", "VARCHAR", None),
        ("sql_path", "VARCHAR", None),
    ]


def _tables(schemas: Sequence[TableSchema]) -> list[_Given]:
    return [
        ("table_catalog", "VARCHAR", CATALOG),
        ("table_schema", "VARCHAR", [_place(schema)[0] for schema in schemas]),
        ("table_name", "VARCHAR", [_place(schema)[1] for schema in schemas]),
        ("table_type", "VARCHAR", ["BASE TABLE"] * len(schemas)),
        ("self_referencing_column_name", "VARCHAR", None),
        ("reference_generation", "VARCHAR", None),
        ("user_defined_type_catalog", "VARCHAR", None),
        ("user_defined_type_schema", "VARCHAR", None),
        ("user_defined_type_name", "VARCHAR", None),
        ("is_insertable_into", "VARCHAR", ["NO"] * len(schemas)),
        ("is_typed", "VARCHAR", ["NO"] * len(schemas)),
        ("commit_action", "VARCHAR", None),
        ("TABLE_COMMENT", "VARCHAR", None),
    ]


def _columns(schemas: Sequence[TableSchema]) -> list[_Given]:
    found: list[tuple[TableSchema, int, Column, ColumnType]] = [
        (schema, number, column, parse_type(column.type))
        for schema in schemas
        for number, column in enumerate(schema.columns, start=1)
    ]
    numbers = [_numeric(kind) for _, _, _, kind in found]
    return [
        ("table_catalog", "VARCHAR", CATALOG),
        ("table_schema", "VARCHAR", [_place(schema)[0] for schema, _, _, _ in found]),
        ("table_name", "VARCHAR", [_place(schema)[1] for schema, _, _, _ in found]),
        ("column_name", "VARCHAR", [column.name for _, _, column, _ in found]),
        ("ordinal_position", "INTEGER", [number for _, number, _, _ in found]),
        ("column_default", "VARCHAR", None),
        ("is_nullable", "VARCHAR", ["YES" if c.nullable else "NO" for _, _, c, _ in found]),
        ("data_type", "VARCHAR", [spelled(column.type) for _, _, column, _ in found]),
        ("character_maximum_length", "INTEGER", None),
        ("character_octet_length", "INTEGER", None),
        ("numeric_precision", "INTEGER", [precision for precision, _, _ in numbers]),
        ("numeric_precision_radix", "INTEGER", [radix for _, radix, _ in numbers]),
        ("numeric_scale", "INTEGER", [scale for _, _, scale in numbers]),
        *((name, kind, None) for name, kind in _UNSAID),
        ("is_generated", "VARCHAR", ["NEVER"] * len(found)),
        ("generation_expression", "VARCHAR", None),
        ("is_updatable", "BOOLEAN", None),
        ("COLUMN_COMMENT", "VARCHAR", None),
    ]


def _numeric(kind: ColumnType) -> tuple[int | None, int | None, int | None]:
    """Precision, radix and scale, as DuckDB tells them."""

    if kind.family is Family.DECIMAL:
        return kind.precision, 10, kind.scale
    if kind.family is Family.INTEGER and kind.low < 0:
        return kind.bits, 2, 0
    if kind.family is Family.FLOAT:
        return {32: 24, 64: 53}[kind.bits], 2, 0
    return None, None, None


_LISTINGS: Final[dict[str, Callable[[Sequence[TableSchema]], list[_Given]]]] = {
    "tables": _tables,
    "columns": _columns,
    "schemata": _schemata,
    SHOW_TABLES: _show_tables,
    SHOW_ALL_TABLES: _show_all_tables,
    SHOW_SCHEMAS: _show_schemas,
}


def _source(columns: Sequence[_Given]) -> SourceTable:
    """A relation of these columns; at least one of them has values."""

    values: dict[str, Any] = {}
    types: dict[str, Any] = {}
    items = []
    for number, (name, kind, given) in enumerate(columns):
        if isinstance(given, list):
            key = f"c{number}"
            values[key] = given
            types[key] = [["VARCHAR"]] if kind == "VARCHAR[]" else [kind]
            items.append(f'unnest(r.{key}) AS "{name}"')
        else:
            same = "NULL" if given is None else _literal(str(given).lower())
            items.append(f'{same}::{kind} AS "{name}"')
    text = _literal(json.dumps(values, separators=(",", ":")))
    shape = _literal(json.dumps(types))
    relation = f"(SELECT {', '.join(items)} FROM (SELECT from_json({text}, {shape}) AS r))"
    return SourceTable(tuple((name, 0, kind.lower()) for name, kind, _ in columns), relation)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
