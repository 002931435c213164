"""Seven columns of telemetry-like rows, every row different, as ready request bodies."""

from __future__ import annotations

import json
import random

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


def json_body(first_event: int, rows: int, rng: random.Random) -> bytes:
    """One JSON array of rows with ids first_event…; about 200 bytes a row."""

    return json.dumps(
        [
            {
                "event_id": first_event + number,
                "device": rng.randrange(10_000),
                "region": rng.choice(REGIONS),
                "ts": f"2026-03-{1 + rng.randrange(28):02d}T{rng.randrange(24):02d}:"
                f"{rng.randrange(60):02d}:{rng.randrange(60):02d}.{rng.randrange(10**6):06d}",
                "value": rng.gauss(20.0, 7.0),
                "amount": f"{rng.randrange(10**9) / 10**4:.4f}",
                "note": " ".join(rng.choices(WORDS, k=6)),
            }
            for number in range(rows)
        ],
        ensure_ascii=False,
    ).encode()
