"""`python -m benchmarks [--quick]`: measures a fresh stack and writes `results/baseline.{json,md}`.

Repetitions alternate between the settings, so that a drift of the machine meets all of them; every
figure is written with its spread, the machine and the versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, measures
from benchmarks.memory import stack_memory_mib
from benchmarks.stacks import RunningStack, running_stack

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 8, 64)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short repetition of each")
    quick = parser.parse_args(arguments).quick
    about = machine.describe()
    with running_stack() as stack:
        found: dict[str, Any] = {
            "machine": about,
            "up_to_ready_s": stack.start_s,
            "idle_memory_mib": stack_memory_mib(stack.supervisor),
        }
        found |= measure(stack, repetitions=1 if quick else 5, seconds=3.0 if quick else 8.0)
    RESULTS.mkdir(exist_ok=True)
    name = "quick" if quick else "baseline"
    text = json.dumps(found, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(report(found), encoding="utf-8")
    print(report(found))
    return 0


def measure(stack: RunningStack, *, repetitions: int, seconds: float) -> dict[str, Any]:
    fresh = [
        asyncio.run(
            measures.write_to_visible(
                stack.url, stack.api_key, requests=200, rows=100, table=f"fresh_{number}"
            )
        )
        for number in range(repetitions)
    ]
    ingest: dict[int, list[dict[str, Any]]] = {clients: [] for clients in CLIENTS}
    for number in range(repetitions):
        for clients in CLIENTS:
            ingest[clients].append(
                measures.ingest_rate(
                    stack.url,
                    stack.api_key,
                    clients=clients,
                    rows=100,
                    seconds=seconds,
                    table=f"ingest_{clients}",
                    seed=number,
                )
            )
    queries = asyncio.run(
        measures.query_overhead(
            stack.url, stack.api_key, rows=200_000, repeats=60, table="queries",
            objects_dir=stack.data_dir / "objects",
        )
    )  # fmt: skip
    return {"write_to_visible": fresh, "ingest": ingest, "query": queries}


def report(found: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""

    about = found["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in about["packages"].items())
    lines = [
        "# Baseline",
        "",
        f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, kernel "
        f"{about['kernel']}, Python {about['python']}; {versions}; commit {about['commit']}; load "
        f"average {about['load_average_at_start']} at the start.",
        "The load generator runs on the same cores as the stack. Embedded PostgreSQL with fsync,",
        "profile `local`: one ingest replica, one query replica, roles together, through HAProxy",
        "and Serve, authenticated and keyed. A run has up to 4,000 bodies in which every row",
        "differs; beyond that they are sent again under new keys. Median (min to max).",
        "",
        f"`lakebus up` to ready: {found['up_to_ready_s']} s. Idle memory of all processes "
        f"(proportional): {found['idle_memory_mib']} MiB.",
        "",
        "| clients, 100 rows each | acknowledged rows/s | published rows/s | ack p50 ms |"
        " ack p99 ms | failures |",
        "|---|---|---|---|---|---|",
    ]
    for clients, runs in found["ingest"].items():
        cells = [
            _cell(runs, name)
            for name in (
                "rows_per_s_acknowledged", "rows_per_s_published", "ack_ms_p50", "ack_ms_p99",
            )
        ]  # fmt: skip
        failures = sum(sum(run["failures"].values()) for run in runs)
        lines.append(f"| {clients} | {' | '.join(cells)} | {failures} |")
    fresh = found["write_to_visible"]
    lines += [
        "",
        "One client: POST 100 rows, then a query with the receipt's token, 200 times a run.",
        "",
        "| write to visible p50 ms | p99 ms | ack p50 ms | ack p99 ms |",
        "|---|---|---|---|",
        "| "
        + " | ".join(
            _cell(fresh, name)
            for name in (
                "write_to_visible_ms_p50", "write_to_visible_ms_p99", "ack_ms_p50", "ack_ms_p99",
            )
        )
        + " |",
        "",
        f"Queries over {found['query']['rows']} rows in {found['query']['files']} files (no"
        " compaction yet), in turns with DuckDB in the measuring process over the same files,"
        f" {found['query']['repeats']} times.",
        "",
        "| query | HTTP p50 ms | HTTP p99 ms | in process p50 ms | added p50 ms |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in measures.QUERIES:
        one = found["query"][name]
        lines.append(
            f"| {name} | {one['http_ms_p50']} | {one['http_ms_p99']} |"
            f" {one['in_process_ms_p50']} | {one['overhead_ms_p50']} |"
        )
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict[str, Any]], name: str) -> str:
    found = measures.spread([run[name] for run in runs])
    return f"{found['median']:g} ({found['min']:g} to {found['max']:g})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
