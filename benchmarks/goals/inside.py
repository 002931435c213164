"""P18, P19 and P20: benchmarks that are programs of their own, run and judged here."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.goals import judging
from benchmarks.goals.context import Context
from benchmarks.goals.judging import Judged, Verdict, at_most
from benchmarks.goals.rows import Benchmark, Row, absent, spread_of
from benchmarks.goals.turns import Figures, Turns

WAITERS = "lakebus, 1,000 waiters"
COMPACTED, LOADED = "compaction", "lakebus, ingest beside compaction"
_LIMIT_S = 1_500.0
_AT_WATCHER = "P18 1000 waiters, last wake-up at the watcher, ms"

CONDITIONS = """\
P18 (`benchmarks.waiters`): 1,000 waiters in one process on a PostgreSQL of their own; from the \
return of COMMIT, in another thread, to the last waiter's wake-up.
P19 (`benchmarks.compaction --small-only`): 2,000 files of 1,000 rows; our hidden columns are in \
every contender's files. Whole: DuckDB's COPY of the same rows, zstd. DuckLake merges its own \
files, in its default compression, snappy. Bytes are counted, not timed.
P20 (`benchmarks.compaction_load`): an open loop at half of the stack's rate; windows with and \
without compactions in turns; pairs of neighbouring windows."""


def run(context: Context, turns: Turns) -> None:
    options = context.options
    repetitions = 1 if options.quick else min(options.repetitions, 3)
    for repetition in range(repetitions if options.wants("P18") else 0):
        turns.take(WAITERS, repetition, lambda: _waiters(context), limit_s=_LIMIT_S)
    if options.wants("P19"):
        turns.take(COMPACTED, 0, lambda: _compacted(context), limit_s=_LIMIT_S)
    if options.wants("P20"):
        turns.take(LOADED, 0, lambda: _loaded(context), limit_s=_LIMIT_S)


def _waiters(context: Context) -> Figures:
    rounds = ("--rounds", "5") if context.options.quick else ()
    found: Figures = context.says("waiters", *rounds, timeout_s=_LIMIT_S)
    return {name: value for name, value in found.items() if name != "machine"}


def _compacted(context: Context) -> Figures:
    options = ["--small-only", "--threads", "1", "--query-repetitions", "3"]
    options += ["--quick"] if context.options.quick else ["--repetitions", "1"]
    if context.options.peers is not None:
        options += ["--peers", context.options.peers]
    found = context.says("compaction", *options, timeout_s=_LIMIT_S)["many small files"]
    return {
        "rows": found["rows_in"],
        **{
            name.partition(",")[0]: figures["mb_out"] * 1e6 / found["rows_in"]
            for name, figures in found["rewrite"].items()
        },
    }


def _loaded(context: Context) -> Figures:
    options = ["--out", str(context.options.out)] + (["--quick"] if context.options.quick else [])
    context.runs("compaction_load", *options, timeout_s=_LIMIT_S)
    found = json.loads((context.options.out / "compaction_load.json").read_text())
    # Below a name of their own: `ack_ms_p99` of a turn is a number everywhere else.
    return {
        "pairs": len(found["windows"]) // 2,
        "ratios": found["ratios"],
        "failures": found["failures"],
    }


# --- the judging -----------------------------------------------------------------------------


def judge(turns: Turns) -> list[Row]:
    return [
        _waking(turns),
        *_bytes(turns),
        *(_compacting(turns, name) for name in ("ack_ms_p99", "visible_ms_p99")),
    ]  # fmt: skip


def _waking(turns: Turns) -> Row:
    what, bound = "COMMIT's return to the last of 1,000 wake-ups, p99", at_most(25, "ms")
    values = [run[_AT_WATCHER]["p99"] for run in turns.figures.get(WAITERS, {}).values()]
    if not values:
        return absent("P18", what, "ours gave no figure")
    judged = judging.judge_value(values, bound).beside_others(turns.others_cores(WAITERS))
    return Row("P18", what, "ms", spread_of(values), judged, bound)


def _bytes(turns: Turns) -> list[Row]:
    run: dict[str, Any] = turns.figures.get(COMPACTED, {}).get(0, {})
    rows = []
    peers = (
        ("DuckDB COPY (unverified)", "zstd Parquet written whole", 1.05),
        ("DuckLake merge_adjacent_files", "DuckLake", 0.65),
    )
    for key, peer, wanted in peers:
        what, bound = f"bytes a row after compaction, by {peer}", at_most(wanted)
        if "lakebus rewrite" not in run or key not in run:
            rows.append(absent("P19", what, "no figure of ours, or of the peer"))
            continue
        ours, theirs = run["lakebus rewrite"], run[key]
        rows.append(
            Row(
                "P19", what, "bytes", spread_of([ours]),
                judging.judge_count([ours / theirs], bound), bound, peer, spread_of([theirs]),
                "counted",
            )
        )  # fmt: skip
    return rows


def _compacting(turns: Turns, name: str) -> Row:
    what, bound = f"{name.replace('_ms_', ' ')} beside compaction, by without", at_most(1.2)
    run: dict[str, Any] = turns.figures.get(LOADED, {}).get(0, {})
    if "ratios" not in run:
        return absent("P20", what, "ours gave no figure")
    found = run["ratios"][name]
    low, high = found["interval_95"]
    verdict = Verdict.UNDECIDED
    if low > bound.value:
        verdict = Verdict.SHORT
    elif high <= bound.value:
        verdict = Verdict.PASS
    pairs = f"{run['pairs']} pairs of windows, each of many requests"
    judged = Judged(verdict, found["ratio"], (low, high), pairs)
    judged = judged.beside_others(turns.others_cores(LOADED))
    return Row("P20", what, "", None, judged, bound)


BENCHMARK = Benchmark(
    "inside",
    ("P18", "P19", "P20"),
    "waiters, compaction's bytes and what it costs ingest",
    CONDITIONS,
    run,
    judge,
)
