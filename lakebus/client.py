"""The Python client: rows in, answers out, with the retries that the contract makes safe.

Standard library only, so that importing it stays light; pyarrow, pandas and polars are used when
they are there and asked for. Every write carries an idempotency key and the time of its first
attempt, so a retry after a lost connection, a 503 or an unknown outcome ends in exactly one entry
(contract A3, A6, A13).

::

    lake = lakebus.connect("http://127.0.0.1:8350", api_key)
    lake.create_table("events", {"id": "bigint", "note": "varchar"})
    sent = lake.ingest("events", [{"id": 1, "note": "hello"}])
    answer = lake.query("SELECT * FROM events", after=sent)

`Client` may be used by several threads. `AsyncClient` runs the same code in threads, so there is
one implementation and no twin to keep alike. Each kind of call has its file: tables, ingest,
deletes, erasures, query, admin; how calls are made is in `client_calls`.
"""

from __future__ import annotations

from typing import Any

from lakebus.client_admin import Administration
from lakebus.client_async import AsyncClient
from lakebus.client_calls import TIMEOUT_S
from lakebus.client_deletes import Deletes
from lakebus.client_erasures import Erasures
from lakebus.client_ingest import Ingesting
from lakebus.client_query import Queries
from lakebus.client_rows import Rows
from lakebus.client_tables import Tables

__all__ = ["TIMEOUT_S", "AsyncClient", "Client", "Rows", "connect", "connect_async"]


def connect(
    url: str,
    api_key: str,
    *,
    timeout_s: float = TIMEOUT_S,
    ingest_url: str | None = None,
    query_url: str | None = None,
) -> Client:
    """A client; connections are made when needed. `url` is the address of the server, or "ray" in a
    job on the Ray cluster that serves lakebus: then calls go through Ray (`lakebus.client_ray`).
    Rows, waits for them and queries take the server's direct doors by themselves where there are
    any; `ingest_url` and `query_url` name them, instead of learning them from the server, and `url`
    itself in their place means not to use one.

    Raises MalformedRequest for a bad URL, or outside of a Ray cluster, and PackageMissing.
    """

    return Client(url, api_key, timeout_s=timeout_s, ingest_url=ingest_url, query_url=query_url)


def connect_async(
    url: str,
    api_key: str,
    *,
    timeout_s: float = TIMEOUT_S,
    ingest_url: str | None = None,
    query_url: str | None = None,
    calls_max: int = 32,
) -> AsyncClient:
    """The same for `await`; at most `calls_max` calls at once, further ones wait."""

    client = connect(url, api_key, timeout_s=timeout_s, ingest_url=ingest_url, query_url=query_url)
    return AsyncClient(client, calls_max=calls_max)


class Client(Tables, Ingesting, Deletes, Queries, Administration, Erasures):
    """See the module. `timeout_s` is the budget of one call, retries included."""

    def __enter__(self) -> Client:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is its address and its key: tasks in other processes make their own calls."""

        api_key = self._authorization.removeprefix("Bearer ")
        return _again, (self.url, api_key, self._timeout_s, self._ingest_url, self._query_url)

    def __exit__(self, *_: object) -> None:
        self.close()


def _again(
    url: str, api_key: str, timeout_s: float, ingest_url: str | None, query_url: str | None
) -> Client:
    return connect(url, api_key, timeout_s=timeout_s, ingest_url=ingest_url, query_url=query_url)
