"""The report of a run: one table of goals, then each benchmark with its conditions and figures.

Written again after every turn, so that a run which is cut short leaves what it had.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals.context import Context
from benchmarks.goals.judging import Judged, Spread, Verdict
from benchmarks.goals.rows import Benchmark, Row
from benchmarks.goals.turns import Turns

#: Figures of a contender that the details show, where it has them.
_DETAILS = (
    ("rows_per_s", "rows/s"),
    ("ack_ms_p50", "ack p50 ms"),
    ("ack_ms_p99", "ack p99 ms"),
    ("visible_ms_p50", "visible p50 ms"),
    ("visible_ms_p99", "visible p99 ms"),
    ("queries_per_s", "queries/s"),
    ("query_ms_p50", "p50 ms"),
    ("query_ms_p99", "p99 ms"),
    ("load_cpu_us_per_request", "load generator, CPU µs a request"),
    ("load_share_of_a_core", "load generator, share of a core"),
    ("client_cpu_us_per_request", "peer's client, CPU µs a commit"),
    ("cores_of_others", "everybody else, cores"),
    ("cores_of_our_stack_beside", "our stack beside it, cores"),
)


class Report:
    """Collects benchmarks and writes `report.md` and a JSON file for each of them."""

    def __init__(
        self,
        out: Path,
        about: dict[str, Any],
        *,
        command: str,
        quick: bool,
        goals: frozenset[str] | None = None,
    ) -> None:
        self._out, self._about, self._command, self._quick = out, about, command, quick
        self._goals = goals
        self._found: list[tuple[Benchmark, Turns]] = []
        self._plots: list[str] = []
        self._running = ""

    def begin(self, benchmark: Benchmark, context: Context) -> Turns:
        turns = Turns(self.write, context.cpu_seconds)
        self._found.append((benchmark, turns))
        self._running = benchmark.name
        return turns

    def done(self) -> None:
        self._running = ""
        self.write()

    def plotted(self, names: Sequence[str]) -> None:
        self._plots = list(names)
        self.write()

    def rows(self) -> list[Row]:
        return [row for benchmark, turns in self._found for row in self._judged(benchmark, turns)]

    def _judged(self, benchmark: Benchmark, turns: Turns) -> list[Row]:
        """Without what nobody asked for and nothing was found of."""

        return [
            row
            for row in benchmark.judge(turns)
            if self._goals is None
            or row.goal in self._goals
            or row.judged.verdict is not Verdict.NOT_MEASURED
        ]

    def write(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        for benchmark, turns in self._found:
            document = {
                "benchmark": benchmark.name,
                "goals": benchmark.goals,
                "quick": self._quick,
                "command": self._command,
                "machine": self._about,
                "conditions": benchmark.conditions,
                "rows": [row.as_json() for row in self._judged(benchmark, turns)],
                **turns.as_json(),
            }
            text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            _replace(self._out / f"{benchmark.name}.json", text)
        _replace(self._out / "report.md", self.text())

    def text(self) -> str:
        lines = ["# Goals, measured beside peers", "", *self._head(), ""]
        lines += goal_table(self.rows())
        for name in self._plots:
            lines += ["", f"![{name}]({name})"]
        for benchmark, turns in self._found:
            lines += ["", f"## {benchmark.name} ({', '.join(benchmark.goals)})", ""]
            lines += [f"Measured: {benchmark.measures}.", ""]
            lines += [*(f"- {line}" for line in benchmark.conditions.splitlines()), ""]
            lines += (benchmark.details or details)(turns)
            lines += failures(turns)
        return "\n".join(lines) + "\n"

    def _head(self) -> list[str]:
        about = self._about
        versions = ", ".join(f"{name} {text}" for name, text in about["packages"].items())
        lines = [
            f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, kernel "
            f"{about['kernel']}, Python {about['python']}; {versions}; commit {about['commit']}; "
            f"load average {about['load_average_at_start']} at the start.",
        ]
        if "peers" in about:
            peers = ", ".join(f"{name} {text}" for name, text in about["peers"].items())
            lines.append(f"Peers: {peers}.")
        lines.append(f"Made by `{self._command}`.")
        if self._quick:
            lines += ["", "**A quick run: short windows, few repetitions. Not for quoting.**"]
        if self._running:
            lines += ["", f"**Not finished: `{self._running}` was being measured.**"]
        lines += [
            "",
            "Median (min to max) of the repetitions. A ratio is ours over the peer's, of the "
            "medians, with what the extremes would give; for a bound within 1.3 times of unity the "
            "mean of pairs with its 95 % interval, which has to clear the bound on 30 pairs.",
        ]
        return lines


def goal_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| goal | what | ours | peer | ratio | wanted | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_place):
        peer = ""
        if row.peer_name:
            peer = f"{row.peer_name}: {spread_text(row.peer)}"
        verdict = f"**{row.judged.verdict.value}**"
        said = [text for text in (row.judged.reason, row.note) if text]
        cells = [
            row.goal, row.what, f"{spread_text(row.ours)} {row.unit}".strip(), peer,
            ratio_text(row), "" if row.bound is None else str(row.bound),
            verdict + (f" ({'; '.join(said)})" if said else ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _place(row: Row) -> float:
    """By number; what has none comes last."""

    number = row.goal.removeprefix("P")
    return int(number) if number.isdigit() else math.inf


def spread_text(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    if spread.runs == 1:
        return number_text(spread.median)
    low, high = number_text(spread.low), number_text(spread.high)
    return f"{number_text(spread.median)} ({low} to {high})"


def ratio_text(row: Row) -> str:
    judged: Judged = row.judged
    if row.bound is None or row.bound.unit != "x" or judged.value is None:
        return ""
    text = f"{judged.value:.3g} x"
    if judged.interval is not None:
        low, high = judged.interval
        text += f" (95 %: {low:.3g} to {high:.3g})"
    elif row.ours is not None and row.peer is not None and row.ours.runs > 1:
        low, high = row.ours.low / row.peer.high, row.ours.high / row.peer.low
        text += f" (at worst {low:.3g}, at best {high:.3g})"
    return text


def number_text(value: float) -> str:
    if value == int(value) and abs(value) < 1_000:
        return str(int(value))
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def details(turns: Turns) -> list[str]:
    """Every contender with its figures."""

    shown = [
        (key, title)
        for key, title in _DETAILS
        if any(turns.values(contender, key) for contender in turns.figures)
    ]
    lines: list[str] = []
    if shown:
        lines += ["| contender | " + " | ".join(title for _, title in shown) + " | failures |"]
        lines += ["|---" * (len(shown) + 2) + "|"]
        for contender in turns.figures:
            cells = [
                spread_text(Spread.of(values)) if values else ""
                for key, _ in shown
                for values in (turns.values(contender, key),)
            ]
            failed, done = turns.counted(contender)
            lines.append(
                f"| {contender} | {' | '.join(cells)} | {f'{failed} of {failed + done}'} |"
            )
    return lines + _groups(turns)


def failures(turns: Turns) -> list[str]:
    if not turns.failures:
        return []
    return ["", "Turns that gave no figure:", "", *(f"- {one}" for one in turns.failures)]


def _groups(turns: Turns) -> list[str]:
    """CPU by group of processes, of the last repetition of each contender of ours."""

    lines: list[str] = []
    for contender, runs in turns.figures.items():
        groups = runs[max(runs)].get("server_cpu_us_per_request")
        if groups:
            parts = ", ".join(f"{group} {us:,.0f}" for group, us in groups.items() if us >= 0.5)
            lines.append(f"- {contender}: {parts}")
    return (
        ["", "CPU µs a request by group of processes, last repetition:", "", *lines]
        if lines
        else []
    )


def undecided_or_worse(rows: Sequence[Row]) -> int:
    return sum(row.judged.verdict is not Verdict.PASS for row in rows)


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""

    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
