"""Names of columns and fields as callers write them, in the form in which they are known."""

from __future__ import annotations

_FOLD = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def fold(name: str) -> str:
    """Lower case by ASCII only, without asking whether it is a name."""

    return name.translate(_FOLD)
