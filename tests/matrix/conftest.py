"""Fixtures of the matrix: one template with failpoints a session, a new lake a test."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from cluster.migrate import upgrade
from lakebus.schemas import TableSchema
from storage.postgres import lake as lake_module
from tests.failpoints.sql import install_sql_failpoints
from tests.matrix.rig import MATRIX_SETTINGS, MatrixBackend, MatrixLake
from tests.postgres_server import drop_database, fresh_database, run_elsewhere

#: Opens a lake with the matrix's settings, changed by keyword.
OpenMatrixLake = Callable[..., Awaitable[MatrixLake]]


@pytest.fixture(scope="session")
def matrix_backend(postgres_dsn: str) -> Iterator[MatrixBackend]:
    template = fresh_database(postgres_dsn)
    try:
        run_elsewhere(lambda: upgrade(template))
        run_elsewhere(lambda: install_sql_failpoints(template))
        yield MatrixBackend(template)
    finally:
        drop_database(template)


@pytest.fixture
def patient_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lakes opened after this let a transaction live for a minute: a test may hold one at a
    failpoint for as long as this machine needs, where the product would have the server end it."""
    monkeypatch.setattr(lake_module, "LOCKING_TRANSACTION_MS", 60_000)


@pytest.fixture
async def open_matrix_lake(matrix_backend: MatrixBackend) -> AsyncIterator[OpenMatrixLake]:
    async with AsyncExitStack() as stack:

        async def make(**changes: Any) -> MatrixLake:
            settings = dataclasses.replace(MATRIX_SETTINGS, **changes)
            return await stack.enter_async_context(matrix_backend.open(settings))

        yield make


@pytest.fixture
async def matrix_lake(open_matrix_lake: OpenMatrixLake) -> MatrixLake:
    return await open_matrix_lake()


@pytest.fixture
async def matrix_table(matrix_lake: MatrixLake) -> TableSchema:
    return await matrix_lake.create()
