"""What an ingest request is, what it is answered, and what an operator tunes about it."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

from lakebus.receipts import Receipt
from storage.ingesting.grants import Principal
from storage.rows.decoded import OnInvalid

#: The target of a request to several tables; no table can have this name.
SEVERAL_TABLES = "*"


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """`rows_max`: rows of one request. `schema_tries`: how often a request is decoded again because
    its table changed in between. `pause_s`: between two looks at something that is not over."""

    rows_max: int = 1_000_000
    schema_tries: int = 5
    table_cache_age_s: float = 1.0
    pause_s: float = 0.2


@dataclass(frozen=True, slots=True)
class IngestRequest:
    """One request at the door: `body` is whole and inflated.

    `table` is None for several tables at once; `boundary` cuts their parts if the body is
    multipart. With `create`, tables that do not exist are made from the rows. `deadline_s` is on
    the monotonic clock and bounds the append and the wait together.
    """

    principal: Principal
    table: str | None
    media_type: str
    body: bytes = field(repr=False)
    deadline_s: float
    idempotency_key: str | None = None
    first_attempt_at: dt.datetime | None = None
    ordering_key: str | None = None
    wait_visible: bool = False
    on_invalid: OnInvalid = "reject"
    create: bool = False
    boundary: str = ""

    @property
    def target(self) -> str:
        return SEVERAL_TABLES if self.table is None else self.table


@dataclass(frozen=True, slots=True)
class IngestAnswer:
    """The receipt, and beside it what concerns this call alone (A2).

    `visible` is True when the call waited and a snapshot covers the rows; `snapshot_id` is it.
    `columns_skipped`: columns of the body without any value that the table does not have.
    """

    receipt: Receipt
    replayed: bool = False
    visible: bool = False
    snapshot_id: int | None = None
    columns_skipped: tuple[str, ...] = ()
