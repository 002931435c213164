"""Seven columns of telemetry-like rows, every row different, as ready request bodies.

Standard library only: programs of peers make the same rows in an environment of their own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

COLUMNS = [
    {"name": "event_id", "type": "bigint", "nullable": False},
    {"name": "device", "type": "integer"},
    {"name": "region", "type": "varchar"},
    {"name": "ts", "type": "timestamp"},
    {"name": "value", "type": "double"},
    {"name": "amount", "type": "decimal(18,4)"},
    {"name": "note", "type": "varchar"},
]
REGIONS = ("north-east", "south-west", "centre", "overseas", "unknown")
WORDS = ("pump", "valve", "sensor", "restart", "threshold", "exceeded", "ok", "recalibrated", "ü")

#: The first event of request n of a load is `(FIRST_REQUEST + n) * 1000`: a fixed number of digits,
#: so that a body can be made from another by replacing bytes.
FIRST_REQUEST = 10**9
ROWS_MAX = 1_000
#: Requests of a load that its warm-up may use before the counted ones.
REQUESTS_APART = 10**7


def rows_of(first_event: int, rows: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows with ids first_event…, as JSON takes them."""

    for number in range(rows):
        yield {
            "event_id": first_event + number,
            "device": rng.randrange(10_000),
            "region": rng.choice(REGIONS),
            "ts": f"2026-03-{1 + rng.randrange(28):02d}T{rng.randrange(24):02d}:"
            f"{rng.randrange(60):02d}:{rng.randrange(60):02d}.{rng.randrange(10**6):06d}",
            "value": rng.gauss(20.0, 7.0),
            "amount": f"{rng.randrange(10**9) / 10**4:.4f}",
            "note": " ".join(rng.choices(WORDS, k=6)),
        }


def json_body(first_event: int, rows: int, rng: random.Random) -> bytes:
    """One JSON array of rows with ids first_event…; about 200 bytes a row."""

    return json.dumps(list(rows_of(first_event, rows, rng)), ensure_ascii=False).encode()


def ndjson_body(first_event: int, rows: int, rng: random.Random) -> bytes:
    """The same, a row a line."""

    lines = (json.dumps(row, ensure_ascii=False) for row in rows_of(first_event, rows, rng))
    return ("\n".join(lines) + "\n").encode()


class Template:
    """A body whose ids are replaced for each request: microseconds, and all its rows are new."""

    def __init__(self, rows: int, rng: random.Random, *, lines: bool = False) -> None:
        make = ndjson_body if lines else json_body
        if rows > ROWS_MAX:
            raise ValueError(f"a template has at most {ROWS_MAX} rows")
        mark = FIRST_REQUEST
        self._mark = b'"event_id": %d' % mark
        self._body = make(mark * ROWS_MAX, rows, rng)
        if self._body.count(self._mark) != rows:
            raise ValueError("the mark of a template is not unique")

    def body(self, request: int) -> bytes:
        return self._body.replace(self._mark, b'"event_id": %d' % (FIRST_REQUEST + request))

    def __len__(self) -> int:
        return len(self._body)
