"""The table of many runs: kept in one JSON file that grows with each run, and shown as Markdown.

It may be cut at any time: a run is added when it is over, atomically, and the next call
goes on with the next seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.kinds import BY_NAME
from tests.chaos.recovery import quantile
from tests.chaos.run import Report


@dataclass(slots=True)
class Results:
    """All runs so far. `felt`: kind → how long each fault of it was felt, and until its kind was
    whole again, in seconds; null where that was not seen before the run ended."""

    machine: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    felt: dict[str, list[tuple[float | None, float | None]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What a file holds; nothing when there is none."""
        if not path.exists():
            return cls()
        document = json.loads(path.read_text())
        felt = {kind: [(a, b) for a, b in pairs] for kind, pairs in document["felt"].items()}
        return cls(document["machine"], document["runs"], felt)

    def write(self, path: Path) -> None:
        """The JSON file, and beside it the same in Markdown; each in one step."""
        document = {"machine": self.machine, "runs": self.runs, "felt": self.felt}
        for target, text in (
            (path, json.dumps(document, indent=1)),
            (path.with_suffix(".md"), self.markdown()),
        ):
            draft = target.with_name(f"{target.name}.{os.getpid()}")
            draft.write_text(text + "\n")
            os.replace(draft, target)

    @property
    def kills(self) -> int:
        """How many times something was killed."""
        return sum(len(pairs) for kind, pairs in self.felt.items() if is_kill(kind))

    @property
    def next_seed(self) -> int:
        return max((run["seed"] for run in self.runs), default=0) + 1

    def add(self, report: Report) -> None:
        self.machine = report.machine
        struck = [row for row in report.faults if not row["missed"]]
        for row in struck:
            self.felt.setdefault(row["kind"], []).append((row["served_again_s"], row["restored_s"]))
        self.runs.append(
            {
                "seed": report.options.seed,
                "placement": report.options.placement.value,
                "kills_only": report.options.kills,
                "seconds": report.options.seconds,
                "commit": report.machine.get("commit"),
                "faults": len(struck),
                "kills": sum(1 for row in struck if is_kill(row["kind"])),
                "operations": {
                    kind: sum(ends.values()) for kind, ends in report.operations.items()
                },
                "evidence": report.evidence,
                "held": report.held,
                "problems": report.problems[:20],
            }
        )

    def markdown(self) -> str:
        """Two tables: what was struck and how long it was felt, and the runs."""
        packages = self.machine.get("packages", {})
        operations = sum(sum(run["operations"].values()) for run in self.runs)
        held = sum(1 for run in self.runs if run["held"])
        lines = [
            "# Chaos runs",
            "",
            f"{len(self.runs)} runs, {held} of which held; {self.kills} kills among"
            f" {sum(len(pairs) for pairs in self.felt.values())} faults; {operations} operations"
            " of clients, each judged by the checker.",
            "",
            f"Machine: {self.machine.get('cores')} cores ({self.machine.get('cpu')}),"
            f" {self.machine.get('memory_gib')} GiB; clients, stack and PostgreSQL on the same"
            f" cores. {', '.join(f'{name} {version}' for name, version in packages.items())}.",
            "",
            "`served`: seconds from the fault until a row that was sent after it was accepted and"
            " read back by its token; faults overlap, so it holds the others' effects, too."
            " `whole`: until as many processes of the kind live as before.",
            "",
            "| fault | times | served p50 | p99 | max | whole p50 | p99 | max |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *self._fault_rows(),
            "",
            "| seed | placement | commit | faults | kills | operations | leases lost | result |",
            "|---:|---|---|---:|---:|---:|---:|---|",
            *(_run_row(run) for run in self.runs),
        ]
        return "\n".join(lines)

    def _fault_rows(self) -> Iterable[str]:
        for kind, pairs in sorted(self.felt.items(), key=lambda item: (-len(item[1]), item[0])):
            cells = [*_spread(served for served, _ in pairs), *_spread(whole for _, whole in pairs)]
            yield f"| {kind} | {len(pairs)} | {' | '.join(cells)} |"


def is_kill(kind: str) -> bool:
    """Whether a process, or the whole stack, was ended by it."""
    known = BY_NAME.get(kind)
    return known is not None and (known.kill_weight > 0 or known.name.startswith("kill_"))


def _spread(values: Iterable[float | None]) -> tuple[str, str, str]:
    known = [value for value in values if value is not None]
    shares = (quantile(known, 0.5), quantile(known, 0.99), max(known, default=None))
    first, second, third = ("-" if value is None else f"{value:.2f}" for value in shares)
    return first, second, third


def _run_row(run: Mapping[str, Any]) -> str:
    lost = run["evidence"].get("leases_lost", 0)
    result = "held" if run["held"] else "; ".join(run["problems"])[:200].replace("|", "/")
    return (
        f"| {run['seed']} | {run['placement']} | {run['commit']} | {run['faults']} | {run['kills']}"
        f" | {sum(run['operations'].values())} | {lost} | {result} |"
    )
