"""Which data files can be read by the names of their columns.

Reading by field id is always right (`storage.files.parquet`) and costs DuckDB some time for each
file of a list. A file names its columns as the schema version did in which it was written, and that
version is recorded with it. So where that version has the same columns as the one that is read (by
id, name and type, in this order or another), names say what ids say: a rename, a widened type, a
column that was dropped and made again under its name all make a version that differs. What else may
differ: a file lacks columns that its rows came before; those have no statistics (`DataFile`), and
NULL is what a reader by ids finds in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile

VersionOf = Callable[[int], TableSchema | None]


def by_names(schema: TableSchema, files: Iterable[DataFile], version_of: VersionOf) -> bool:
    """Whether all files can be read by the names of `schema`. `version_of`: another version of the
    table's schema, None where it is not known here."""

    columns = _columns(schema)
    ids = {column_id for column_id, _, _ in columns}
    alike = {schema.version: True}
    for file in files:
        same = alike.get(file.schema_version)
        if same is None:
            written = version_of(file.schema_version)
            same = written is not None and _columns(written) == columns
            alike[file.schema_version] = same
        if not (same and file.statistics.keys() >= ids):
            return False
    return True


def _columns(schema: TableSchema) -> frozenset[tuple[int, str, str]]:
    return frozenset((column.column_id, column.name, column.type) for column in schema.columns)
