"""`python -m benchmarks.compaction_load [--quick]`: what a compaction at work costs ingest (P20).

A fresh stack takes requests at a fixed rate, half of what it can take by default. Windows in which
no job runs alternate with windows in which the table under load is compacted again and again, in
the order A B B A, so that a drift of the machine meets both. Measured is each request from when it
was due: until its receipt, and until its rows are visible by its token. The ratio of the p99s is
that of neighbouring windows, its interval a bootstrap over these pairs. Writes
`results/compaction_load.{json,md}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine, measures
from benchmarks.http1 import Connection
from benchmarks.stacks import RunningStack, end_as_interrupted, running_stack

RESULTS = Path(__file__).parent / "results"
GOAL = 1.2
TABLE = "load"
ROWS = 100
_RESAMPLES = 10_000
_SETTLE_S = 2.0


@dataclass(slots=True)
class Window:
    """A stretch of time, and the compactions that ran in it."""

    compacting: bool
    began: float = 0.0
    ended: float = 0.0
    jobs: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def open_load(stack: RunningStack, rate: float, found: dict[str, Any]) -> Iterator[None]:
    """The load runs inside; at the end its samples are in `found`."""

    order = {
        "url": stack.url, "api_key": stack.api_key, "table": TABLE, "rows": ROWS, "rate": rate,
        "visible_each": 5,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.open_load"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        yield
        text, _ = process.communicate(timeout=150)
        found |= json.loads(text)
    finally:
        process.kill()
        process.wait()


async def run_windows(
    stack: RunningStack, *, pairs: int, window_s: float, warm_s: float
) -> list[Window]:
    """A B B A …, each window after a moment in which its state is there already."""

    connection = Connection(stack.url, stack.api_key)
    await asyncio.sleep(warm_s)
    await _compact(connection)  # the process of jobs starts
    windows: list[Window] = []
    for pair in range(pairs):
        for compacting in (False, True) if pair % 2 == 0 else (True, False):
            window = Window(compacting)
            windows.append(window)
            jobs = asyncio.create_task(_keep_compacting(connection, window)) if compacting else None
            await asyncio.sleep(_SETTLE_S)
            window.began = time.monotonic()
            await asyncio.sleep(window_s)
            window.ended = time.monotonic()
            if jobs is not None:
                await jobs
    connection.close()
    return windows


async def _keep_compacting(connection: Connection, window: Window) -> None:
    while not window.ended:
        window.jobs.append(await _compact(connection))


async def _compact(connection: Connection) -> dict[str, Any]:
    """A full compaction of the table under load; everything it has is merged, not only what is
    due."""

    began = time.monotonic()
    answer = await connection.post_json(
        f"/v1/admin/maintenance/compact?table={TABLE}&timeout_ms=100000",
        {"parameters": {"full": True}},
    )
    job = answer.json()
    if answer.status != 200 or job["state"] != "done":
        raise RuntimeError(f"a compaction did not end well: {answer.status} {answer.body[:500]!r}")
    report = {name: job["report"][name] for name in ("files_in", "rows_in", "bytes_in", "seconds")}
    return report | {"began": began, "ended": time.monotonic()}


# --- what came of it -----------------------------------------------------------------------


def window_figures(window: Window, samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Of the requests that were due in the window."""

    mine = [one for one in samples if window.began <= one[0] < window.ended]
    ack = [one[1] for one in mine]
    visible = [one[2] for one in mine if one[2] is not None]
    if not visible:
        raise RuntimeError("a window saw no request through: the rate is beyond this machine")
    figures = {
        "compacting": window.compacting,
        "seconds": round(window.ended - window.began, 1),
        "requests": len(mine),
        "ack_ms_p50": measures.percentile(ack, 0.5),
        "ack_ms_p99": measures.percentile(ack, 0.99),
        "visible_ms_p50": measures.percentile(visible, 0.5),
        "visible_ms_p99": measures.percentile(visible, 0.99),
    }
    if window.compacting:
        figures |= {
            "compactions": len(window.jobs),
            "files_compacted": sum(job["files_in"] for job in window.jobs),
            "mb_compacted": round(sum(job["bytes_in"] for job in window.jobs) / 1e6, 1),
        }
    return figures


