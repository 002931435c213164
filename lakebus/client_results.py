"""What the client's calls answer, and what reads hold on to so that they see their own writes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lakebus.client_arrow import Batches, pandas_of, polars_of, table_of
from lakebus.client_values import python_rows
from lakebus.receipts import Receipt

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Sent:
    """The answer to an ingest call: the receipt, and what concerns the call."""

    receipt: Receipt
    replayed: bool
    visible: bool
    snapshot_id: int | None
    columns_skipped: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        return self.receipt.visibility_token


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer has receipts for so far. `tokens` cover all of it: they are those of its latest
    batches, and all batches of a writer are on one shard, where later means above (contract A7)."""

    rows: int
    batches: int
    replayed: int
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a query. `columns` are (name, SQL type); `token` chains reads (contract D6).

    `rows` are the values as the API writes them: decimals, times, uuids and blobs are text. Iterate
    it, or `fetchall`, for tuples of Python's own values; `to_arrow`, `to_pandas`, `to_polars` give
    columns. For large answers `Client.query_arrow` and `query_batches` are faster.
    """

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

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.fetchall())

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Tuples of bool, int, float, str, Decimal, bytes, UUID, date, time, datetime (with zone
        UTC for timestamptz), list, dict. Maps are dicts, or lists of (key, value) where the keys
        are lists or structs. What Python cannot hold (year 10000) stays text."""

        return python_rows(self.columns, self.rows)

    def to_arrow(self) -> pa.Table:
        """Raises PackageMissing, and FixRequest for values that Python cannot hold."""

        return table_of(self.columns, self.rows)

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises as `to_arrow`."""

        return pandas_of(self.to_arrow())

    def to_polars(self) -> Any:
        """A polars DataFrame. Raises as `to_arrow`."""

        return polars_of(self.to_arrow())


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
_Carrier = str | Sent | Receipt | Written | Result | Batches | Changes | Deleted | Erased
#: What a query is to see: tokens, or answers that carry one.
After = _Carrier | Sequence[_Carrier] | None


def tokens_of(after: After) -> list[str]:
    """Raises ValueError for what carries no token, or none yet."""

    if after is None:
        return []
    if isinstance(after, _Carrier):
        return _tokens(after)
    return [token for item in after for token in _tokens(item)]


def _tokens(item: _Carrier) -> list[str]:
    if isinstance(item, str):
        return [item]
    if isinstance(item, Written):
        return list(item.tokens)
    if not isinstance(item, _Carrier):
        raise ValueError(f"a {type(item).__name__} carries no token")
    token = item.visibility_token if isinstance(item, Receipt) else item.token
    if token is None:
        raise ValueError("a delete that is not done carries no token yet: wait for its end")
    return [token]
