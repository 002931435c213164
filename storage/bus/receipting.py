"""Receipts: one pure function, so that every backend answers with the same object (contract A2).

A receipt says which entry was accepted and carries the token that makes its rows readable. It is
made once, at acceptance, from facts that are stored with the entry, and never computed again.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid

from lakebus.receipts import Receipt
from lakebus.tokens import TokenCodec, VisibilityToken
from storage.bus.interface import BATCH_ID_PATTERN

_BATCH_ID = re.compile(BATCH_ID_PATTERN)

#: Names the hash of the payload's identity (A4); a new hash gets a new prefix, never this one.
FINGERPRINT_VERSION = "v1"


def make_batch_id(*, history_serial: int, shard: int, position: int) -> str:
    return f"b{history_serial}-{shard}-{position}"


def parse_batch_id(batch_id: str) -> tuple[int, int, int] | None:
    """(history serial, shard, position), or None when the text is no batch id."""

    match = _BATCH_ID.fullmatch(batch_id)
    if match is None:
        return None
    serial, shard, position = (int(group) for group in match.groups())
    if position >= 2**63:
        return None
    return serial, shard, position


def entry_token(*, history: uuid.UUID, shard: int, position: int) -> VisibilityToken:
    """The token that asks for exactly this entry to be terminal, and owns it."""

    return VisibilityToken(
        history=history,
        floor=0,
        positions={shard: position + 1},
        own=frozenset({(shard, position)}),
    )


def make_receipt(
    *,
    codec: TokenCodec,
    history: uuid.UUID,
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
    """The receipt of an accepted entry; `fingerprint` is the 32 bytes of the payload's identity."""

    token = entry_token(history=history, shard=shard, position=position)
    return Receipt(
        batch_id=make_batch_id(history_serial=history_serial, shard=shard, position=position),
        target=target,
        rows=rows,
        rows_rejected=rows_rejected,
        payload_fingerprint=f"{FINGERPRINT_VERSION}:{fingerprint.hex()}",
        visibility_token=codec.encode(token),
        accepted_at=accepted_at,
        idempotency_expires_at=expires_at,
    )
