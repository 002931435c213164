"""The client for `await`: the calls of `Client`, each in a thread; one implementation, no twin.

A call that is cancelled (`asyncio.timeout`, a cancelled task) breaks its connection: a query stops
on the server too (contract D9), and a write may have happened or not: send it again with its key.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lakebus.client_arrow import Batches
from lakebus.client_http import SCOPE, CallScope
from lakebus.client_results import Changes
from lakebus.errors import MalformedRequest
from lakebus.writer_async import AsyncWriter

if TYPE_CHECKING:
    import pyarrow as pa

    from lakebus.client import Client

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Threads:
    """Where calls run: threads of our own, so that long waits do not use up the loop's."""

    def __init__(self, calls_max: int) -> None:
        self._pool = ThreadPoolExecutor(calls_max, thread_name_prefix="lakebus-call")
        self._closed = False

    async def run(self, call: Callable[[], _T]) -> _T:
        """The call's answer. When this is cancelled, so is the call. Raises MalformedRequest when
        closed."""

        if self._closed:
            raise MalformedRequest("the client is closed: make a new one")
        scope = CallScope()
        context = contextvars.copy_context()
        context.run(SCOPE.set, scope)
        future = self._pool.submit(context.run, call)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            scope.cancel()
            raise

    def awaitable(self, call: Callable[_P, _T]) -> Callable[_P, Coroutine[Any, Any, _T]]:
        @functools.wraps(call)
        async def in_thread(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return await self.run(functools.partial(call, *args, **kwargs))

        return in_thread

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False)


class AsyncClient:
    """`Client` for `await`."""

    def __init__(self, client: Client, *, calls_max: int = 32) -> None:
        self._client = client
        self._threads = Threads(calls_max)
        awaitable = self._threads.awaitable
        self.create_table = awaitable(client.create_table)
        self.alter_table = awaitable(client.alter_table)
        self.drop_table = awaitable(client.drop_table)
        self.tables = awaitable(client.tables)
        self.table = awaitable(client.table)
        self.ingest = awaitable(client.ingest)
        self.ingest_tables = awaitable(client.ingest_tables)
        self.batch = awaitable(client.batch)
        self.resend = awaitable(client.resend)
        self.send_batch = awaitable(client.send_batch)
        self.delete = awaitable(client.delete)
        self.deletion = awaitable(client.deletion)
        self.erase = awaitable(client.erase)
        self.erasure = awaitable(client.erasure)
        self.query = awaitable(client.query)
        self.query_arrow = awaitable(client.query_arrow)
        self.changes_page = awaitable(client.changes_page)
        self.wait_visible = awaitable(client.wait_visible)
        self.snapshots = awaitable(client.snapshots)
        self.maintain = awaitable(client.maintain)
        self.jobs = awaitable(client.jobs)
        self.job = awaitable(client.job)
        self.tag = awaitable(client.tag)
        self.tags = awaitable(client.tags)
        self.drop_tag = awaitable(client.drop_tag)
        self.query_batches = _made(self._batches, client.query_batches)
        self.writer = _made(self._writer, client.writer)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

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
        self._threads.close()

    def _batches(self, make: Callable[[], Batches]) -> AsyncBatches:
        return AsyncBatches(make, self._threads)

    def _writer(self, make: Callable[[], Any]) -> AsyncWriter:
        return AsyncWriter(make())


def _made(wrap: Callable[[Callable[[], Any]], _T], make: Callable[_P, Any]) -> Callable[_P, _T]:
    """With the parameters of `make`, and what `wrap` makes of it."""

    @functools.wraps(make)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return wrap(functools.partial(make, *args, **kwargs))

    return called


class AsyncBatches:
    """`Batches` for `async with` and `async for`; the query is sent at `async with`."""

    def __init__(self, make: Callable[[], Batches], threads: Threads) -> None:
        self._make = make
        self._threads = threads
        self._batches: Batches | None = None

    async def __aenter__(self) -> AsyncBatches:
        self._batches = await self._threads.run(self._make)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def _opened(self) -> Batches:
        if self._batches is None:
            raise RuntimeError("use `async with` first: it sends the query")
        return self._batches

    @property
    def schema(self) -> pa.Schema:
        return self._opened.schema

    @property
    def snapshot_id(self) -> int:
        return self._opened.snapshot_id

    @property
    def token(self) -> str:
        return self._opened.token

    async def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        while (batch := await self._threads.run(self._opened.next)) is not None:
            yield batch

    async def read_all(self) -> pa.Table:
        return await self._threads.run(self._opened.read_all)
