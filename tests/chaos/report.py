"""A report in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tests.chaos.recovery import quantile
from tests.chaos.run import Report
from tests.chaos.soak.side import Told
from tests.chaos.verdict import shown as first_of


def shown(report: Report) -> str:
    """What is printed at the end of a run."""
    options = report.options
    packages = report.machine["packages"]
    lines = [
        f"seed {options.seed}, placement {options.placement}, {options.seconds:.0f} s of faults",
        f"commit {report.machine['commit']}, {packages}",
        f"started in {report.start_s} s, served {report.served_after_s} s after the last fault,"
        f" drained {report.drained_after_s} s later",
        "operations:",
    ]
    for kind, ends in report.operations.items():
        told = ", ".join(f"{end} {count}" for end, count in ends.items())
        lines.append(f"  {kind:<7} {told}")
    lines += ["faults (seconds until served again, until whole again):", *_fault_lines(report)]
    if report.soak is not None:
        lines += ["maintenance:", *_soak_lines(report.soak)]
    if report.evidence:
        lines.append("metrics: " + ", ".join(f"{k} {v}" for k, v in report.evidence.items()))
    lines += [report.verdict, f"kept in {report.folder}"]
    if report.held:
        return "\n".join([*lines, "HELD"])
    return "\n".join([*lines, "DID NOT HOLD:", *(f"  {one}" for one in first_of(report.problems))])


def _fault_lines(report: Report) -> Iterable[str]:
    by_kind: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in report.faults:
        by_kind[row["kind"]].append(row)
    for kind, rows in sorted(by_kind.items()):
        struck = [row for row in rows if not row["missed"]]
        missed = f", {len(rows) - len(struck)} missed" if len(struck) < len(rows) else ""
        served = _spread(row["served_again_s"] for row in struck)
        whole = _spread(row["restored_s"] for row in struck)
        yield f"  {kind:<28} {len(struck):>4}{missed}   served {served}   whole {whole}"


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{quantile(known, 0.5)} / {max(known)}"


def _soak_lines(told: Told) -> Iterable[str]:
    yield f"  rows acknowledged {told.rows_acknowledged}, publications {told.publications}"
    for name, what in told.clients.items():
        yield f"  {name}: {what}"
    for kind, sums in told.jobs.items():
        yield f"  {kind}: " + ", ".join(f"{name} {value}" for name, value in sums.items())
    for table, numbers in told.files.get("tables", {}).items():
        yield f"  files of {table}: {numbers}"
    yield f"  lake: most {told.files.get('lake_max')}, at the end {told.files.get('lake_at_end')}"
    yield f"  validation at the end: {dict(told.validation)}"
    for name, figures in told.latencies.items():
        yield f"  {name}: {figures}"
