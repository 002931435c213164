"""P22 and P23: memory of an idle stack, and the time from `up` to the first visible answer."""

from __future__ import annotations

from benchmarks.goals.context import Context
from benchmarks.goals.judging import at_most
from benchmarks.goals.rows import Benchmark, Row, alone
from benchmarks.goals.turns import Turns

STACK = "lakebus, a fresh stack"

CONDITIONS = """\
Every start of a stack with default settings in this run, other benchmarks' too. Warm: the \
programs are in the page cache; each start makes its PostgreSQL anew. Time: from the start of \
the command until a row of a new table, written after it, has been read back by its token over \
HTTP. Memory: the proportional set size of all processes (shared pages count once) when the \
stack has become quiet."""


def run(context: Context, turns: Turns) -> None:
    while len(context.starts) < context.options.repetitions:
        started = len(context.starts)
        with context.stack_or_note(turns):
            pass
        if len(context.starts) == started:
            break  # it does not start; that is noted
    for number, start in enumerate(context.starts):
        turns.take(STACK, number, lambda s=start: s, limit_s=5)  # type: ignore[misc]


def judge(turns: Turns) -> list[Row]:
    seconds = alone(
        turns, "P23", "`up` to the first visible answer, warm", ours=STACK,
        figure="first_visible_s", bound=at_most(20, "s"),
    )  # fmt: skip
    memory = alone(
        turns, "P22", "memory of an idle stack", ours=STACK, figure="idle_memory_mib",
        bound=at_most(round(2e9 / 2**20), "MiB"), note="2.0 GB",
    )  # fmt: skip
    return [memory, seconds]


BENCHMARK = Benchmark(
    "resources", ("P22", "P23"), "starting a stack, and what it weighs idle", CONDITIONS, run, judge
)
