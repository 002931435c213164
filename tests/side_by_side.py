"""How the tests are spread when several processes run them (`make test`, pytest-xdist).

Half of the suite waits for something (a lease that expires, a process that starts), so two
processes end it sooner than one, even on two cores. What may not run beside itself stays together:
all that starts Ray is one unit, so a machine never carries two clusters, and it comes first, being
the longest. A file is a unit elsewhere, so that what its tests share is made once; the conformance
suite, one file for each backend, is cut at its functions.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

RAY = (
    "tests/acceptance/",
    "tests/integration/test_actors_ray.py",
    "tests/integration/test_jobs_ray.py",
)
"""Where a Ray cluster is started: files with the mark `ray` (a test looks for others)."""
CUT_AT_FUNCTIONS = "tests/test_conformance_"


def unit_of(nodeid: str) -> str:
    """The unit that a test is handed out with."""
    file = nodeid.partition("::")[0]
    if file.startswith(RAY):
        return "ray"
    if file.startswith(CUT_AT_FUNCTIONS):
        return nodeid.partition("[")[0]
    return file


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Units as `unit_of` says, handed out in the order of the collection."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> SideBySide:
    """Asked by pytest-xdist; `tests/conftest.py` makes it known."""
    return SideBySide(config, log)
