"""The PostgreSQL backend: bus, catalog, keys and hints over one database.

Every write is one call of one server-side function (`storage/sql/functions/`), so that no client
pause can hold a lock and every check is made where the change is made. What comes back from
asyncpg is mapped to lakebus errors in one place (`failures.py`).
"""

from storage.postgres.lake import PostgresLake

__all__ = ["PostgresLake"]
