"""What decoding a body gives: one batch of good rows, and the rows that did not fit.

Also the collector that both slow passes (JSON and Arrow) report through, so that the shape of
`rows_invalid` and of reject sets is written once (contract A10).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from lakebus.errors import RowsInvalid

OnInvalid = Literal["reject", "quarantine"]

ERRORS_REPORTED_MAX = 100
ERROR_VALUE_CHARACTERS_MAX = 80
_NAME_CHARACTERS_MAX = 80


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one value does not fit. `row` counts from 0; `column` is None for the row itself."""

    row: int
    column: str | None
    reason: str
    value: str | None

    def as_json(self) -> dict[str, object]:
        return {
            "row": self.row,
            "column": self.column,
            "reason": self.reason,
            "value": self.value,
        }


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that was diverted. `value` is the row as JSON text, in UTF-8."""

    row: int
    errors: tuple[RowError, ...]
    value: bytes


@dataclass(frozen=True, slots=True)
class DecodedRows:
    """`batch` has one field a column in schema order, named by column id."""

    batch: pa.RecordBatch
    rejected: tuple[RejectedRow, ...] = ()


@dataclass(slots=True)
class ErrorReport:
    """Collects errors in row order; keeps the first ones, counts all."""

    table: str
    kept: list[RowError] = field(default_factory=list)
    error_count: int = 0
    bad_rows: int = 0

    def add_row(self, errors: list[RowError]) -> None:
        self.bad_rows += 1
        self.error_count += len(errors)
        room = ERRORS_REPORTED_MAX - len(self.kept)
        if room > 0:
            self.kept.extend(errors[:room])

    def as_exception(self) -> RowsInvalid:
        first = self.kept[0]
        where = f"row {first.row}" + (f", column {first.column}" if first.column else "")
        return RowsInvalid(
            f"{self.bad_rows} of the rows for table {self.table} do not fit, nothing was stored; "
            f"the first: {where}: {first.reason}",
            errors=[error.as_json() for error in self.kept],
            error_count=self.error_count,
        )


def shorten(text: str) -> str:
    """A value as errors show it: short, and always encodable as UTF-8."""

    if len(text) > ERROR_VALUE_CHARACTERS_MAX:
        text = text[:ERROR_VALUE_CHARACTERS_MAX] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten_name(text: str) -> str:
    """A key of the caller as errors show it."""

    return text[:_NAME_CHARACTERS_MAX].encode("utf-8", "backslashreplace").decode("utf-8")
