"""Scopes: the catalog that exactly one set of sources makes visible.

A scope is an attached in-memory catalog of its own (`$s1`, `$s2`, …) that holds one view per source
and nothing else. A query runs with its scope first on the search path, so two queries can read
different snapshots under one table name, and a name that the guard misjudged finds nothing.
A table that is only described is an empty table in place of a view. Lists and tables at other
snapshots lie in catalogs beside it, one for each side (`$s1i`, `$s1r0`, …); only the rewriting of
`child_references` can name them.
Names with a dollar sign cannot be written by a caller: the guard folds every table name.

Scopes are kept by their exact content and dropped least recently used when nobody runs in them.
Making one costs as much as a small query, and a table that is written to has other files with each
snapshot. So of those that differ in nothing but the files of the same tables only a few are kept:
beyond that, an idle one is given the new views in place of its own, and nothing else changes in it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb

from storage.engine.child_faults import SourceBroken
from storage.engine.child_references import LISTS, catalog_of
from storage.engine.child_sandbox import FIXED, quote_name
from storage.engine.plans import LISTINGS, SHAPES
from storage.engine.wire import WireSource

Sources = tuple[WireSource, ...]

#: So many scopes of the same tables are kept, for statements that read different files of them.
_ALIKE_MAX = 8


@dataclass(frozen=True, slots=True)
class Opened:
    """A scope in use. `path`: the search path. `catalog`: its name; those of its sides begin so."""

    path: str
    catalog: str


@dataclass(slots=True)
class _Scope:
    catalog: str
    ready: threading.Event
    sides: tuple[str, ...]
    names: tuple[str, ...]
    attached: bool = False
    users: int = 0
    failed: SourceBroken | None = None


class ScopeCache:
    """Shared by all lanes of one database; every method may be called from any thread."""

    def __init__(self, database: duckdb.DuckDBPyConnection, *, entries_max: int) -> None:
        self._database = database
        self._entries_max = entries_max
        self._lock = threading.Lock()
        self._scopes: OrderedDict[Sources, _Scope] = OrderedDict()
        self._made = 0

    @contextmanager
    def use(self, sources: Sources) -> Iterator[Opened]:
        """Makes exactly `sources` visible for the block's duration."""

        if not sources:
            yield Opened(f'"{FIXED}".main', "")
            return
        scope = self._take(sources)
        try:
            yield Opened(f'"{scope.catalog}".main,"{FIXED}".main', scope.catalog)
        finally:
            with self._lock:
                scope.users -= 1

    def _take(self, sources: Sources) -> _Scope:
        with self._lock:
            scope = self._scopes.get(sources)
            mine = scope is None
            if scope is None:
                scope = self._scopes[sources] = self._taken_over(sources) or self._new(sources)
            self._scopes.move_to_end(sources)
            scope.users += 1
        if mine:
            self._fill(sources, scope)
        else:
            scope.ready.wait()
            if scope.failed is not None:
                with self._lock:
                    scope.users -= 1
                raise SourceBroken(str(scope.failed))
        return scope

    def _new(self, sources: Sources) -> _Scope:
        self._made += 1
        sides = sorted({catalog_of(_side(source)[0]) for source in sources} | {""})
        return _Scope(f"$s{self._made}", threading.Event(), tuple(sides), _names(sources))

    def _taken_over(self, sources: Sources) -> _Scope | None:
        """The idle scope of the same tables, and of nothing but tables, that was not used for the
        longest time, when there are enough of them. It is not found any more, so it can change."""

        names = _names(sources)
        if any(_side(source)[0] for source in sources):
            return None
        alike = [key for key, scope in self._scopes.items() if scope.names == names]
        if len(alike) < _ALIKE_MAX:
            return None
        for key in alike:
            if self._scopes[key].users == 0:
                scope = self._scopes.pop(key)
                scope.ready = threading.Event()
                return scope
        return None

    def _fill(self, sources: Sources, scope: _Scope) -> None:
        cursor = self._database.cursor()
        try:
            if not scope.attached:
                for side in scope.sides:
                    cursor.execute(f"ATTACH ':memory:' AS {quote_name(scope.catalog + side)}")
                scope.attached = True
            _make_relations(cursor, scope.catalog, sources)
        except Exception as error:
            # The sources are the catalog's work, so a caller can do nothing about this.
            scope.failed = SourceBroken(f"{type(error).__name__}: {error}")
            with self._lock:
                scope.users -= 1
                self._scopes.pop(sources, None)
            _detach(cursor, scope)
            raise scope.failed from error
        finally:
            scope.ready.set()
            cursor.close()
        self._evict()

    def _evict(self) -> None:
        with self._lock:
            extra = len(self._scopes) - self._entries_max
            idle = [key for key, scope in self._scopes.items() if scope.users == 0]
            gone = [self._scopes.pop(key) for key in idle[: max(extra, 0)]]
        for scope in gone:
            cursor = self._database.cursor()
            _detach(cursor, scope)
            cursor.close()


def _detach(cursor: duckdb.DuckDBPyConnection, scope: _Scope) -> None:
    for side in scope.sides:
        cursor.execute(f"DETACH DATABASE IF EXISTS {quote_name(scope.catalog + side)}")


def _side(source: WireSource) -> tuple[str, str]:
    """The side of a source, empty for the statement's own, and its name."""

    side, _, name = source.name.rpartition(":")
    return side, name


def _names(sources: Sources) -> tuple[str, ...]:
    return tuple(source.name for source in sources)


def _make_relations(
    cursor: duckdb.DuckDBPyConnection, scope_catalog: str, sources: Sources
) -> None:
    schemas: set[tuple[str, str]] = set()
    for source in sources:
        side, name = _side(source)
        if side == LISTINGS:
            schema, table = LISTS, name
        else:
            namespace, _, table = name.rpartition(".")
            schema = namespace or "main"
        catalog = quote_name(scope_catalog + catalog_of(side))
        if (catalog, schema) not in schemas and schema != "main":
            cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {catalog}.{quote_name(schema)}")
            schemas.add((catalog, schema))
        target = f"{catalog}.{quote_name(schema)}.{quote_name(table)}"
        if side == SHAPES:
            cursor.execute(f"CREATE TABLE {target} ({source.relation_sql})")
            continue
        columns = ", ".join(quote_name(column) for column in source.columns) or "*"
        cursor.execute(
            f"CREATE OR REPLACE VIEW {target} AS SELECT {columns} FROM {source.relation_sql}"
        )
