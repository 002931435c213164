"""Fixtures that every test may take, and how tests are spread over processes.

The failpoints come first: a module of the product that was imported before them has none.
"""

from __future__ import annotations

import tests.failpoints.installed  # noqa: F401 - for what it does
from tests.bucket_server import bucket, bucket_server
from tests.failpoints.fixtures import failpoint_folder, failpoints
from tests.postgres_server import database_dsn, postgres_dsn
from tests.side_by_side import pytest_xdist_make_scheduler

__all__ = [
    "bucket",
    "bucket_server",
    "database_dsn",
    "failpoint_folder",
    "failpoints",
    "postgres_dsn",
    "pytest_xdist_make_scheduler",
]
