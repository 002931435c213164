"""Request bodies: read with their bytes counted, inflated with the inflated bytes counted.

Nothing is stored before the body is whole, so a client that goes away in the middle leaves nothing
behind. Limits hold before the bytes exist wherever that is possible (A11): a declared length over
the limit is refused unread, a stream is refused at the first byte too many, and a decompressor is
never asked for more than what is left of the limit.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Iterator
from typing import TypeVar

import msgspec
import pyarrow as pa

from lakebus.errors import (
    BodyTooLarge,
    MalformedBody,
    MalformedRequest,
    Unavailable,
    UnsupportedMediaType,
)
from serve_app.calls import Call, media_type_of
from serve_app.limits import Allowance
from serve_app.limits_bytes import ByteBudget, Reservation

T = TypeVar("T")

DOCUMENT_BYTES_MAX = 1024 * 1024
_CODINGS = ("gzip", "zstd", "lz4")
_LENGTH_DIGITS_MAX = 19
#: Inflating more than this is done beside the event loop; below, the hop costs more than the work.
_INFLATE_INLINE_BYTES = 16 * 1024
_INFLATE_STEP_BYTES = 1024 * 1024
_FEED_BYTES = 64 * 1024


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(
    call: Call,
    *,
    limit_bytes: int,
    deadline_s: float,
    reservation: Reservation,
    allowance: Allowance | None = None,
) -> bytes:
    """The whole body, inflated. `allowance`: what counts its bytes, where they are rows.

    Raises BodyTooLarge, Backpressure, RateLimited, MalformedBody, UnsupportedMediaType, Unavailable
    (the body did not arrive in time), ClientGone.
    """

    coding = _coding_of(call)
    declared = _declared_length(call)
    if declared is not None and declared > limit_bytes:
        raise _too_large(limit_bytes)
    here = _at_hand(call, declared, reservation, allowance) if coding is None else None
    if here is not None:
        return here
    try:
        async with asyncio.timeout_at(_loop_time(deadline_s)):
            if declared is not None:
                await reservation.grow_to(declared)
                if allowance is not None:
                    await allowance.grow_to(declared)
            body = await _receive_all(call, limit_bytes, reservation, allowance)
            if coding is None:
                return body
            plain = await _inflate(body, coding, limit_bytes, reservation)
            if allowance is not None:
                await allowance.grow_to(len(plain))
            return plain
    except TimeoutError:
        raise Unavailable(
            "the body did not arrive within timeout_ms; nothing was stored", phase="body"
        ) from None


def _at_hand(
    call: Call, declared: int | None, reservation: Reservation, allowance: Allowance | None
) -> bytes | None:
    """A body of a known length that is there and has room: nothing is waited for, so it needs no
    timer. None: something has to be waited for."""

    if declared is None or allowance is not None or not reservation.take_at_once(declared):
        return None
    return call.body_at_hand()


def _loop_time(deadline_s: float) -> float:
    return asyncio.get_running_loop().time() + deadline_s - time.monotonic()


async def read_document(call: Call, kind: type[T], *, deadline_s: float) -> T:
    """A small JSON body as `kind`. Raises MalformedBody for bad JSON, MalformedRequest for members
    that are unknown or of the wrong type."""

    media_type_of(call, ("application/json",))
    with ByteBudget(DOCUMENT_BYTES_MAX).reserve() as reservation:
        body = await read_body(
            call, limit_bytes=DOCUMENT_BYTES_MAX, deadline_s=deadline_s, reservation=reservation
        )
    return decode_document(body, kind)


def decode_document(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise MalformedRequest(f"the body does not have the members expected: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBody(f"the body is not JSON in UTF-8: {str(error)[:200]}") from None


def refuse_nul(value: object, name: str) -> None:
    """For what is stored as text, which has no NUL in a database. Raises MalformedRequest."""

    if isinstance(value, str):
        if "\0" in value:
            raise MalformedRequest(f"{name} holds the character NUL, which cannot be stored")
    elif isinstance(value, dict):
        refuse_nul(list(value), name)
        refuse_nul(list(value.values()), name)
    elif isinstance(value, list):
        for item in value:
            refuse_nul(item, name)


def _coding_of(call: Call) -> str | None:
    given = call.joined_header(b"content-encoding")
    if not given:
        return None
    text = given.lower()
    text = "gzip" if text == "x-gzip" else text
    if text == "identity":
        return None
    if text not in _CODINGS:
        raise UnsupportedMediaType(
            f"the content encoding {text[:80]!r} is not supported; use one of "
            f"{', '.join(_CODINGS)}, once",
            supported=list(_CODINGS),
        )
    return text


def _declared_length(call: Call) -> int | None:
    text = call.header(b"content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _LENGTH_DIGITS_MAX):
        raise MalformedRequest("Content-Length must be a whole number of bytes")
    return int(text)


async def _receive_all(
    call: Call, limit_bytes: int, reservation: Reservation, allowance: Allowance | None
) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await call.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        await reservation.grow_to(size)
        if allowance is not None:
            await allowance.grow_to(size)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _inflate(body: bytes, coding: str, limit_bytes: int, reservation: Reservation) -> bytes:
    """Step by step, so that the limit and the budget are asked before each next megabyte."""

    steps = _gunzip(body) if coding == "gzip" else _expand(body, coding)
    inline = len(body) <= _INFLATE_INLINE_BYTES
    parts: list[bytes] = []
    size = 0
    while part := next(steps, b"") if inline else await asyncio.to_thread(next, steps, b""):
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        await reservation.grow_to(len(body) + size)
        parts.append(part)
        inline = inline and size < _INFLATE_STEP_BYTES
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _gunzip(body: bytes) -> Iterator[bytes]:
    """The members of a gzip file (RFC 1952). Fed in slices, so that many small members do not
    make it copy the rest of the body for each."""

    view, place = memoryview(body), 0
    while place < len(view):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            fed: bytes | memoryview = member.unconsumed_tail
            if not fed:
                fed = view[place : place + _FEED_BYTES]
                place += len(fed)
            try:
                part = member.decompress(fed, _INFLATE_STEP_BYTES)
            except zlib.error as error:
                raise _not_inflated("gzip", error) from None
            if part:
                yield part
            elif not fed and not member.eof:
                raise _not_inflated("gzip", "it is cut short")
        place -= len(member.unused_data)


def _expand(body: bytes, coding: str) -> Iterator[bytes]:
    try:
        with pa.CompressedInputStream(pa.BufferReader(body), coding) as stream:
            while part := stream.read(_INFLATE_STEP_BYTES):
                yield part
    except OSError as error:
        raise _not_inflated(coding, error) from None


def _not_inflated(coding: str, why: object) -> MalformedBody:
    return MalformedBody(
        f"the body is not {coding}, as its Content-Encoding says: {str(why)[:120]}"
    )


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body is larger than {limit_bytes} bytes (after decompression); send it in parts, "
        "each with an idempotency key of its own",
        limit_bytes=limit_bytes,
    )
