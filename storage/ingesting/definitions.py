"""Table definitions as callers write them, checked and put into canonical words.

Pure functions: what a definition or a change may be, and the schema that results. The catalog
gives ids and versions and decides races.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lakebus.errors import SchemaChangeInvalid, SchemaInvalid
from lakebus.schemas import Column, TableSchema, fold_name, fold_table_name
from storage.ingesting.layouts import (
    checked_partition_by,
    checked_retention,
    checked_sort_by,
    refuse_drops,
    renamed_partition_by,
    renamed_retention,
    renamed_sort_by,
)
from storage.rows.types import ColumnType, Family, leaves_of, parse_type

COLUMNS_MAX = 1000
#: Scalars in all columns together: each is a column of its own in a data file.
LEAVES_MAX = 4000


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
        columns = tuple(checked_column(column) for column in self.columns)
        _refuse_repeated([column.name for column in columns])
        _refuse_leaves(columns)
        return CheckedDefinition(
            name=name,
            columns=columns,
            partition_by=checked_partition_by(self.partition_by, columns),
            sort_by=checked_sort_by(self.sort_by, columns),
            retention=checked_retention(self.retention, columns),
        )


@dataclass(frozen=True, slots=True)
class CheckedDefinition:
    """Folded names and canonical types; column ids are 0 until the catalog gives them."""

    name: str
    columns: tuple[Column, ...]
    partition_by: tuple[str, ...] = ()
    sort_by: tuple[str, ...] = ()
    retention: Mapping[str, object] = field(default_factory=dict)

    def describes(self, schema: TableSchema) -> bool:
        """True when the table was made by this definition and not changed since."""

        return (
            schema.version == 1
            and self.partition_by == schema.partition_by
            and self.sort_by == schema.sort_by
            and self.retention == schema.retention
            and [(c.name, c.type, c.nullable) for c in self.columns]
            == [(c.name, c.type, c.nullable) for c in schema.columns]
        )


@dataclass(frozen=True, slots=True)
class TableChangeRequest:
    """Changes of one PATCH, applied in this order: drop, rename (old → new), widen, relax, add,
    and then the layout. What is named after the rename carries the new names.

    `partition_by`, `sort_by` and `retention` replace what is there; empty removes it, None leaves
    it. They affect files written from then on, and old ones as they are compacted.
    """

    drop_columns: tuple[str, ...] = ()
    rename_columns: Mapping[str, str] | None = None
    widen_columns: Mapping[str, str] | None = None
    relax_columns: tuple[str, ...] = ()
    add_columns: tuple[ColumnDefinition, ...] = ()
    partition_by: tuple[str, ...] | None = None
    sort_by: tuple[str, ...] | None = None
    retention: Mapping[str, object] | None = None

    def applied_to(self, schema: TableSchema) -> TableSchema:
        """The changed schema; new columns have id 0. Raises SchemaChangeInvalid, SchemaInvalid."""

        if self._empty:
            raise SchemaChangeInvalid(
                "the change is empty; give add_columns, rename_columns, drop_columns, "
                "widen_columns, relax_columns, partition_by, sort_by or retention"
            )
        columns = self._columns(schema)
        try:
            _refuse_repeated([column.name for column in columns])
            _refuse_leaves(columns)
        except SchemaInvalid as error:
            raise SchemaChangeInvalid(error.detail) from None
        renames = self._renames
        partition_by = renamed_partition_by(schema.partition_by, renames)
        sort_by = renamed_sort_by(schema.sort_by, renames)
        retention = renamed_retention(schema.retention, renames)
        if self.partition_by is not None:
            partition_by = checked_partition_by(self.partition_by, columns)
        if self.sort_by is not None:
            sort_by = checked_sort_by(self.sort_by, columns)
        if self.retention is not None:
            retention = checked_retention(self.retention, columns)
        return replace(
            schema,
            columns=tuple(columns),
            partition_by=partition_by,
            sort_by=sort_by,
            retention=retention,
        )

    @property
    def _empty(self) -> bool:
        columns = (
            self.drop_columns,
            self.rename_columns,
            self.widen_columns,
            self.relax_columns,
            self.add_columns,
        )
        layout = (self.partition_by, self.sort_by, self.retention)
        return not any(columns) and all(part is None for part in layout)

    @property
    def _renames(self) -> dict[str, str]:
        return {fold_name(old): fold_name(new) for old, new in (self.rename_columns or {}).items()}

    def _columns(self, schema: TableSchema) -> list[Column]:
        columns = list(schema.columns)
        dropped = [fold_name(name) for name in self.drop_columns]
        for name in dropped:
            columns.remove(_column(schema, columns, name))
        if not columns and not self.add_columns:
            raise SchemaChangeInvalid("a table keeps at least one column; drop the table instead")
        refuse_drops(
            dropped,
            partition_by=schema.partition_by if self.partition_by is None else (),
            sort_by=schema.sort_by if self.sort_by is None else (),
            retention=schema.retention if self.retention is None else {},
        )
        renames = self._renames
        for old in renames:
            _column(schema, columns, old)
        columns = [
            replace(column, name=renames.get(column.name, column.name)) for column in columns
        ]
        for name, wider in (self.widen_columns or {}).items():
            column = _column(schema, columns, fold_name(name))
            columns[columns.index(column)] = widened(column, wider)
        for name in self.relax_columns:
            column = _column(schema, columns, fold_name(name))
            columns[columns.index(column)] = replace(column, nullable=True)
        for added in map(checked_column, self.add_columns):
            if not added.nullable:
                raise SchemaChangeInvalid(
                    f"the column {added.name} must be nullable, because rows stored before it have "
                    "no value for it"
                )
            columns.append(added)
        if len(columns) > COLUMNS_MAX:
            raise SchemaChangeInvalid(f"a table has at most {COLUMNS_MAX} columns")
        return columns


def widened(column: Column, wider: str) -> Column:
    """The column under a type that holds every value of the old one unchanged, in the same order
    and with the same text, so that old files and their statistics stay true. Raises
    SchemaChangeInvalid."""

    old, new = parse_type(column.type), parse_type(wider)
    if old.is_nested and old != new:
        raise SchemaChangeInvalid(
            f"the column {column.name} cannot go from {old.sql} to {new.sql}: what is inside of a "
            "list, struct or map does not change; add a column of the new type and drop this one"
        )
    if not _holds_all(old, new):
        raise SchemaChangeInvalid(
            f"the column {column.name} cannot go from {old.sql} to {new.sql}: only integers to "
            "wider integers, float to double, and decimals to ones with at least as many places "
            "before and after the point can be widened without loss"
        )
    return replace(column, type=new.sql)


def _holds_all(old: ColumnType, new: ColumnType) -> bool:
    if old.family is not new.family:
        return False
    match old.family:
        case Family.LIST | Family.STRUCT | Family.MAP:
            return old == new
        case Family.INTEGER:
            return new.low <= old.low and old.high <= new.high
        case Family.FLOAT:
            return old.bits <= new.bits
        case Family.DECIMAL:
            return old.scale <= new.scale and old.precision - old.scale <= new.precision - new.scale
        case _:
            return True


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


def _refuse_leaves(columns: Sequence[Column]) -> None:
    if sum(leaves_of(parse_type(column.type)) for column in columns) > LEAVES_MAX:
        raise SchemaInvalid(
            f"a table has at most {LEAVES_MAX} scalars, those inside of lists, structs and maps "
            "among them"
        )
