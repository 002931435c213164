"""Fixtures that every test may take."""

from __future__ import annotations

from tests.postgres_server import database_dsn, postgres_dsn

__all__ = ["database_dsn", "postgres_dsn"]
