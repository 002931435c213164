"""What the jobs of a soak did, by their own records."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.answers import FAULTS
from tests.chaos.database import Superuser

_JOBS = """SELECT kind, state, attempt, requested_by, report::text AS report, error::text AS error,
       extract(epoch FROM started_at)::float8 AS started_s,
       extract(epoch FROM ended_at)::float8 AS ended_s
  FROM lakebus.job ORDER BY created_at, job_id"""
_OUTCOMES = """SELECT s.operation, o.value AS outcome, count(*)::bigint AS times
  FROM lakebus.snapshot s, jsonb_each_text(coalesce(s.summary -> 'outcomes', '{}')) o
 GROUP BY 1, 2 ORDER BY 1, 2"""
_OPERATIONS = (
    "SELECT operation, count(*)::bigint AS times FROM lakebus.snapshot GROUP BY 1 ORDER BY 1"
)
_SUMMED = (
    "swaps", "swaps_lost", "files_in", "files_out", "bytes_in", "bytes_out", "rows_in", "rows_out",
    "rows_removed", "condemned", "orphans", "deleted", "deleted_bytes", "deletes_failed",
    "deleted_rows", "errors", "warnings", "infos",
)  # fmt: skip
_MODULUS = 1 << 128


@dataclass(frozen=True, slots=True)
class JobFact:
    """Times are seconds of the wall clock; None: never."""

    kind: str
    state: str
    attempt: int
    report: Mapping[str, Any]
    error: Mapping[str, Any] | None
    started_s: float | None
    ended_s: float | None


async def jobs_of(superuser: Superuser) -> list[JobFact]:
    return [
        JobFact(
            row["kind"],
            row["state"],
            row["attempt"],
            json.loads(row["report"]),
            None if row["error"] is None else json.loads(row["error"]),
            row["started_s"],
            row["ended_s"],
        )
        for row in await superuser.rows(_JOBS)
    ]


async def outcomes_of(superuser: Superuser) -> dict[str, dict[str, int]]:
    """Snapshots by operation, and commits by how their publication ended."""
    operations = await superuser.rows(_OPERATIONS)
    outcomes = await superuser.rows(_OUTCOMES)
    return {
        "snapshots": {row["operation"]: row["times"] for row in operations},
        "commits": {row["outcome"]: row["times"] for row in outcomes},
    }


def totals(jobs: Iterable[JobFact]) -> dict[str, dict[str, int]]:
    """By kind: how they ended, how often they were begun again, and sums of their reports."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    for job in jobs:
        sums = found[job.kind]
        sums["jobs"] += 1
        sums[job.state] += 1
        sums["begun_again"] += max(0, job.attempt - 1)
        snapshots = job.report.get("snapshots") or {}
        if isinstance(snapshots, Mapping) and snapshots.get("first") is not None:
            sums["snapshots_expired"] += snapshots["last"] - snapshots["first"] + 1
        for name in _SUMMED:
            value = job.report.get(name)
            if isinstance(value, int):
                sums[name] += value
        if job.started_s is not None and job.ended_s is not None:
            seconds[job.kind] += round(job.ended_s - job.started_s)
    return {
        kind: {name: value for name, value in sums.items() if value} | {"seconds": seconds[kind]}
        for kind, sums in sorted(found.items())
    }


def problems_of(jobs: Sequence[JobFact]) -> list[str]:
    """What no job may do: fail by a bug, find an error, lose a row (E1, E6)."""
    problems = []
    for job in jobs:
        report = job.report
        if job.state == "failed" and (job.error or {}).get("code") in FAULTS:
            problems.append(f"a {job.kind} job failed: {job.error}")
        if job.kind == "validate" and report.get("errors"):
            codes = report.get("codes")
            problems.append(f"a validation found {codes}: {_errors(report)}")
        if "hash_sum_before" in report and not _sums_hold(report):
            problems.append(f"the sums of a {job.kind} job do not hold: {_sums(report)}")
        if "rows_in" in report and "rows_out" in report and not job_rows_hold(report):
            problems.append(f"the rows of a {job.kind} job do not hold: {dict(report)}")
    return problems


def compacting(jobs: Iterable[JobFact]) -> list[tuple[float, float]]:
    """When compaction was at work, in seconds of the wall clock."""
    return sorted(
        (job.started_s, job.ended_s)
        for job in jobs
        if job.kind == "compact" and job.started_s is not None and job.ended_s is not None
    )


def job_rows_hold(report: Mapping[str, Any]) -> bool:
    return bool(report["rows_in"] - report.get("rows_removed", 0) == report["rows_out"])


def _sums_hold(report: Mapping[str, Any]) -> bool:
    before, removed, after = _sums(report)
    return before == (removed + after) % _MODULUS


def _sums(report: Mapping[str, Any]) -> tuple[int, int, int]:
    names = ("hash_sum_before", "hash_sum_removed", "hash_sum_after")
    before, removed, after = (int(report.get(name) or "0", 16) for name in names)
    return before, removed, after


def _errors(report: Mapping[str, Any]) -> list[Any]:
    found = [one for one in report.get("findings", []) if one.get("severity") == "error"]
    return found[:5]
