"""Quotas that are a key's own: what its principal may take with it, in place of the settings'.

Only what is given is stored; the rest is the settings' (section `limits`). 0 means no quota. They
are rates of the whole stack, and `queries_at_once` of one replica.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lakebus.errors import MalformedRequest

_HIGHEST = {
    "requests_per_s": 1_000_000,
    "ingest_bytes_per_s": 1024**4,
    "queries_at_once": 256,
}


@dataclass(frozen=True, slots=True)
class Quotas:
    """None: what the settings say. 0: no quota."""

    requests_per_s: float | None = None
    ingest_bytes_per_s: int | None = None
    queries_at_once: int | None = None


NO_QUOTAS = Quotas()


def quotas_from_json(document: object) -> Quotas:
    """Reads `{"requests_per_s": 50, "ingest_bytes_per_s": 1048576}`. Raises MalformedRequest."""

    if not isinstance(document, dict) or not set(document) <= set(_HIGHEST):
        raise MalformedRequest(f"quotas have the members {', '.join(_HIGHEST)} and no others")
    for name, value in document.items():
        _check(name, value)
    return Quotas(**document)


def quotas_as_json(quotas: Quotas) -> dict[str, float]:
    """The form in which quotas are stored and shown: what is given."""

    values = {field.name: getattr(quotas, field.name) for field in fields(quotas)}
    return {name: value for name, value in values.items() if value is not None}


def _check(name: str, value: object) -> None:
    highest = _HIGHEST[name]
    whole = name != "requests_per_s"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (isinstance(value, int) or not whole) and _between(value, highest):
        return
    kind = "whole number" if whole else "number"
    raise MalformedRequest(f"the quota {name} is a {kind}, 0 (no quota) to {highest}")


def _between(value: object, highest: int) -> bool:
    assert isinstance(value, int | float)
    return math.isfinite(value) and 0 <= value <= highest
