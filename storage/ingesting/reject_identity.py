"""Diverted rows in the identity of a payload: other bad rows are another payload (contract A4).

A row that does not fit has no values to hash, only text. It is hashed as parsed JSON, so spaces
and the order of members do not enter; numbers stay as written. Where two spellings of one bad
row are told apart by this, the retry gets a conflict, never somebody else's receipt.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from storage.rows.decoded import RejectedRow

_DOMAIN = b"lakebus.payload.rejects.v1\0"
_TABLE = struct.Struct("<cQQ")
_ROW = struct.Struct("<cQQ")


class _Object(list[tuple[str, Any]]):
    """The members of an object, with repeated names."""


class _Number(str):
    """A number as written."""

    __slots__ = ()


def with_rejected(identity: bytes, rejected: Mapping[int, Sequence[RejectedRow]]) -> bytes:
    """The identity of a payload whose good rows have `identity`; `rejected` is by table id."""

    digest = hashlib.sha256(_DOMAIN)
    digest.update(identity)
    for table_id, rows in sorted(rejected.items()):
        digest.update(_TABLE.pack(b"T", table_id, len(rows)))
        for row in rows:
            text = _canonical(row.value)
            digest.update(_ROW.pack(b"R", row.row, len(text)))
            digest.update(text)
    return digest.digest()


def _canonical(text: bytes) -> bytes:
    try:
        value = json.loads(
            text,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_Number,
            object_pairs_hook=_Object,
        )
        return _spelled(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return text


def _spelled(value: Any) -> str:
    """Every kind begins with another character, so no two values share a spelling."""

    if isinstance(value, _Object):
        members = sorted(f"{json.dumps(name)}:{_spelled(inner)}" for name, inner in value)
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_spelled, value)) + "]"
    if isinstance(value, _Number):
        return "#" + value
    return json.dumps(value)
