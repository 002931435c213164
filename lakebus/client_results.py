"""What the client's calls answer, and what reads hold on to so that they see their own writes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lakebus.receipts import Receipt


@dataclass(frozen=True, slots=True)
class Sent:
    """The answer to an ingest call: the receipt, and what concerns the call."""

    receipt: Receipt
    replayed: bool
    visible: bool
    snapshot_id: int | None

    @property
    def token(self) -> str:
        return self.receipt.visibility_token


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a query. `columns` are (name, SQL type); `token` chains reads (contract D6)."""

    columns: tuple[tuple[str, str], ...]
    rows: list[list[Any]]
    snapshot_id: int
    snapshot_time: dt.datetime
    token: str
    statistics: Mapping[str, Any]

    def as_dicts(self) -> list[dict[str, Any]]:
        names = [name for name, _ in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def value(self) -> Any:
        """The only value of an answer with one row and one column. Raises ValueError."""

        if len(self.rows) != 1 or len(self.columns) != 1:
            raise ValueError("the answer is not a single value")
        return self.rows[0][0]


@dataclass(frozen=True, slots=True)
class Changes:
    """A page of a table's changes, in order of (`$shard`, `$position`, `$row`) (contract D12).

    `cursor` leads to the next page of the window (after, until]; None: this is the last one, and
    `until` is what to ask after next time.
    """

    columns: tuple[tuple[str, str], ...]
    rows: list[list[Any]]
    after: int
    until: int
    cursor: str | None
    token: str

    def as_dicts(self) -> list[dict[str, Any]]:
        names = [name for name, _ in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Deleted:
    """The answer to a delete (contract E7). Until it is `done` the numbers and `token` are None.

    `snapshot_id` took the rows away; when no row matched, and as a dry run, it is the snapshot
    that was looked at, like `evaluated_at_snapshot_id` always.
    """

    job_id: str
    done: bool
    replayed: bool
    dry_run: bool
    snapshot_id: int | None
    evaluated_at_snapshot_id: int | None
    rows: int | None
    token: str | None


@dataclass(frozen=True, slots=True)
class Erased:
    """The answer to an erasure (contract E7). Until it is `done` the numbers and `token` are None.

    `rows`: what the snapshot that lost most has lost; `report` tells of all snapshots, files,
    objects, quarantine and the bus.
    """

    job_id: str
    done: bool
    replayed: bool
    dry_run: bool
    snapshot_id: int | None
    rows: int | None
    token: str | None
    report: dict[str, Any]


#: An answer that carries a token, or the token itself.
_Carrier = str | Sent | Result | Deleted | Erased
#: What a query is to see: tokens, or answers that carry one.
After = _Carrier | Sequence[_Carrier] | None


def tokens_of(after: After) -> list[str]:
    alone = isinstance(after, (str, Sent, Result, Deleted, Erased))
    items: list[_Carrier] = [after] if alone else list(after or ())  # type: ignore[list-item,arg-type]
    tokens = [item if isinstance(item, str) else item.token for item in items]
    if None in tokens:
        raise ValueError("a delete that is not done carries no token yet: wait for its end")
    return [token for token in tokens if token is not None]
