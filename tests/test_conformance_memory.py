"""The conformance suite on the in-memory lake, the model of the contract."""

from __future__ import annotations

import pytest

from tests.conformance.fixtures import *  # noqa: F403
from tests.conformance.harness import Backend
from tests.conformance.machine import run_machine
from tests.conformance.memory import MemoryBackend
from tests.conformance.suite import *  # noqa: F403

#: Readers poll and wait by the process's clock, so their lake's clock must run as well.
_LIVE = (
    "tests.conformance.deletes",
    "tests.conformance.erasures",
    "tests.conformance.nested",
    "tests.conformance.reading",
    "tests.conformance.querying",
    "tests.conformance.sql_surface",
)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    return MemoryBackend(live=request.function.__module__ in _LIVE)


def test_C2_random_histories() -> None:
    run_machine(MemoryBackend(), histories=100, steps=60)
