"""Frames between the engine's parent and its child: length, kind, payload.

The parent treats the child as hostile (it runs strangers' SQL in native code), so payloads are
msgpack with declared types, never pickle, and a frame's length is bounded.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

HEAD = struct.Struct("<IB")
FRAME_BYTES_MAX = 64 << 20

RUN, PARSE, INTERRUPT, PING = 1, 2, 3, 4
READY, HEADER, DATA, END, ERROR, PARSED = 16, 17, 18, 19, 20, 21


class WireSource(msgspec.Struct, frozen=True, array_like=True):
    name: str
    columns: tuple[str, ...]
    relation_sql: str


class RunRequest(msgspec.Struct, frozen=True, array_like=True):
    """`sequence` tells apart the queries that one lane runs after each other.

    `parameters` is JSON text, because msgpack has no integers beyond 64 bits; empty for none.
    """

    sequence: int
    sql: str
    parameters: str
    sources: tuple[WireSource, ...]
    result_format: str
    integers: str
    rows_max: int
    bytes_max: int
    deterministic: bool
    started_at: str


class ParseRequest(msgspec.Struct, frozen=True, array_like=True):
    sql: str


class InterruptRequest(msgspec.Struct, frozen=True, array_like=True):
    lane: int
    sequence: int


class Ready(msgspec.Struct, frozen=True, array_like=True):
    duckdb_version: str
    functions: int


class Header(msgspec.Struct, frozen=True, array_like=True):
    columns: tuple[tuple[str, str], ...]


class End(msgspec.Struct, frozen=True, array_like=True):
    row_count: int
    execute_ms: float


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """`internal` is for our log only: it may hold paths and our SQL."""

    code: str
    detail: str
    members: dict[str, Any]
    internal: str = ""


class WireTravel(msgspec.Struct, frozen=True, array_like=True):
    unit: str
    literal: str | None
    parameter: str | None
    tables: tuple[str, ...]
    tree: bytes


class ParsedReply(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    tables: tuple[str, ...]
    parameters: tuple[str, ...]
    positional: bool
    reads_clock: bool
    tree: bytes
    described: tuple[str, ...]
    listings: tuple[str, ...]
    travels: tuple[WireTravel, ...]


def frame(kind: int, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(payload), kind) + payload


encode = msgspec.msgpack.Encoder().encode
