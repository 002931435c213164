"""Scopes: the catalog that exactly one set of sources makes visible.

A scope is an attached in-memory catalog of its own (`$s1`, `$s2`, …) that holds one view per source
and nothing else. A query runs with its scope first on the search path, so two queries can read
different snapshots under one table name, and a name that the guard misjudged finds nothing.
Names with a dollar sign cannot be written by a caller: the guard folds every table name.

Scopes are kept by their exact content and dropped least recently used when nobody runs in them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb

from storage.engine.child_faults import SourceBroken
from storage.engine.child_sandbox import FIXED, quote_name
from storage.engine.wire import WireSource

Sources = tuple[WireSource, ...]


@dataclass(slots=True)
class _Scope:
    catalog: str
    ready: threading.Event
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
    def use(self, sources: Sources) -> Iterator[str]:
        """The search path under which exactly `sources` are visible, for the block's duration."""

        if not sources:
            yield f'"{FIXED}".main'
            return
        scope = self._take(sources)
        try:
            yield f'"{scope.catalog}".main,"{FIXED}".main'
        finally:
            with self._lock:
                scope.users -= 1

    def _take(self, sources: Sources) -> _Scope:
        with self._lock:
            scope = self._scopes.get(sources)
            mine = scope is None
            if scope is None:
                self._made += 1
                scope = _Scope(f"$s{self._made}", threading.Event())
                self._scopes[sources] = scope
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

    def _fill(self, sources: Sources, scope: _Scope) -> None:
        cursor = self._database.cursor()
        try:
            cursor.execute(f"ATTACH ':memory:' AS {quote_name(scope.catalog)}")
            _make_views(cursor, scope.catalog, sources)
        except Exception as error:
            # The sources are the catalog's work, so a caller can do nothing about this.
            scope.failed = SourceBroken(f"{type(error).__name__}: {error}")
            with self._lock:
                scope.users -= 1
                self._scopes.pop(sources, None)
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
            cursor.execute(f"DETACH {quote_name(scope.catalog)}")
            cursor.close()


def _make_views(cursor: duckdb.DuckDBPyConnection, catalog: str, sources: Sources) -> None:
    schemas = {"main"}
    for source in sources:
        *namespace, table = source.name.split(".")
        schema = namespace[0] if namespace else "main"
        if schema not in schemas:
            cursor.execute(f"CREATE SCHEMA {quote_name(catalog)}.{quote_name(schema)}")
            schemas.add(schema)
        columns = ", ".join(quote_name(name) for name in source.columns) or "*"
        cursor.execute(
            f"CREATE VIEW {quote_name(catalog)}.{quote_name(schema)}.{quote_name(table)} AS "
            f"SELECT {columns} FROM {source.relation_sql}"
        )
