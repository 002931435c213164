"""P10, P11 and the bulk half of P22: bodies of many rows, past the bus where they are large."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from benchmarks import bulk_data, measures
from benchmarks.goals import judging, processes
from benchmarks.goals.context import DIRECT, SERVE, Context, PeerPostgres, wait_quiet
from benchmarks.goals.judging import at_least, at_most
from benchmarks.goals.programs import Failed, program
from benchmarks.goals.rows import Benchmark, Row, absent, against, spread_of
from benchmarks.goals.turns import Figures, Turns
from benchmarks.stacks import RunningStack

DUCKLAKE = "DuckLake, bulk insert"
#: Form: clients, rows of a body, share of the rows that the peer gets.
FORMS = {"arrow": (4, 100_000, 1.0), "parquet": (4, 100_000, 1.0), "ndjson": (8, 5_000, 0.25)}
ROWS, QUICK_ROWS = 2_000_000, 400_000
#: `bus.inflight_bytes_max` by default, which the stack runs with.
INFLIGHT_MIB = 256
_READY_S, _LIMIT_S = 90.0, 240.0

CONDITIONS = """\
Ours: a fresh stack in each repetition, over HTTP with keys; Arrow streams and Parquet files of \
100,000 rows (10 MB as Arrow) by 4 clients, NDJSON of 5,000 rows by 8; bodies are encoded before \
the clock starts; 2 million rows (NDJSON: half a million), until all are visible. Files and \
directories are synced. The peer: DuckLake on a fresh PostgreSQL, one writer with two threads, \
the same rows as ready Arrow, 100,000 a commit; in process, its files are not synced.
Memory: of the ingest replica, resident before, and its peak (the kernel's) after all forms."""


def bulk(door: str, form: str) -> str:
    return f"lakebus {door}, {form}"


MEMORY = "lakebus, ingest replica under bulk"


def run(context: Context, turns: Turns) -> None:
    rows = QUICK_ROWS if context.options.quick else ROWS
    with tempfile.TemporaryDirectory(prefix="lakebus-bench-bulk-") as folder:
        batches = Path(folder) / "batches.arrow"
        bulk_data.write(batches, rows=rows)
        for repetition in range(context.options.repetitions):
            if repetition % 2 == 0:
                _ours(context, turns, repetition, batches, rows)
                _peer(context, turns, repetition, batches, rows)
            else:
                _peer(context, turns, repetition, batches, rows)
                _ours(context, turns, repetition, batches, rows)


def _ours(context: Context, turns: Turns, repetition: int, batches: Path, rows: int) -> None:
    with context.stack_or_note(turns) as stack:
        if stack is None:
            return
        before = ingest_replica_mib(stack, "VmRSS")
        for form in FORMS:
            for door, url in context.doors(stack).items():
                turns.take(
                    bulk(door, form), repetition,
                    lambda d=door, u=url, f=form: _load(context, stack, u, d, f, batches, rows),  # type: ignore[misc]
                    limit_s=_READY_S + _LIMIT_S,
                )  # fmt: skip
                wait_quiet(stack.supervisor)
        peak = ingest_replica_mib(stack, "VmHWM")
        turns.take(MEMORY, repetition, lambda: {"idle_mib": before, "peak_mib": peak}, limit_s=5)


def ingest_replica_mib(stack: RunningStack, field: str) -> float:
    pids = [pid for pid, group in processes.tree(stack.supervisor) if group == "ingest replica"]
    return max(processes.status_mib(pid, field) for pid in pids)


def _load(
    context: Context, stack: RunningStack, url: str, door: str, form: str, batches: Path, rows: int
) -> Figures:
    table = f"b_{door.lower()}_{form}"
    clients, body_rows, share = FORMS[form]
    asyncio.run(asyncio.wait_for(measures.make_table(stack.url, stack.api_key, table), timeout=60))
    order = {
        "url": url, "read_url": stack.url, "api_key": stack.api_key, "table": table,
        "batches": str(batches), "form": form, "clients": clients, "rows": int(rows * share),
        "body_rows": body_rows,
    }  # fmt: skip
    with program("benchmarks.bulk_load", order, log=context.log) as load:
        load.ready(_READY_S)
        before = processes.cpu_seconds(stack.supervisor)
        found = load.window(_LIMIT_S)
        cpu = processes.used(before, processes.cpu_seconds(stack.supervisor))
    if not found["visible"]:
        raise Failed("the last receipts were not visible in time")
    return found | {"server_cpu_s": cpu}


def _peer(context: Context, turns: Turns, repetition: int, batches: Path, rows: int) -> None:
    if context.options.peers is None:
        return
    with context.postgres() as server:
        turns.take(
            DUCKLAKE, repetition, lambda: _insert(context, server, batches, rows),
            limit_s=_READY_S + _LIMIT_S,
        )  # fmt: skip


def _insert(context: Context, server: PeerPostgres, batches: Path, rows: int) -> Figures:
    order = {
        "store": "ducklake", "dsn": server.database(), "folder": str(server.folder / "bulk"),
        "threads": 2, "batches": str(batches), "rows": rows,
    }  # fmt: skip
    with context.peer("bulk", order) as writer:
        writer.ready(_READY_S)
        found: Figures = writer.window(_LIMIT_S)
        return found


GOALS = (("P10", "arrow", 0.7), ("P10", "parquet", 0.7), ("P11", "ndjson", 0.3))


def judge(turns: Turns) -> list[Row]:
    rows: list[Row] = []
    for goal, form, wanted in GOALS:
        for door in (SERVE, DIRECT):
            ours = bulk(door, form)
            if not turns.values(ours, "rows_per_s"):
                why = "ours gave no figure"
                if door == DIRECT and turns.values(bulk(SERVE, form), "rows_per_s"):
                    why = "not there: this stack's connection.json names no ingest_url"
                rows.append(absent(goal, f"bulk {form}, {door} door", why))
                continue
            rows.append(
                against(
                    turns, goal, f"bulk {form}, {door} door", ours=ours, peer=DUCKLAKE,
                    figure="rows_per_s", unit="rows/s", bound=at_least(wanted),
                    note="ours is synced and over HTTP, the peer is neither",
                )
            )  # fmt: skip
    rows.append(_memory(turns))
    return rows


def _memory(turns: Turns) -> Row:
    idle, peak = turns.values(MEMORY, "idle_mib"), turns.values(MEMORY, "peak_mib")
    what = "peak memory of the ingest replica under bulk"
    if not idle:
        return absent("P22", what, "ours gave no figure")
    bound = at_most(round(1.5 * min(idle) + INFLIGHT_MIB), "MiB")
    return Row(
        "P22", what, "MiB", spread_of(peak), judging.judge_count(peak, bound), bound,
        note=f"1.5 x the {min(idle):.0f} MiB it has idle and {INFLIGHT_MIB} MiB in flight; the "
        "worst run counts",
    )  # fmt: skip


BENCHMARK = Benchmark(
    "bulk",
    ("P10", "P11", "P22"),
    "published rows a second in bodies of many rows; the memory that takes",
    CONDITIONS,
    run,
    judge,
)
