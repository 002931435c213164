"""The fixtures of the suite. A backend's test module defines `backend` and imports these."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from lakebus.schemas import TableSchema
from tests.conformance.harness import SUITE_SETTINGS, Backend, LakeHarness

#: Opens a lake with the suite's settings, changed by keyword.
OpenLake = Callable[..., Awaitable[LakeHarness]]


@pytest.fixture
async def open_lake(backend: Backend) -> AsyncIterator[OpenLake]:
    async with AsyncExitStack() as stack:

        async def make(**changes: Any) -> LakeHarness:
            settings = dataclasses.replace(SUITE_SETTINGS, **changes)
            return await stack.enter_async_context(backend.open(settings))

        yield make


@pytest.fixture
async def lake(open_lake: OpenLake) -> LakeHarness:
    return await open_lake()


@pytest.fixture
async def table(lake: LakeHarness) -> TableSchema:
    return await lake.create()
