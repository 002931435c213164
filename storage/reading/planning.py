"""From a statement and a snapshot to sources: schemas at the snapshot, pruned files, relation SQL.

Everything here is decided by the snapshot and the statement alone, so it may be kept: a plan is
known by the statement, its parameters, and for each table its version and the last change of its
files. Publishing to other tables, or nothing, changes no key. Whether the caller may see a table
is no part of a plan; it is asked before one is looked up (contract D10).
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lakebus.errors import ConfigurationError, Corrupt, TableNotFound, Unavailable
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.engine.plans import Parameters, ParsedStatement, SourceTable
from storage.files.cache import FileCache
from storage.files.objects import ObjectStore
from storage.files.parquet import scan_expression
from storage.files.pruning import Predicate, prune, table_predicates
from storage.reading.kept import Kept
from storage.reading.leading import arrange, leading
from storage.reading.manifest import SnapshotView
from storage.reading.shapes import by_names
from storage.reading.table_files import FileView
from storage.reading.travel import Held

_log = logging.getLogger(__name__)

Visible = Callable[[str], bool]

_SUGGESTIONS_MAX = 3
#: Longer parameter lists are not worth their key.
_KEY_CHARACTERS_MAX = 4_096
_PATHS_MAX = 200_000
#: As the engine says it of a file that it finds missing or damaged.
_DAMAGED_DETAIL = (
    "the data could not be read just now; try again, and if it stays so have an operator run "
    "`lakebus maintain validate`, which names data files that are missing or damaged"
)


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """What the engine reads. `bytes_scanned` is the size of the files listed. `remote`: files that
    must be brought to this machine first."""

    sources: Mapping[str, SourceTable]
    files_scanned: int
    files_pruned: int
    bytes_scanned: int
    characters: int
    remote: tuple[DataFile, ...] = ()


@dataclass(frozen=True, slots=True)
class _Table:
    schema: TableSchema
    view: FileView


class Planner:
    """One per process. `characters_max` bounds the SQL text that kept plans hold, in characters.
    `cache`: where copies lie of files from a store that keeps none on this machine."""

    def __init__(
        self,
        object_store: ObjectStore,
        *,
        cache: FileCache | None = None,
        characters_max: int = 64_000_000,
    ) -> None:
        self._store = object_store
        self._cache = cache
        self._plans: Kept[ScanPlan] = Kept(characters_max // 2)
        self._relations: Kept[str] = Kept(characters_max // 2)
        self._paths: dict[str, str] = {}

    def plan(
        self,
        view: SnapshotView,
        parsed: ParsedStatement,
        parameters: Parameters,
        *,
        visible: Visible,
        ordered: bool,
        pruning: bool,
    ) -> ScanPlan:
        """Sources for every table of the statement. Raises TableNotFound, also for tables that the
        caller may not see."""

        tables: dict[str, _Table] = {}
        for name in parsed.tables:
            schema = find_table(view, name, visible=visible)
            tables[name] = _Table(schema, view.files(schema.table_id))
        key = _plan_key(parsed.sql, parameters, tables, ordered=ordered, pruning=pruning)
        if key is not None and (kept := self._plans.get(key)) is not None:
            return kept
        plan = self._make(view, tables, parsed, parameters if pruning else None, ordered, pruning)
        if key is not None:
            self._plans.put(key, plan, plan.characters)
        return plan

    def _make(
        self,
        view: SnapshotView,
        tables: Mapping[str, _Table],
        parsed: ParsedStatement,
        parameters: Parameters,
        ordered: bool,
        pruning: bool,
    ) -> ScanPlan:
        predicates: Mapping[str, Predicate | None] = {}
        if pruning and any(table.view.files for table in tables.values()):
            schemas = {name: table.schema for name, table in tables.items()}
            versions = {
                name: functools.partial(view.schema_version, schema)
                for name, schema in schemas.items()
            }
            predicates = table_predicates(parsed.tree, parameters, schemas, versions)
        sources: dict[str, SourceTable] = {}
        scanned = listed = size_bytes = characters = 0
        remote: list[DataFile] = []
        for name, table in tables.items():
            predicate = predicates.get(name)
            files: Sequence[DataFile] = table.view.files
            if predicate is not None:
                files = prune(files, predicate)
            order = None if ordered or len(files) < 2 else leading(parsed, table.schema)
            if order is not None:
                files = arrange(files, order, pruning=pruning)
            relation = self._relation(view, table, files, ordered, order is not None)
            columns = tuple((c.name, c.column_id, c.type) for c in table.schema.columns)
            sources[name] = SourceTable(columns, relation)
            listed += len(table.view.files)
            scanned += len(files)
            size_bytes += sum(file.size_bytes for file in files)
            characters += len(relation)
            if self._cache is not None:
                remote += files
        return ScanPlan(sources, scanned, listed - scanned, size_bytes, characters, tuple(remote))

    def _relation(
        self,
        view: SnapshotView,
        table: _Table,
        files: Sequence[DataFile],
        ordered: bool,
        arranged: bool,
    ) -> str:
        if arranged or len(files) < len(table.view.files):
            return self._scan(view, table.schema, files, ordered)
        key = (*_table_key(table), ordered)
        kept = self._relations.get(key)
        if kept is None:
            kept = self._scan(view, table.schema, files, ordered)
            self._relations.put(key, kept, len(kept))
        return kept

    def _scan(
        self, view: SnapshotView, schema: TableSchema, files: Sequence[DataFile], ordered: bool
    ) -> str:
        named = by_names(schema, files, functools.partial(view.schema_version, schema))
        return scan_expression(schema, self.locate(files), ordered=ordered, by_name=named)

    def locate(self, files: Iterable[DataFile]) -> list[str]:
        """Where the engine finds the files. Raises ConfigurationError."""

        paths = self._paths
        if len(paths) > _PATHS_MAX:
            paths.clear()
        found = []
        for file in files:
            path = paths.get(file.object_key)
            if path is None:
                path = paths[file.object_key] = self._local_path(file)
            found.append(path)
        return found

    async def bring(self, files: Iterable[DataFile], hold: Held) -> None:
        """Brings the files to where `locate` says; they stay there until `hold` is released.
        Raises ResultTooLarge when they are more than copies are kept of, Unavailable."""

        if self._cache is None:
            return
        try:
            lease = await self._cache.lease(files)
        except Corrupt as error:
            _log.error("a query cannot have its files: %s %s", error, error.members)
            raise Unavailable(_DAMAGED_DETAIL) from error
        hold.when_released(lease.release)

    def _local_path(self, file: DataFile) -> str:
        if self._cache is not None:
            return self._cache.path(file)
        path = self._store.local_path(file.object_key)
        if path is None:
            raise ConfigurationError(
                "the object store keeps no files on this machine, and the engine reads nothing "
                "else: put a file cache in front of it"
            )
        return str(path)


def find_table(view: SnapshotView, name: str, *, visible: Visible) -> TableSchema:
    """The table of a (folded) name at the snapshot. Raises TableNotFound; what the caller may not
    see is answered exactly like what is not there, and suggestions name only what they may see."""

    schema = view.schema(name) if visible(name) else None
    if schema is not None:
        return schema
    known = [other for other in view.schemas() if visible(other)]
    close = difflib.get_close_matches(name, known, n=_SUGGESTIONS_MAX)
    raise TableNotFound(
        f"there is no table {name} in this snapshot"
        + (f"; did you mean {' or '.join(close)}?" if close else ""),
        did_you_mean=close,
    )


def _table_key(table: _Table) -> tuple[int, int, int, int]:
    view = table.view
    return (table.schema.table_id, table.schema.version, view.epoch, view.generation)


def _plan_key(
    sql: str,
    parameters: Parameters,
    tables: Mapping[str, _Table],
    *,
    ordered: bool,
    pruning: bool,
) -> tuple[object, ...] | None:
    """Text, not values: 1, 1.0 and True are equal as keys and different as parameters."""

    given = ""
    if parameters:
        given = repr(parameters)
        if len(given) > _KEY_CHARACTERS_MAX:
            return None
    read = tuple(_table_key(table) for table in tables.values())
    return (sql, given, ordered, pruning, read)
