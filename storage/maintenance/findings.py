"""Findings of the validator: the one table of what it can find, and a bounded collection of them.

An `error` is a promise of the contract that is broken. A `warning` is something that an operator
should look at and that breaks none; an `info` costs nothing but room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class FindingKind:
    """One row of the table: what the code means, what to do, whether `lakebus repair` can help."""

    code: str
    severity: Severity
    meaning: str
    hint: str
    repairable: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject` is a kind and a name (`file <id>`, `snapshot 7`, `shard 0`); with its code it names
    the finding to `lakebus repair`."""

    code: str
    severity: Severity
    subject: str
    detail: str
    hint: str

    def to_json(self) -> dict[str, str]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "subject": self.subject,
            "detail": self.detail,
            "hint": self.hint,
        }


_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO
_RESTORE = "Restore the object from a copy of the store, or the lake from a backup."
_REPORT = "Keep the database as it is and report it as a bug; restore a backup if answers suffer."

FINDINGS: Final = tuple(
    FindingKind(*row)
    for row in (
        (
            "missing_object",
            _E,
            "An object that a snapshot needs is not in the object store.",
            "Find a copy and run `lakebus repair --from DIR`, or restore a backup.",
            True,
        ),
        ("size_differs", _E, "An object has another size than the catalog recorded.", _RESTORE),
        ("checksum_differs", _E, "An object has other bytes than were published.", _RESTORE),
        ("unreadable_footer", _E, "An object is not a readable Parquet file.", _RESTORE),
        (
            "unreadable_rows",
            _E,
            "An object has the published bytes, but its rows cannot be read.",
            _REPORT,
        ),
        (
            "footer_rows_differ",
            _E,
            "A file holds another number of rows than the catalog recorded.",
            _REPORT,
        ),
        (
            "schema_differs",
            _E,
            "A file's columns are not those of the schema version it was written with.",
            _REPORT,
        ),
        (
            "statistics_false",
            _E,
            "The catalog's bounds or null counts are not true, so pruning may lose rows.",
            "Run `lakebus repair`: it claims only what the file itself shows.",
            True,
        ),
        (
            "places_differ",
            _E,
            "A file holds rows of positions that were not published when it was.",
            _REPORT,
        ),
        (
            "published_twice",
            _E,
            "A row, or a whole object, is in the newest snapshot of its table twice.",
            _REPORT,
        ),
        ("range_overlap", _E, "Two publications made the same positions terminal.", _REPORT),
        ("range_gap", _E, "Positions below a watermark were never published.", _REPORT),
        (
            "watermark_wrong",
            _E,
            "A watermark is not the end of the terminal prefix, or it went back.",
            _REPORT,
        ),
        ("snapshot_times", _E, "Publication times do not strictly increase.", _REPORT),
        (
            "snapshot_line",
            _E,
            "Snapshots do not follow their parents, or the head is not the newest.",
            _REPORT,
        ),
        (
            "count_differs",
            _E,
            "A snapshot's rows are not the sum of its files, or not those the bus accepted.",
            _REPORT,
        ),
        (
            "dangling_reference",
            _E,
            "A snapshot needs a file that was given up for deletion, or that belongs nowhere.",
            "Stop collection (maintenance.collect) before its objects go, then restore a backup.",
        ),
        (
            "leftover_intent",
            _E,
            "A published file still has its write intent, so it may be taken for an orphan.",
            "Run `lakebus repair`: it removes the intent.",
            True,
        ),
        (
            "tag_without_snapshot",
            _E,
            "A tag names a snapshot that cannot be read.",
            "Run `lakebus repair`: it drops the tag.",
            True,
        ),
        (
            "payload_missing",
            _E,
            "The bytes of accepted rows that are not published yet are gone or damaged.",
            "Put the object back from a copy (`lakebus repair --from DIR`); its entries wait for"
            " it. If there is none: `lakebus repair` gives their rows up.",
            True,
        ),
        (
            "quarantine_payload_missing",
            _E,
            "A quarantined entry has lost its bytes.",
            "Restore a backup to get the rows back, or drop the quarantined entry.",
        ),
        (
            "marker_ahead",
            _E,
            "The object store remembers more publications than the catalog has.",
            "See `lakebus history show`.",
        ),
        (
            "marker_behind",
            _W,
            "The object store's marker was not renewed for minutes, so a rewind may go unnoticed.",
            "Look into the logs for failures of the object store.",
        ),
        (
            "stray_object",
            _W,
            "An object is in the store although it was deleted, or nobody knows it.",
            "Harmless. One that was deleted: `lakebus repair` deletes it again.",
            True,
        ),
        (
            "pin_expired",
            _I,
            "A pin has expired and was not released; it protects nothing.",
            "Harmless: whoever held it ended without a word.",
        ),
    )
)
KINDS: Final[Mapping[str, FindingKind]] = {kind.code: kind for kind in FINDINGS}


@dataclass(slots=True)
class Findings:
    """Keeps the first `limit` findings of each code, and counts them all."""

    limit: int = 100
    kept: list[Finding] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    severities: Counter[Severity] = field(default_factory=Counter)

    def add(
        self, code: str, subject: str, detail: str, *, severity: Severity | None = None
    ) -> None:
        kind = KINDS[code]
        severity = severity or kind.severity
        self.codes[code] += 1
        self.severities[severity] += 1
        if self.codes[code] <= self.limit:
            self.kept.append(Finding(code, severity, subject, detail, kind.hint))

    def report(self) -> dict[str, Any]:
        return {
            "errors": self.severities[Severity.ERROR],
            "warnings": self.severities[Severity.WARNING],
            "infos": self.severities[Severity.INFO],
            "codes": dict(sorted(self.codes.items())),
            "findings": [finding.to_json() for finding in self.kept],
        }
