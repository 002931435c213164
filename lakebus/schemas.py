"""Names, columns and table schemas: the nouns of what a table is.

Files and bus entries name columns by id, never by name, so that renames and drops cannot change
what an old file or an old snapshot means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lakebus.errors import SchemaInvalid

NAME_PATTERN = re.compile(r"[a-z_][a-z0-9_]{0,62}")

#: Hidden columns that every stored row carries through every rewrite (contract D12). The dollar
#: sign keeps them outside the names a user can choose.
SHARD_COLUMN, POSITION_COLUMN, ROW_COLUMN = "$shard", "$position", "$row"
HIDDEN_COLUMNS = (SHARD_COLUMN, POSITION_COLUMN, ROW_COLUMN)


def fold_name(text: str) -> str:
    """Lower case by ASCII only, the form in which names are stored and compared.

    Raises SchemaInvalid when the folded text is no name.
    """

    folded = "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)
    if not NAME_PATTERN.fullmatch(folded):
        raise SchemaInvalid(
            f"{text[:80]!r} is not a name: use a letter or underscore, then letters, digits and "
            "underscores, at most 63 characters"
        )
    return folded


def fold_table_name(text: str) -> str:
    """Folds `table` or `namespace.table`. Raises SchemaInvalid."""

    parts = text.split(".")
    if len(parts) > 2:
        raise SchemaInvalid(f"{text[:80]!r} has more than one dot; use namespace.table")
    return ".".join(fold_name(part) for part in parts)


@dataclass(frozen=True, slots=True)
class Column:
    """`column_id` is unique in its table for ever; `type` is the canonical SQL spelling."""

    column_id: int
    name: str
    type: str
    nullable: bool = True


@dataclass(frozen=True, slots=True)
class TableSchema:
    """One version of one table's shape. `version` starts at 1 and grows with each change."""

    table_id: int
    name: str
    version: int
    columns: tuple[Column, ...]
    partition_by: tuple[str, ...] = ()
    sort_by: tuple[str, ...] = ()
    retention: dict[str, object] = field(default_factory=dict)

    def column(self, name: str) -> Column | None:
        return next((c for c in self.columns if c.name == name), None)
