"""What a wiring gives back to the Ray host that ran it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any


async def nothing_to_tend() -> str | None:
    """For applications without actors of their own."""
    return None


@dataclass(frozen=True, slots=True)
class Deployed:
    """Where the application answers.

    `ingest_url` is the direct door for rows, `query_url` the one for SQL, if there are any.
    `api_key` is the key of the local profile (None: there is none). `tend` is called every
    `tend_s`: it revives what nobody else would, and says what it did.
    """

    url: str
    api_key: str | None
    tend: Callable[[], Coroutine[Any, Any, str | None]] = nothing_to_tend
    tend_s: float = 1.0
    ingest_url: str | None = None
    query_url: str | None = None
