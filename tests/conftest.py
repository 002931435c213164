"""Fixtures that every test may take.

The failpoints come first: a module of the product that was imported before them has none.
"""

from __future__ import annotations

import tests.failpoints.installed  # noqa: F401 - for what it does
from tests.failpoints.fixtures import failpoint_folder, failpoints
from tests.postgres_server import database_dsn, postgres_dsn

__all__ = ["database_dsn", "failpoint_folder", "failpoints", "postgres_dsn"]
