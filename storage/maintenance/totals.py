"""What jobs that swap files add up and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from storage.maintenance.jobs import LAST_FRUITFUL_ATTEMPT, Job
from storage.maintenance.rewriting import RowSum
from storage.maintenance.swapping import SwapDone

#: Lines of a list in a report; the rest is only counted.
LINES_MAX: Final = 1_000
_SUMMED: Final = (
    "swaps",
    "files_in",
    "files_out",
    "bytes_in",
    "bytes_out",
    "rows_in",
    "rows_out",
    "rows_removed",
    "seconds",
    "spilled_bytes",
)
_MB: Final = 1_000_000


@dataclass(slots=True)
class SwapTotals:
    """Sums over the swaps of one attempt of a job. `before` and `after` are of rows that were read
    and written; files that went whole were not read."""

    swaps: int = 0
    files_in: int = 0
    files_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rows_in: int = 0
    rows_out: int = 0
    rows_removed: int = 0
    before: RowSum = field(default_factory=lambda: RowSum(0, 0))
    after: RowSum = field(default_factory=lambda: RowSum(0, 0))
    removed: RowSum = field(default_factory=lambda: RowSum(0, 0))
    seconds: float = 0.0
    spilled_bytes: int = 0
    lost: int = 0
    snapshot_id: int | None = None
    skipped: list[Mapping[str, object]] = field(default_factory=list)

    def add(self, done: SwapDone) -> None:
        self.swaps += 1
        self.files_in += done.files_in
        self.files_out += done.files_out
        self.bytes_in += done.bytes_in
        self.bytes_out += done.bytes_out
        self.rows_in += done.rows_in
        self.rows_out += done.rows_out
        self.rows_removed += done.rows_removed
        self.before += done.before
        self.after += done.after
        self.removed += done.removed
        self.seconds += done.seconds
        self.spilled_bytes += done.spilled_bytes
        self.snapshot_id = done.snapshot_id

    def skip(self, table: str, reason: str) -> None:
        if len(self.skipped) < LINES_MAX:
            self.skipped.append({"table": table, "reason": reason})

    def report(self, job: Job) -> dict[str, Any]:
        """Of the whole job: with what its earlier attempts had noted."""

        whole = self._with(job.report)
        rate = whole.bytes_in / _MB / whole.seconds if whole.seconds else 0.0
        fruitful = job.attempt if self.swaps else job.report.get(LAST_FRUITFUL_ATTEMPT, 0)
        return {**whole._told(), "mb_per_s": round(rate, 2), LAST_FRUITFUL_ATTEMPT: fruitful}

    def _with(self, noted: Mapping[str, Any]) -> SwapTotals:
        sums = {name: getattr(self, name) + noted.get(name, 0) for name in _SUMMED}
        hashes = {
            name: getattr(self, name) + RowSum(0, int(noted.get(f"hash_sum_{name}", "0"), 16))
            for name in ("before", "removed", "after")
        }
        skipped = [*noted.get("skipped", ()), *self.skipped][:LINES_MAX]
        last = noted.get("snapshot_id") if self.snapshot_id is None else self.snapshot_id
        lost = self.lost + noted.get("swaps_lost", 0)
        return SwapTotals(**sums, **hashes, lost=lost, snapshot_id=last, skipped=skipped)

    def _told(self) -> dict[str, Any]:
        return {
            "swaps": self.swaps,
            "files_in": self.files_in,
            "files_out": self.files_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "rows_removed": self.rows_removed,
            "hash_sum_before": hash_text(self.before),
            "hash_sum_removed": hash_text(self.removed),
            "hash_sum_after": hash_text(self.after),
            "seconds": round(self.seconds, 3),
            "spilled_bytes": self.spilled_bytes,
            "swaps_lost": self.lost,
            "snapshot_id": self.snapshot_id,
            "skipped": list(self.skipped),
        }


def hash_text(rows: RowSum) -> str:
    return f"{rows.hash_sum:032x}"
