"""Reading: from a token and a snapshot choice to files, and from SQL to an answer (contract D).

Business logic only: no HTTP, no Ray, no SQL of the catalog. It stands on four seams: the catalog
and the bus (interfaces), the object store, and the engine that runs a locked DuckDB.
"""
