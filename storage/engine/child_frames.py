"""Blocking reads of frames, for the child's threads."""

from __future__ import annotations

import socket

from storage.engine.wire import FRAME_BYTES_MAX, HEAD


def read_frame(channel: socket.socket) -> tuple[int, bytes] | None:
    """(kind, payload), or None when the parent has closed the socket."""

    head = _read(channel, HEAD.size)
    if head is None:
        return None
    length, kind = HEAD.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise ValueError("frame too long")
    payload = _read(channel, length) if length else b""
    return None if payload is None else (kind, payload)


def _read(channel: socket.socket, length: int) -> bytes | None:
    first = channel.recv(length)
    if len(first) == length:
        return first
    parts, have = [first], len(first)
    while first and have < length:
        first = channel.recv(length - have)
        parts.append(first)
        have += len(first)
    return b"".join(parts) if have == length else None
