"""Batches for peers: the rows of `benchmarks.data` in the form each peer takes most readily.

The form is made before a clock starts; only the ids are new for each batch, as in our own load.
"""

from __future__ import annotations

import datetime as dt
import random
from decimal import Decimal
from typing import Any

from benchmarks import data


def first_event(request: int) -> int:
    """Requests have a thousand ids each, as in our own load."""

    return (data.FIRST_REQUEST + request) * data.ROWS_MAX


def arrow_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("event_id", pa.int64(), nullable=False),
            pa.field("device", pa.int32()),
            pa.field("region", pa.string()),
            pa.field("ts", pa.timestamp("us")),
            pa.field("value", pa.float64()),
            pa.field("amount", pa.decimal128(18, 4)),
            pa.field("note", pa.string()),
        ]
    )


def values_of(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "ts": dt.datetime.fromisoformat(row["ts"]),
        "amount": Decimal(row["amount"]),
    }


class ArrowBatches:
    """Arrow tables of `rows` rows; a pool of them, whose ids are replaced."""

    def __init__(self, *, rows: int, seed: int, pool: int) -> None:
        import pyarrow as pa

        self._pa, self._rows = pa, rows
        rng = random.Random(seed)
        self._pool = [
            pa.Table.from_pylist(
                [values_of(row) for row in data.rows_of(0, rows, rng)], schema=arrow_schema()
            )
            for _ in range(pool)
        ]

    def batch(self, request: int) -> Any:
        """Ids of as many requests as the rows need: a commit of 6,400 rows has those of 7."""

        pa = self._pa
        first = first_event(request)
        ids = pa.array(range(first, first + self._rows), pa.int64())
        table = self._pool[request % len(self._pool)]
        return table.set_column(0, table.schema.field(0), ids)


class TupleBatches:
    """Tuples, for COPY."""

    def __init__(self, *, rows: int, seed: int, pool: int) -> None:
        rng = random.Random(seed)
        self._pool = [
            [tuple(values_of(row).values())[1:] for row in data.rows_of(0, rows, rng)]
            for _ in range(pool)
        ]

    def batch(self, request: int) -> list[tuple[Any, ...]]:
        first = first_event(request)
        rest = self._pool[request % len(self._pool)]
        return [(first + number, *row) for number, row in enumerate(rest)]
