"""The fixtures of failpoints, which tests/conftest.py hands to every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.failpoints.folder import FailpointFolder
from tests.failpoints.points import Failpoints


@pytest.fixture
def failpoints() -> Iterator[Failpoints]:
    """Failpoints of this process; fails when one was armed and never reached."""
    with Failpoints() as points:
        yield points


@pytest.fixture
def failpoint_folder(tmp_path: Path) -> Iterator[FailpointFolder]:
    """Failpoints of child processes started with `failpoint_folder.environment()`."""
    with FailpointFolder(tmp_path / "failpoints") as folder:
        yield folder
