"""Visibility tokens: what a reader must be able to see, as three parts that merge.

A token is (history, snapshot floor, shard → position, own entries) and means "a snapshot of this
history that is not older than the floor and whose watermark covers these positions" (contract,
*Words*). The three parts exist because each alone is wrong somewhere:

* ranges of one shard publish out of order, so visibility runs ahead of the watermark, and a
  snapshot id alone cannot say which entries it holds;
* schema changes and deletes move no position, so positions alone cannot say "after the drop";
* "everything below" cannot say *whose* quarantine matters, so own entries are named (at most 64,
  only in ingest receipts).

Merging takes the maximum of each part and the union of own entries: associative, commutative and
idempotent (D6). Positions are exclusive: `(shard, 7)` asks that positions 0..6 are terminal.

Outside, a token is opaque text: `lb1.` + base64url of the packed fields and a truncated
HMAC-SHA256 (RFC 2104) under the lake's secret. It is not encrypted; it is unforgeable.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lakebus.errors import MalformedToken

OWN_ENTRIES_MAX = 64
_PREFIX = "lb1."
_MAC_BYTES = 16
_HEAD = struct.Struct(">16sQBB")
_PAIR = struct.Struct(">HQ")


@dataclass(frozen=True, slots=True)
class VisibilityToken:
    """`history`: the line of history; `floor`: least snapshot id (0: none);
    `positions`: exclusive position by shard; `own`: (shard, position) of the caller's entries."""

    history: uuid.UUID
    floor: int = 0
    positions: Mapping[int, int] = field(default_factory=dict)
    own: frozenset[tuple[int, int]] = frozenset()

    def merge(self, other: VisibilityToken) -> VisibilityToken:
        """Maximum of each part, union of own entries. Both tokens must be of one history.

        Own entries beyond 64 are dropped highest-first-kept; the positions still cover them, only
        the typed `quarantined` answer for the dropped ones is given up.
        """

        if self.history != other.history:
            raise ValueError("tokens of different histories must be mapped to one first")
        positions = dict(self.positions)
        for shard, position in other.positions.items():
            positions[shard] = max(position, positions.get(shard, 0))
        own = self.own | other.own
        if len(own) > OWN_ENTRIES_MAX:
            own = frozenset(sorted(own, key=lambda e: (e[1], e[0]))[-OWN_ENTRIES_MAX:])
        return VisibilityToken(self.history, max(self.floor, other.floor), positions, own)

    def covered_by(self, snapshot_id: int, watermark: Mapping[int, int]) -> bool:
        """True when a snapshot with this id and watermark (same history) satisfies the token."""

        return snapshot_id >= self.floor and all(
            watermark.get(shard, 0) >= position for shard, position in self.positions.items()
        )


def merge_all(tokens: Iterable[VisibilityToken]) -> VisibilityToken | None:
    merged: VisibilityToken | None = None
    for token in tokens:
        merged = token if merged is None else merged.merge(token)
    return merged


class TokenCodec:
    """Signs and reads tokens with the lake's secret (at least 32 random bytes)."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 32:
            raise ValueError("the token secret needs at least 32 bytes")
        self._secret = secret

    def encode(self, token: VisibilityToken) -> str:
        positions = sorted(token.positions.items())
        own = sorted(token.own)
        parts = [_HEAD.pack(token.history.bytes, token.floor, len(positions), len(own))]
        parts += [_PAIR.pack(shard, position) for shard, position in positions]
        parts += [_PAIR.pack(shard, position) for shard, position in own]
        body = b"".join(parts)
        text = base64.urlsafe_b64encode(body + self._mac(body)).rstrip(b"=")
        return _PREFIX + text.decode("ascii")

    def decode(self, text: str) -> VisibilityToken:
        """Raises MalformedToken for anything this lake's secret did not sign."""

        refusal = MalformedToken("the token is damaged, cut short, or from another lake")
        if not isinstance(text, str) or not text.startswith(_PREFIX) or len(text) > 8192:
            raise refusal
        raw = text[len(_PREFIX) :].encode("ascii", "replace")
        try:
            packed = base64.b64decode(raw + b"=" * (-len(raw) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise refusal from None
        body, mac = packed[:-_MAC_BYTES], packed[-_MAC_BYTES:]
        if len(body) < _HEAD.size or not hmac.compare_digest(mac, self._mac(body)):
            raise refusal
        history, floor, position_count, own_count = _HEAD.unpack_from(body)
        if len(body) != _HEAD.size + (position_count + own_count) * _PAIR.size:
            raise refusal
        pairs = list(_PAIR.iter_unpack(body[_HEAD.size :]))
        return VisibilityToken(
            uuid.UUID(bytes=history),
            floor,
            dict(pairs[:position_count]),
            frozenset(pairs[position_count:]),
        )

    def _mac(self, body: bytes) -> bytes:
        return hmac.new(self._secret, body, hashlib.sha256).digest()[:_MAC_BYTES]