def ratio(windows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Compacting over not, the geometric mean over pairs of neighbours, with the interval that 95
    of 100 resamples of the pairs lie in."""

    logs = []
    for first, second in zip(windows[::2], windows[1::2], strict=True):
        on, off = (first, second) if first["compacting"] else (second, first)
        logs.append(math.log(on[name] / off[name]))
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))
    low, high = (math.exp(means[int(_RESAMPLES * share)]) for share in (0.025, 0.975))
    return {
        "ratio": round(math.exp(statistics.fmean(logs)), 3),
        "interval_95": [round(low, 3), round(high, 3)],
    }


def verdict(found: dict[str, Any]) -> str:
    low, high = found["interval_95"]
    if high <= GOAL:
        return "reached"
    return "missed" if low > GOAL else "not decided"


RATIOS = ("ack_ms_p50", "ack_ms_p99", "visible_ms_p50", "visible_ms_p99")


def report(found: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""

    about, windows = found["machine"], found["windows"]
    versions = ", ".join(f"{name} {text}" for name, text in about["packages"].items())
    on = [one for one in windows if one["compacting"]]
    lines = [
        "# Ingest while compaction works",
        "",
        f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, kernel "
        f"{about['kernel']}, Python {about['python']}; {versions}; commit {about['commit']}; load "
        f"average {about['load_average_at_start']} at the start.",
        "The load generator runs on the same cores as the stack: embedded PostgreSQL with fsync,",
        f"profile `local`. {found['rate']} requests/s of {ROWS} rows, "
        f"{found['share_of_capacity']:g} of the {found['capacity_rows_per_s']} rows/s that 8 "
        "clients publish when nothing else runs; an open loop, measured from when a request was "
        "due. Every fifth request also waits for its rows.",
        f"{len(windows)} windows of {windows[0]['seconds']:g} s in the order A B B A. Without: no "
        "job runs. With: full compactions of the table under load, one after another "
        f"({sum(one['compactions'] for one in on)} of them, "
        f"{sum(one['files_compacted'] for one in on)} files, "
        f"{sum(one['mb_compacted'] for one in on):.0f} MB). Median of windows (min to max), ms.",
        "",
        "| | without | with | ratio (95 % interval) |",
        "|---|---|---|---|",
    ]
    for name, label in zip(
        RATIOS, ("ack p50", "ack p99", "visible p50", "visible p99"), strict=True
    ):
        one = found["ratios"][name]
        low, high = one["interval_95"]
        cells = [_cell(windows, name, compacting) for compacting in (False, True)]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {one['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    lines += [
        "",
        f"Goal: p99 at most {GOAL:g} times. Ack: **{found['verdicts']['ack_ms_p99']}**; visible: "
        f"**{found['verdicts']['visible_ms_p99']}** (the interval decides). Failed requests: "
        f"{sum(found['failures'].values())}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(windows: Sequence[dict[str, Any]], name: str, compacting: bool) -> str:
    figures = [one[name] for one in windows if one["compacting"] is compacting]
    found = measures.spread(figures)
    return f"{found['median']:.1f} ({found['min']:.1f} to {found['max']:.1f})"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compaction_load")
    parser.description = __doc__
    parser.add_argument("--quick", action="store_true", help="two pairs of short windows")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--window-s", type=float, default=15.0)
    parser.add_argument("--share", type=float, default=0.5, help="of what the stack can take")
    parser.add_argument("--rate", type=float, help="requests/s, instead of a share")
    parser.add_argument("--out", type=Path, help="folder of the results, those of --quick too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.window_s = 2, 5.0
    end_as_interrupted()
    found: dict[str, Any] = {"machine": machine.describe()}
    with running_stack(maintenance_enabled="false") as stack:
        capacity = measures.ingest_rate(
            stack.url, stack.api_key, clients=8, rows=ROWS, seconds=6.0, table=TABLE, seed=0
        )["rows_per_s_published"]
        rate = options.rate or round(capacity * options.share / ROWS, 1)
        found |= {
            "capacity_rows_per_s": capacity,
            "share_of_capacity": round(rate * ROWS / capacity, 2),
            "rate": rate,
        }
        with open_load(stack, rate, found):
            windows = asyncio.run(
                run_windows(stack, pairs=options.pairs, window_s=options.window_s, warm_s=5.0)
            )
    samples = found.pop("samples")
    found["windows"] = [window_figures(window, samples) for window in windows]
    found["ratios"] = {name: ratio(found["windows"], name) for name in RATIOS}
    found["verdicts"] = {
        name: verdict(found["ratios"][name]) for name in ("ack_ms_p99", "visible_ms_p99")
    }
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        out.mkdir(exist_ok=True)
        text = json.dumps(found, indent=1)
        (out / "compaction_load.json").write_text(text + "\n", encoding="utf-8")
        (out / "compaction_load.md").write_text(report(found), encoding="utf-8")
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
