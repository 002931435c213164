"""lakebus: a lakehouse written to over HTTP and read with SQL, with the promises of a database.

::

    import lakebus

    with lakebus.connect("http://127.0.0.1:8350", api_key) as lake:
        sent = lake.ingest("events", [{"id": 1}])
        print(lake.query("SELECT count(*) FROM events", after=sent).value())

Importing this package is light on purpose: no ray, no duckdb, no pyarrow, and not even the client,
which comes with the first look at one of its names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lakebus.client import Client, connect, connect_async
    from lakebus.client_async import AsyncClient
    from lakebus.client_results import Result, Sent, Written
    from lakebus.errors import LakebusError
    from lakebus.receipts import Receipt
    from lakebus.writer import Writer
    from lakebus.writer_async import AsyncWriter

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncWriter",
    "Client",
    "LakebusError",
    "Receipt",
    "Result",
    "Sent",
    "Writer",
    "Written",
    "connect",
    "connect_async",
]

_HOME = {
    "AsyncClient": "lakebus.client_async",
    "AsyncWriter": "lakebus.writer_async",
    "Client": "lakebus.client",
    "LakebusError": "lakebus.errors",
    "Receipt": "lakebus.receipts",
    "Result": "lakebus.client_results",
    "Sent": "lakebus.client_results",
    "Writer": "lakebus.writer",
    "Written": "lakebus.client_results",
    "connect": "lakebus.client",
    "connect_async": "lakebus.client",
}


def __getattr__(name: str) -> Any:
    """PEP 562: servers import this package too, and need no client."""

    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'lakebus' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
