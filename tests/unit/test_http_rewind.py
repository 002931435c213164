"""F4 at the HTTP doors: a catalog that went back in time is said so by every one of them.

The same over a database that was rolled back for real: `tests/matrix/test_rewind.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import pytest

from lakebus.errors import HistoryRewound
from tests.unit.http_rig import EVENTS, Server, problem, server


@asynccontextmanager
async def rewound() -> AsyncIterator[Server]:
    """A server with a table, a key that is known, and then a catalog that refuses everything."""

    async with server() as lake:
        await lake.create()
        await lake.get("/v1/tables")

        async def refuse(*_: Any) -> NoReturn:
            raise HistoryRewound("an operator must decide", retry_after_s=5.0)

        lake.lake.reach = refuse  # type: ignore[method-assign]
        yield lake


@pytest.mark.parametrize(
    ("method", "path", "document"),
    [
        ("GET", "/readyz", None),
        ("GET", "/v1/tables", None),
        ("GET", "/v1/tables/events", None),
        ("GET", "/v1/snapshots", None),
        ("GET", "/v1/snapshots/latest", None),
        ("GET", "/v1/query?sql=select%201%20from%20events", None),
        ("POST", "/v1/query", {"sql": "select 1 from events"}),
        ("POST", "/v1/tables", EVENTS | {"name": "more"}),
        ("POST", "/v1/tables/events/rows", [{"id": 1}]),
    ],
)
async def test_F4_every_door_says_that_the_catalog_went_back(
    method: str, path: str, document: object
) -> None:
    async with rewound() as lake:
        body = {} if document is None else {"json": document}
        answer = await lake.http.request(method, path, headers=lake.headers(), **body)  # type: ignore[arg-type]
        said = problem(answer, 503, "history_rewound")
        assert said["retryable"] is False
        assert answer.headers["retry-after"] == "5"
        assert said["detail"] == "an operator must decide"


async def test_F4_the_process_itself_is_alive() -> None:
    async with rewound() as lake:
        assert (await lake.get("/healthz")).status_code == 200
