"""All mutants, by what they break.

Left out, because nothing could notice: `greatest` around the watermark in publish (its loop begins
at the head's own value, under the head's lock), the bounds of the range beside lease and epoch in
its fence (an epoch belongs to one range), and locks on rows that the same statement updates anyway.
"""

from __future__ import annotations

from tests.mutation.mutants import (
    changes,
    deletes,
    files,
    ingest,
    maintenance,
    maintenance_sql,
    memory,
    payloads,
    reading,
    roles,
    speed,
    sql_append,
    sql_claims,
    sql_publish,
)

ALL = (
    *sql_append.MUTANTS,
    *sql_claims.MUTANTS,
    *sql_publish.MUTANTS,
    *memory.MUTANTS,
    *reading.MUTANTS,
    *files.MUTANTS,
    *ingest.MUTANTS,
    *roles.MUTANTS,
    *changes.MUTANTS,
    *deletes.MUTANTS,
    *maintenance_sql.MUTANTS,
    *maintenance.MUTANTS,
    *payloads.MUTANTS,
    *speed.MUTANTS,
)
