"""A pytest plugin for runs in the copy: the mutated modules import, and from nowhere else.

After collection, when everything that the tests import is there. A failure here ends the run before
any test, which the run tells as an invalid mutant.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

#: Names of modules, with spaces between.
MODULES_VARIABLE = "LAKEBUS_MUTATED_MODULES"


def pytest_collection_finish(session: pytest.Session) -> None:
    for name in os.environ.get(MODULES_VARIABLE, "").split():
        file = importlib.import_module(name).__file__
        if file is None or not Path(file).is_relative_to(session.config.rootpath):
            raise pytest.UsageError(f"{name} was imported from {file}, not from the copy")
