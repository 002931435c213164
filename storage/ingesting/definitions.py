"""Table definitions as callers write them, checked and put into canonical words.

Pure functions: what a definition or a change may be, and the schema that results. The catalog
gives ids and versions and decides races.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lakebus.errors import SchemaChangeInvalid, SchemaInvalid
from lakebus.schemas import Column, TableSchema, fold_name, fold_table_name
from storage.rows.types import parse_type

COLUMNS_MAX = 1000


@dataclass(frozen=True, slots=True)
class ColumnDefinition:
    """A column as a caller writes it."""

    name: str
    type: str
    nullable: bool = True


@dataclass(frozen=True, slots=True)
class TableDefinition:
    """A table as a caller writes it; see `checked`."""

    name: str
    columns: tuple[ColumnDefinition, ...]
    partition_by: tuple[str, ...] = ()
    sort_by: tuple[str, ...] = ()
    retention: Mapping[str, object] | None = None

    def checked(self) -> CheckedDefinition:
        """Raises SchemaInvalid with what to change."""

        name = fold_table_name(self.name)
        if not self.columns:
            raise SchemaInvalid("a table needs at least one column")
        if len(self.columns) > COLUMNS_MAX:
            raise SchemaInvalid(f"a table has at most {COLUMNS_MAX} columns")
        if self.retention:
            raise SchemaInvalid("row retention is not available in this version; leave it out")
        columns = tuple(checked_column(column) for column in self.columns)
        _refuse_repeated([column.name for column in columns])
        return CheckedDefinition(
            name=name,
            columns=columns,
            partition_by=_layout("partition_by", self.partition_by, columns),
            sort_by=_layout("sort_by", self.sort_by, columns),
        )


@dataclass(frozen=True, slots=True)
class CheckedDefinition:
    """Folded names and canonical types; column ids are 0 until the catalog gives them."""

    name: str
    columns: tuple[Column, ...]
    partition_by: tuple[str, ...] = ()
    sort_by: tuple[str, ...] = ()

    def describes(self, schema: TableSchema) -> bool:
        """True when the table was made by this definition and not changed since."""

        return (
            schema.version == 1
            and self.partition_by == schema.partition_by
            and self.sort_by == schema.sort_by
            and [(c.name, c.type, c.nullable) for c in self.columns]
            == [(c.name, c.type, c.nullable) for c in schema.columns]
        )


@dataclass(frozen=True, slots=True)
class TableChangeRequest:
    """Changes of one PATCH, applied in this order: drop, rename (old → new), add."""

    drop_columns: tuple[str, ...] = ()
    rename_columns: Mapping[str, str] | None = None
    add_columns: tuple[ColumnDefinition, ...] = ()

    def applied_to(self, schema: TableSchema) -> TableSchema:
        """The changed schema; new columns have id 0. Raises SchemaChangeInvalid, SchemaInvalid."""

        if not (self.drop_columns or self.rename_columns or self.add_columns):
            raise SchemaChangeInvalid(
                "the change is empty; give add_columns, rename_columns or drop_columns"
            )
        columns = list(schema.columns)
        for name in map(fold_name, self.drop_columns):
            columns.remove(_column(schema, columns, name))
        if not columns and not self.add_columns:
            raise SchemaChangeInvalid("a table keeps at least one column; drop the table instead")
        renames = {
            fold_name(old): fold_name(new) for old, new in (self.rename_columns or {}).items()
        }
        for old in renames:
            _column(schema, columns, old)
        columns = [
            replace(column, name=renames.get(column.name, column.name)) for column in columns
        ]
        for added in map(checked_column, self.add_columns):
            if not added.nullable:
                raise SchemaChangeInvalid(
                    f"the column {added.name} must be nullable, because rows stored before it have "
                    "no value for it"
                )
            columns.append(added)
        if len(columns) > COLUMNS_MAX:
            raise SchemaChangeInvalid(f"a table has at most {COLUMNS_MAX} columns")
        try:
            _refuse_repeated([column.name for column in columns])
        except SchemaInvalid as error:
            raise SchemaChangeInvalid(error.detail) from None
        return replace(
            schema,
            columns=tuple(columns),
            partition_by=_kept_layout("partition_by", schema.partition_by, renames, columns),
            sort_by=_kept_layout("sort_by", schema.sort_by, renames, columns),
        )


def checked_column(column: ColumnDefinition) -> Column:
    return Column(0, fold_name(column.name), parse_type(column.type).sql, column.nullable)


def _column(schema: TableSchema, columns: Sequence[Column], name: str) -> Column:
    found = next((column for column in columns if column.name == name), None)
    if found is None:
        raise SchemaChangeInvalid(f"the table {schema.name} has no column {name}")
    return found


def _refuse_repeated(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SchemaInvalid(f"there are two columns named {name}")
        seen.add(name)


def _layout(what: str, names: Sequence[str], columns: Sequence[Column]) -> tuple[str, ...]:
    folded = tuple(fold_name(name) for name in names)
    known = {column.name for column in columns}
    for name in folded:
        if name not in known:
            raise SchemaInvalid(f"{what} names {name}, which is no column of the table")
    _refuse_repeated(folded)
    return folded


def _kept_layout(
    what: str, names: Sequence[str], renames: Mapping[str, str], columns: Sequence[Column]
) -> tuple[str, ...]:
    kept = tuple(renames.get(name, name) for name in names)
    known = {column.name for column in columns}
    for name in kept:
        if name not in known:
            raise SchemaChangeInvalid(f"the column {name} is used by {what} and cannot be dropped")
    return kept
