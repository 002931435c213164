"""The client for `await`: the calls of `Client`, each in a thread; one implementation, no twin."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lakebus.client_results import Changes

if TYPE_CHECKING:
    from lakebus.client import Client

_P = ParamSpec("_P")
_T = TypeVar("_T")


class AsyncClient:
    """`Client` for `await`; each call runs in a thread of the loop's executor."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.create_table = _awaitable(client.create_table)
        self.alter_table = _awaitable(client.alter_table)
        self.drop_table = _awaitable(client.drop_table)
        self.tables = _awaitable(client.tables)
        self.table = _awaitable(client.table)
        self.ingest = _awaitable(client.ingest)
        self.ingest_tables = _awaitable(client.ingest_tables)
        self.batch = _awaitable(client.batch)
        self.delete = _awaitable(client.delete)
        self.deletion = _awaitable(client.deletion)
        self.erase = _awaitable(client.erase)
        self.erasure = _awaitable(client.erasure)
        self.query = _awaitable(client.query)
        self.query_arrow = _awaitable(client.query_arrow)
        self.changes_page = _awaitable(client.changes_page)
        self.wait_visible = _awaitable(client.wait_visible)
        self.maintain = _awaitable(client.maintain)
        self.jobs = _awaitable(client.jobs)
        self.job = _awaitable(client.job)
        self.tag = _awaitable(client.tag)
        self.tags = _awaitable(client.tags)
        self.drop_tag = _awaitable(client.drop_tag)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()

    async def changes(
        self, table: str, *, after: int = 0, until: int | None = None, rows_max: int = 1_000
    ) -> AsyncIterator[Changes]:
        """See `Client.changes`."""

        page = await self.changes_page(table, after=after, until=until, rows_max=rows_max)
        yield page
        while page.cursor is not None:
            page = await self.changes_page(table, cursor=page.cursor, rows_max=rows_max)
            yield page

    async def close(self) -> None:
        self._client.close()


def _awaitable(call: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    @functools.wraps(call)
    async def in_thread(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.to_thread(call, *args, **kwargs)

    return in_thread
