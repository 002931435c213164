"""Whose row is it: rows that name their request, and the SQL that groups a table by request.

A recorded table has the columns `request`, `row_number` and `check_value` (bigint, nullable or
not), and any others. The check of a row is a CRC of everything that identifies it, so that the sum
over a group tells a missing and a doubled row apart, and one variant of a request from another.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from tests.history.record import Groups

#: (name, SQL type) of the columns every recorded table has.
COLUMNS = (("request", "bigint"), ("row_number", "bigint"), ("check_value", "bigint"))


def row_check(request: int, variant: int, table: str, row: int) -> int:
    """32 bits that depend on everything that identifies a row."""

    return zlib.crc32(f"{request}:{variant}:{table}:{row}".encode())


def rows_of(request: int, table: str, count: int, *, variant: int = 0) -> list[dict[str, int]]:
    """The rows to send."""

    return [
        {"request": request, "row_number": n, "check_value": row_check(request, variant, table, n)}
        for n in range(count)
    ]


def group_of(request: int, table: str, count: int, *, variant: int = 0) -> tuple[int, int]:
    """(rows, sum of checks) that a read must see of a request, all or nothing."""

    head = f"{request}:{variant}:{table}:"
    return count, sum(zlib.crc32(f"{head}{n}".encode()) for n in range(count))


def group_sql(tables: Sequence[str], window: tuple[int, int] | None = None) -> str:
    """One statement over all tables: rows of (table number, request, rows, sum of checks)."""

    where = ""
    if window is not None:
        where = f" WHERE request >= {int(window[0])} AND request < {int(window[1])}"
    selects = [
        f"SELECT {number} AS n, request, count(*) AS row_count, "
        f"CAST(sum(check_value) AS bigint) AS check_sum FROM {table}{where} GROUP BY request"
        for number, table in enumerate(tables)
    ]
    return " UNION ALL ".join(selects)


def groups_of(tables: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Groups]:
    """The answer to `group_sql` as `Rows.tables`; numbers may be text, as JSON answers have them.

    A row that carries no request (null) is foreign; it is kept as request -1, which nobody sent.
    """

    found: dict[str, Groups] = {table: {} for table in tables}
    for number, request, row_count, check_sum in rows:
        whose = -1 if request is None else int(request)
        found[tables[int(number)]][whose] = (int(row_count), int(check_sum or 0))
    return found


def groups_of_rows(rows: Iterable[tuple[int, int]]) -> Groups:
    """From single rows as (request, check), for readers without SQL."""

    found: Groups = {}
    for request, check in rows:
        count, total = found.get(request, (0, 0))
        found[request] = (count + 1, total + check)
    return found
