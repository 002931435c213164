"""Ways for the bytes of a body to go wrong."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_TOKENS = (
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\0", b"\n", b"\r", b" ", b"-", b".", b"e"),
    *(b"null", b"true", b"\\u", b"\\ud800", b'\\"', b"\xef\xbb\xbf", b"\x1f", b"\x7f", b"\x80"),
    *(b"\xc0\xaf", b"\xc2", b"\xe2\x82", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xf4\x90\x80\x80"),
    *(b"\xff", b"\xfe\xff", b"9" * 30, b"\0" * 64),
)


def damaged(body: bytes, chance: Random) -> bytes:
    """The body after one to three accidents."""

    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        body = chance.choice(_ACCIDENTS)(body, chance)
    return body


def _cut(body: bytes, chance: Random) -> bytes:
    return body[: chance.randint(0, len(body))]


def _lost(body: bytes, chance: Random) -> bytes:
    start = chance.randint(0, len(body))
    return body[:start] + body[start + chance.choice((1, 1, 2, 8, 40)) :]


def _doubled(body: bytes, chance: Random) -> bytes:
    start = chance.randint(0, len(body))
    end = start + chance.choice((1, 2, 8, 60))
    return body[:end] + body[start:]


def _inserted(body: bytes, chance: Random) -> bytes:
    place = chance.randint(0, len(body))
    return body[:place] + chance.choice(_TOKENS) + body[place:]


def _overwritten(body: bytes, chance: Random) -> bytes:
    place, token = chance.randint(0, len(body)), chance.choice(_TOKENS)
    return body[:place] + token + body[place + len(token) :]


def _flipped(body: bytes, chance: Random) -> bytes:
    if not body:
        return b"{"
    place = chance.randrange(len(body))
    return body[:place] + bytes([body[place] ^ 1 << chance.randrange(8)]) + body[place + 1 :]


_ACCIDENTS: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_cut, _lost, _doubled, _inserted, _overwritten, _flipped),
)
