"""The report of a run, for people and for programs."""

from __future__ import annotations

from tests.mutation.run import Judged, Report
from tests.mutation.verdicts import End

_HEAD = (
    "| mutant | breaks | statements | file | end | killed by | s |\n|---|---|---|---|---|---|---|"
)


def markdown(report: Report) -> str:
    ends = [judged.verdict.end for judged in report.judged]
    counted = ", ".join(f"{ends.count(end)} {end.value}" for end in End if end in ends)
    lines = [
        "# Mutation run",
        "",
        "Written by `python -m tests.mutation`. Each mutant breaks one promise of the contract in",
        "a copy of the tree; the tests named are those that noticed first.",
        "",
        f"{len(ends)} mutants: {counted or 'none judged'}. The same tests on the tree as it is: "
        f"{report.green or 'green'}. {report.seconds:.0f} s in all.",
        "",
        _HEAD,
        *(_row(judged) for judged in report.judged),
    ]
    return "\n".join(lines) + "\n"


def document(report: Report) -> dict[str, object]:
    return {
        "green": report.green or True,
        "green_s": round(report.green_seconds, 1),
        "seconds": round(report.seconds, 1),
        "mutants": [
            {
                "name": judged.mutant.name,
                "statements": list(judged.mutant.statements),
                "breaks": judged.mutant.breaks,
                "files": list(judged.mutant.files),
                "end": judged.verdict.end.value,
                "killed_by": judged.verdict.test,
                "detail": judged.verdict.detail,
                "seconds": round(judged.seconds, 1),
            }
            for judged in report.judged
        ],
    }


def _row(judged: Judged) -> str:
    mutant, verdict = judged.mutant, judged.verdict
    file, _, test = verdict.test.rpartition("/")[2].partition("::")
    told = f"{test} ({file})" if verdict.end is End.KILLED else verdict.detail
    cells = (
        f"`{mutant.name}`",
        mutant.breaks,
        " ".join(mutant.statements),
        " ".join(mutant.files),
        verdict.end.value,
        told,
        f"{judged.seconds:.1f}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
