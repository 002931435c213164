"""Queries that run right now: one's own can be listed and cancelled (D10: others' are not there).

Each query replica knows its own queries; a QueryDirectory asks all of them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from lakebus.clock import format_time

_SQL_SHOWN_CHARACTERS = 2_000


@dataclass(frozen=True, slots=True)
class RunningQuery:
    query_id: str
    principal_id: int
    sql: str
    started_at: dt.datetime
    cancel: Callable[[], object]

    def as_json(self) -> dict[str, object]:
        return {
            "query_id": self.query_id,
            "sql": self.sql[:_SQL_SHOWN_CHARACTERS],
            "started_at": format_time(self.started_at),
        }


class QueryDirectory(Protocol):
    """The running queries of all replicas. Raises Unavailable when a replica cannot be asked."""

    async def running(self, principal_id: int) -> list[dict[str, object]]: ...

    async def cancel(self, principal_id: int, query_id: str) -> bool:
        """True when the query was this principal's and was told to stop."""
        ...


class RunningQueries:
    """The queries of this process; also the directory of a server that has one process."""

    def __init__(self) -> None:
        self._queries: dict[str, RunningQuery] = {}

    @contextlib.contextmanager
    def entered(self, query: RunningQuery) -> Iterator[None]:
        self._queries[query.query_id] = query
        try:
            yield
        finally:
            self._queries.pop(query.query_id, None)

    async def running(self, principal_id: int) -> list[dict[str, object]]:
        return [q.as_json() for q in self._queries.values() if q.principal_id == principal_id]

    async def cancel(self, principal_id: int, query_id: str) -> bool:
        query = self._queries.get(query_id)
        if query is None or query.principal_id != principal_id:
            return False
        query.cancel()
        return True
