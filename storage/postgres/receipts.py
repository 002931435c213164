"""Receipts and key records out of database rows."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping

import asyncpg

from lakebus.receipts import Receipt
from lakebus.tokens import TokenCodec
from storage.bus.interface import KeyRecord
from storage.bus.receipting import make_receipt


class ReceiptMaker:
    """Knows the histories by serial; the receipt's identity is in `storage.bus.receipting`."""

    def __init__(self, *, codec: TokenCodec, histories: Mapping[int, uuid.UUID]) -> None:
        self._codec = codec
        self._histories = histories

    def make(
        self,
        *,
        history_serial: int,
        shard: int,
        position: int,
        target: str,
        rows: int,
        rows_rejected: int,
        fingerprint: bytes,
        accepted_at: dt.datetime,
        expires_at: dt.datetime,
    ) -> Receipt:
        return make_receipt(
            codec=self._codec,
            history=self._histories[history_serial],
            history_serial=history_serial,
            shard=shard,
            position=position,
            target=target,
            rows=rows,
            rows_rejected=rows_rejected,
            fingerprint=fingerprint,
            accepted_at=accepted_at,
            expires_at=expires_at,
        )

    def record(self, row: asyncpg.Record) -> KeyRecord:
        """A row of `find_keys`."""

        receipt = self.make(
            history_serial=row["history_serial"],
            shard=row["shard"],
            position=row["lo"] + row["place"] - 1,
            target=row["target"],
            rows=row["row_count"],
            rows_rejected=row["reject_count"],
            fingerprint=row["fingerprint"],
            accepted_at=row["accepted_at"],
            expires_at=row["expires_at"],
        )
        versions = (pair.split(":") for pair in row["schema_versions"].split(",") if pair)
        return KeyRecord(receipt, row["fingerprint"], {int(t): int(v) for t, v in versions})
