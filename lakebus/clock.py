"""Clock and identities, injected so that tests and simulations own time and chance.

Nothing in lakebus decides a lease, an order or a visibility by these clocks: the database's clock
does (contract B5, C4). They pace local loops and stamp logs.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import random
import secrets
import time
import uuid
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float: ...

    def utc_now(self) -> dt.datetime: ...

    async def sleep_s(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def utc_now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC)

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def new_uuid() -> uuid.UUID:
    """A random identity; never guessable, never reused."""

    return uuid.UUID(bytes=secrets.token_bytes(16), version=4)


def new_id_text() -> str:
    """The text of such an identity, for less than half of the time."""

    text = secrets.token_hex(15)
    return f"{text[:8]}-{text[8:12]}-4{text[12:15]}-a{text[15:18]}-{text[18:]}"


class Chance(Protocol):
    """Where new identities and the spread of waits come from."""

    def new_uuid(self) -> uuid.UUID: ...

    def jitter(self) -> float:
        """Uniform in [0, 1): keeps the waits of many processes apart; decides nothing."""
        ...


class SystemChance:
    """The machine's randomness."""

    def new_uuid(self) -> uuid.UUID:
        return new_uuid()

    def jitter(self) -> float:
        return random.random()


SYSTEM_CHANCE = SystemChance()


def format_time(value: dt.datetime) -> str:
    """RFC 3339 in UTC with microseconds, the one form in which the API answers times."""

    # What is accepted together has one time. Only UTC is looked up: equal times of one other zone
    # may differ, where clocks are turned back.
    return _known_utc(value) if value.tzinfo is dt.UTC else _as_text(value)


def _as_text(value: dt.datetime) -> str:
    # As strftime would, in a third of the time, and with four digits of every year.
    return value.astimezone(dt.UTC).isoformat(timespec="microseconds")[:-6] + "Z"


_known_utc = functools.lru_cache(maxsize=256)(_as_text)


def parse_time(text: str) -> dt.datetime:
    """Reads an RFC 3339 time with a zone. Raises ValueError; finer than microseconds is refused.

    Source of the form: RFC 3339, section 5.6.
    """

    body = text.strip()
    if "." in body:
        fraction = body.split(".", 1)[1]
        digits = len(fraction) - len(fraction.lstrip("0123456789"))
        if digits > 6:
            raise ValueError("times are kept to microseconds; the value has finer digits")
    value = dt.datetime.fromisoformat(body)
    if value.tzinfo is None:
        raise ValueError("the time has no zone; write it like 2026-01-31T12:00:00Z")
    return value.astimezone(dt.UTC)
