"""lakebus: a lakehouse written to over HTTP and read with SQL, with the promises of a database.

Importing this package is light on purpose: no ray, no duckdb, no pyarrow.
"""

__version__ = "0.1.0"
