"""The conformance suite on PostgreSQL: a real server, real time, the suite as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.fixtures import *  # noqa: F403
from tests.conformance.harness import Backend
from tests.conformance.machine import run_machine
from tests.conformance.postgres import postgres_backend
from tests.conformance.suite import *  # noqa: F403


@pytest.fixture(scope="module")
def backend(postgres_dsn: str) -> Iterator[Backend]:
    with postgres_backend(postgres_dsn) as backend:
        yield backend


@pytest.mark.slow
def test_C2_random_histories(backend: Backend) -> None:
    run_machine(backend, histories=10, steps=40)
