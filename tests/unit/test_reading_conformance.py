"""Section D of the contract over the lake in memory."""

from __future__ import annotations

import pytest

from tests.conformance.fixtures import lake, open_lake, table  # noqa: F401 (fixtures)
from tests.conformance.reading import *  # noqa: F403
from tests.unit.reading_rig import MemoryBackend


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()
