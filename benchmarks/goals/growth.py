"""Cost as work grows: files, snapshots, tables and clients; and P14."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.goals import judging
from benchmarks.goals.context import Context, wait_quiet, windowed
from benchmarks.goals.judging import Judged, Spread, Verdict, at_most
from benchmarks.goals.programs import Failed, Program, program
from benchmarks.goals.report import number_text, spread_text
from benchmarks.goals.rows import Benchmark, Row, absent, spread_of
from benchmarks.goals.turns import Figures, Turns
from benchmarks.growth.lake import SERVER_SETTINGS
from benchmarks.growth.slopes import end_slope, slope
from benchmarks.own_postgres import own_postgres

GOAL = "growth"
ROWS = 100
CLIENTS, QUICK_CLIENTS = (1, 4, 16, 64, 256), (1, 16)
_READY_S, _CLIENTS_READY_S, _MORE_S, _QUIET_S = 120.0, 60.0, 100.0, 6.0
_REPETITIONS, _WINDOW_S = 3, 3.0
RESOLVE = "resolve a snapshot and prune"


@dataclass(frozen=True, slots=True)
class Axis:
    """`order` and `quick_order`: what the program is told at the beginning."""

    name: str
    program: str
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    limit_s: float
    order: Mapping[str, int] = field(default_factory=dict)
    quick_order: Mapping[str, int] = field(default_factory=dict)


AXES = (
    Axis(
        "files", "benchmarks.growth.files", (10, 100, 1_000, 10_000, 100_000, 1_000_000),
        (10, 100, 1_000, 10_000), 400.0, {"tables": 1_000, "snapshots": 100_000},
        {"tables": 50, "snapshots": 2_000},
    ),
    Axis(
        "snapshots", "benchmarks.growth.snapshots", (1, 10, 100, 1_000, 10_000, 100_000),
        (10, 100, 1_000, 10_000), 120.0, {"tables": 10}, {"tables": 10},
    ),
    Axis("tables", "benchmarks.growth.tables", (1, 10, 100, 1_000), (1, 10, 50), 120.0),
)  # fmt: skip

#: What must not grow, by axis: calls of PostgreSQL, judged by what it counts.
FLAT = {
    "files": ("append", "claim", "publish", "advance the manifest"),
    "snapshots": (
        "append", "claim", "publish", "advance the manifest", "read the head", "resolve by id",
        "resolve AS OF a time", "list the newest 100", "list 100 before an old one",
    ),
    "tables": (
        "append", "claim", "publish", "advance the manifest", "look up a table", "make a table",
        "add a column", "drop a table",
    ),
}  # fmt: skip
COUNTED = ("statements", "rows read", "blocks", "WAL bytes")
#: A look-up in a B-tree of a million rows reads two blocks more than in one of ten.
SLOPE_MAX = 0.1

CONDITIONS = """\
Files, snapshots, tables: one process and a PostgreSQL of its own (the stack's version and \
settings, fsync on), no Ray, no HTTP. Tables are made through the catalog. Snapshots and \
files are made in bulk: a real publication's rows, every column, are copied within the database \
with other ids, positions, times and bounds; then VACUUM (ANALYZE); autovacuum is off. What is \
measured goes through the product's own calls: append, claim and publication of one entry of 10 \
rows with one file (20 a repetition), and so on.
Counted by PostgreSQL, a call: statements sent, rows read from lakebus's tables, blocks touched, \
WAL bytes of the server (the first change of a page after a checkpoint writes the whole page, by \
chance), CPU of its sessions. Times: median of a repetition's calls.
files: live ones, spread over 1,000 tables and 100,000 snapshots, a tenth as many ended; 7 \
columns with statistics. Manifest: loaded anew from PostgreSQL; the time in which the process \
answers nobody is the longest turn of its loop meanwhile. P14: a snapshot of 100,000 and a table \
of 1,000 at random, the snapshot asked of the catalog (10,000 are remembered), viewed, a point \
look-up pruned; 1,000 draws a repetition.
snapshots: ten tables. Reads of the catalog 100 times a repetition; expiry: a dry run over all.
tables: ten files each. Planning: view, schema, pruning and the text for the engine, of a query \
that names one table; no query runs. SHOW TABLES: the list alone.
clients: `lakebus up` with default settings, closed loops of 100-row JSON requests at each door, \
windows of 3 s in one stack; the load generator runs on the same cores.
Slopes are those of straight lines on two logarithmic axes: 0 does not grow, 1 grows as the size. \
"End": over the last two decades."""


def contender(axis: str, size: int) -> str:
    return f"{axis} {size:,}"


# --- the turns -------------------------------------------------------------------------------


def run(context: Context, turns: Turns) -> None:
    for axis in AXES:
        _axis(context, turns, axis)
    _clients(context, turns)


def _axis(context: Context, turns: Turns, axis: Axis) -> None:
    quick = context.options.quick
    repetitions = min(context.options.repetitions, _REPETITIONS)
    order = dict(axis.quick_order if quick else axis.order)
    with (
        own_postgres(SERVER_SETTINGS) as dsn,
        program(axis.program, {"dsn": dsn, **order}, log=context.log) as running,
    ):
        try:
            running.ready(_READY_S)
        except Failed as error:
            turns.failures.append(str(error))
            return
        for size in axis.quick_sizes if quick else axis.sizes:
            found = turns.take(
                contender(axis.name, size), 0,
                lambda s=size: running.window(axis.limit_s, size=s, repetitions=repetitions),  # type: ignore[misc]
                limit_s=axis.limit_s + 5,
            )  # fmt: skip
            if found is None:  # whatever it answers later is no answer to the next question
                return
            if found.get("failed"):
                turns.failures.append(f"{contender(axis.name, size)}: {found['failed']}")


def _clients(context: Context, turns: Turns) -> None:
    with context.stack_or_note(turns) as stack:
        if stack is None:
            return
        for clients in QUICK_CLIENTS if context.options.quick else CLIENTS:
            for door, url in context.doors(stack).items():
                table = f"clients_{door.lower()}_{clients}"
                with context.load(
                    stack, url, table=table, clients=clients, seed=clients, rows=ROWS
                ) as load:
                    try:
                        load.ready(_CLIENTS_READY_S)
                    except Failed as error:
                        turns.failures.append(f"{clients} clients, {door}: {error}")
                        continue
                    for repetition in range(min(context.options.repetitions, _REPETITIONS)):
                        turns.take(
                            contender(f"clients, {door}", clients), repetition,
                            lambda p=load, c=clients: _window(p, stack.supervisor, c),  # type: ignore[misc]
                            limit_s=_WINDOW_S + _MORE_S + 5,
                        )  # fmt: skip
                wait_quiet(stack.supervisor, within_s=_QUIET_S)


def _window(load: Program, supervisor: int, clients: int) -> Figures:
    found = windowed(load, supervisor, seconds=_WINDOW_S, limit_s=_WINDOW_S + _MORE_S)
    groups = found["server_cpu_us_per_request"]
    failed = sum(found["failures"].values())
    curves = {
        "rows/s": found["rows_per_s"],
        "ack, p50 ms": found["ack_ms_p50"],
        "ack, p99 ms": found["ack_ms_p99"],
        "failed, of 1,000 requests": 1_000 * failed / max(found["requests"] + failed, 1),
        "CPU of a request, all of ours, µs": round(sum(groups.values()), 1),
        **{f"CPU of a request, {group}, µs": used for group, used in groups.items()},
        "CPU of a request, load generator, µs": found["load_cpu_us_per_request"],
    }
    return found | {"size": clients, "curves": {name: [one] for name, one in curves.items()}}


# --- curves ----------------------------------------------------------------------------------

Curves = dict[str, dict[int, list[float]]]


def curves_of(turns: Turns) -> dict[str, Curves]:
    """By axis (clients: of one door) and name: the values of each size, of all repetitions."""

    found: dict[str, Curves] = {}
    for name, runs in turns.figures.items():
        curves = found.setdefault(name.rpartition(" ")[0], {})
        for figures in runs.values():
            for what, values in figures.get("curves", {}).items():
                curves.setdefault(what, {}).setdefault(figures["size"], []).extend(values)
    return found


def medians(curve: Mapping[int, list[float]]) -> dict[float, float]:
    return {float(size): statistics.median(values) for size, values in curve.items() if values}


# --- the judging -----------------------------------------------------------------------------


def judge(turns: Turns) -> list[Row]:
    found = curves_of(turns)
    return [
        _p14(turns, found.get("files", {})),
        *(
            _flat(turns, axis, call, found.get(axis, {}))
            for axis, calls in FLAT.items()
            for call in calls
        ),
        _failed(turns),
    ]


def _failed(turns: Turns) -> Row:
    what, bound = "requests that failed, at any number of clients", at_most(0, "requests")
    counted = [turns.counted(name) for name in turns.figures if name.startswith("clients")]
    failed, done = sum(one for one, _ in counted), sum(one for _, one in counted)
    if not done:
        return absent(GOAL, what, "ours gave no figure")
    judged = judging.judge_count([float(failed)], bound)
    note = f"of {failed + done:,}"
    return Row(GOAL, what, "requests", spread_of([float(failed)]), judged, bound, note=note)


def _p14(turns: Turns, curves: Curves) -> Row:
    what, bound = "resolve a snapshot of PostgreSQL's and prune, p99", at_most(10, "ms")
    by_size = curves.get(f"{RESOLVE}, p99 ms", {})
    if not by_size:
        return absent("P14", what, "ours gave no figure")
    largest = max(by_size)
    at = contender("files", largest)
    run: dict[str, Any] = next(iter(turns.figures[at].values()))
    memory = curves.get("manifest, MiB", {}).get(largest, [])
    note = f"{largest:,} live files, {run['tables']:,} tables, {run['snapshots']:,} snapshots"
    if memory:
        note += f"; the manifest takes {memory[0]:,.0f} MiB ({memory[0] * 2**20 / largest:,.0f}"
        note += " bytes a live file)"
    judged = judging.judge_value(by_size[largest], bound).beside_others(turns.others_cores(at))
    if judged.verdict is Verdict.PASS and largest < max(AXES[0].sizes):
        judged = Judged(Verdict.UNDECIDED, judged.value, reason="fewer files than the goal's")
    return Row("P14", what, "ms", spread_of(by_size[largest]), judged, bound, note=note)


def _flat(turns: Turns, axis: str, call: str, curves: Curves) -> Row:
    """The steepest end of what is counted for one call."""

    what, bound = f"{call}, by {axis}: steepest slope of what is counted", at_most(SLOPE_MAX, "")
    slopes = {
        unit: found
        for unit in COUNTED
        if (found := end_slope(medians(curves.get(f"{call}, {unit}", {})))) is not None
    }
    if not slopes:
        return absent(GOAL, what, "ours gave no figure")
    unit = max(slopes, key=lambda name: slopes[name])
    curve = medians(curves[f"{call}, {unit}"])
    ends = f"{unit}: {number_text(curve[min(curve)])} at {min(curve):,.0f}, "
    ends += f"{number_text(curve[max(curve)])} at {max(curve):,.0f}"
    judged = judging.judge_count([round(slopes[unit], 3)], bound)
    note = f"{ends}{_reason(turns, axis, call) if judged.verdict is Verdict.SHORT else ''}"
    return Row(GOAL, what, "", spread_of([round(slopes[unit], 3)]), judged, bound, note=note)


def _reason(turns: Turns, axis: str, call: str) -> str:
    """The tables whose rows were read, at the largest size."""

    runs = [
        figures
        for name, by_repetition in turns.figures.items()
        if name.rpartition(" ")[0] == axis
        for figures in by_repetition.values()
    ]
    largest = max(runs, key=lambda figures: int(figures["size"]))
    by_table: dict[str, float] = largest.get("by_table", {}).get(call, {})
    most = sorted(by_table.items(), key=lambda item: -item[1])[:3]
    return "; rows read there: " + ", ".join(f"{name} {rows:,.1f}" for name, rows in most)


# --- the tables ------------------------------------------------------------------------------


def details(turns: Turns) -> list[str]:
    """A table of each axis: medians with their spread, and slopes."""

    lines: list[str] = []
    for axis, curves in curves_of(turns).items():
        sizes = sorted({size for by_size in curves.values() for size in by_size})
        if not sizes:
            continue
        lines += ["", f"### By {axis}", ""] if lines else [f"### By {axis}", ""]
        titles = [f"{size:,}" for size in sizes]
        lines += [f"| | {' | '.join(titles)} | slope | end |", "|---" * (len(sizes) + 3) + "|"]
        for what, by_size in curves.items():
            cells = [
                spread_text(Spread.of(by_size[size])) if by_size.get(size) else "" for size in sizes
            ]
            curve = medians(by_size)
            ends = [_slope_text(slope(curve)), _slope_text(end_slope(curve))]
            lines.append(f"| {what} | {' | '.join([*cells, *ends])} |")
    return lines


def _slope_text(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.2f}"


BENCHMARK = Benchmark(
    GOAL,
    (GOAL, "P14"),
    "cost by files, snapshots, tables and clients, with slopes; and P14",
    CONDITIONS,
    run,
    judge,
    details,
)
