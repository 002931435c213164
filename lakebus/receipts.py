"""What an accepted ingest request gets back."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from lakebus.clock import format_time


@dataclass(frozen=True, slots=True)
class Receipt:
    """The stored answer to an accepted entry; the same JSON object for ever (contract A2)."""

    batch_id: str
    target: str
    rows: int
    rows_rejected: int
    payload_fingerprint: str
    visibility_token: str
    accepted_at: dt.datetime
    idempotency_expires_at: dt.datetime

    def as_json(self) -> dict[str, object]:
        return {
            "batch_id": self.batch_id,
            "target": self.target,
            "rows": self.rows,
            "rows_rejected": self.rows_rejected,
            "payload_fingerprint": self.payload_fingerprint,
            "visibility_token": self.visibility_token,
            "accepted_at": format_time(self.accepted_at),
            "idempotency_expires_at": format_time(self.idempotency_expires_at),
        }
