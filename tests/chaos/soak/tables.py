"""The tables of the soak: one partitioned and clustered, one that forgets, one with deletes.

Their rows are functions of request and row number, but for the time of the one that forgets. All of
them are written by recorded requests only, like every table of a chaos run.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from lakebus.clock import format_time
from tests.history.rows import COLUMNS, rows_of

READINGS, RECENT, LEDGER = "readings", "recent", "ledger"
KEPT_ROWS_S = 40

Row = dict[str, Any]
_EPOCH = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
_DAYS, _SENSORS, _NOTES = 3, 40, 7


@dataclass(frozen=True, slots=True)
class SoakTable:
    """`document`: for `POST /v1/tables`; `rows`: of (request, count)."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: Callable[[int, int], list[Row]]
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def document_columns(self) -> list[dict[str, str]]:
        return [{"name": name, "type": kind} for name, kind in (*COLUMNS, *self.columns)]


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """A row of the table that is deleted from, as the model has it."""

    request: int
    row: int
    check: int
    grp: int
    cents: int
    note: str | None


def reading_rows(request: int, count: int) -> list[Row]:
    return [
        base
        | {
            "sensor": f"s{(request * 7 + base['row_number']) % _SENSORS}",
            "noted_at": format_time(
                _EPOCH
                + dt.timedelta(
                    days=request % _DAYS,
                    seconds=(request * 31) % 86_400,
                    microseconds=base["row_number"],
                )
            ),
            "value": ((request * 131 + base["row_number"] * 17) % 100_003) / 7.0,
        }
        for base in rows_of(request, READINGS, count)
    ]


def recent_rows(request: int, count: int) -> list[Row]:
    """Of now: call it once for a request, and send the same again."""
    now = dt.datetime.now(dt.UTC)
    return [
        base
        | {
            "noted_at": format_time(now - dt.timedelta(milliseconds=base["row_number"])),
            "value": ((request * 17 + base["row_number"]) % 10_007) / 3.0,
        }
        for base in rows_of(request, RECENT, count)
    ]


def ledger_models(request: int, count: int) -> list[LedgerRow]:
    return [
        LedgerRow(
            request,
            base["row_number"],
            base["check_value"],
            (request + base["row_number"] * 3) % 10,
            (request * 7919 + base["row_number"] * 104_729) % 100_000,
            _note(request, base["row_number"]),
        )
        for base in rows_of(request, LEDGER, count)
    ]


def ledger_rows(request: int, count: int) -> list[Row]:
    return [
        {
            "request": one.request,
            "row_number": one.row,
            "check_value": one.check,
            "grp": one.grp,
            "amount": str(Decimal(one.cents).scaleb(-2)),
            "note": one.note,
        }
        for one in ledger_models(request, count)
    ]


def _note(request: int, row: int) -> str | None:
    kind = (request * 5 + row) % _NOTES
    return None if kind == 0 else f"n{kind}"


TABLES: tuple[SoakTable, ...] = (
    SoakTable(
        READINGS,
        (("sensor", "varchar"), ("noted_at", "timestamptz"), ("value", "double")),
        reading_rows,
        {
            "partition_by": ["day(noted_at)", "bucket(3, sensor)"],
            "sort_by": ["zorder(request, value)"],
        },
    ),
    SoakTable(
        RECENT,
        (("noted_at", "timestamptz"), ("value", "double")),
        recent_rows,
        {
            "sort_by": ["noted_at"],
            "retention": {"rows": {"column": "noted_at", "for": f"{KEPT_ROWS_S} seconds"}},
        },
    ),
    SoakTable(
        LEDGER,
        (("grp", "bigint"), ("amount", "decimal(18,2)"), ("note", "varchar")),
        ledger_rows,
        {"sort_by": ["grp"]},
    ),
)
BY_NAME = {table.name: table for table in TABLES}
