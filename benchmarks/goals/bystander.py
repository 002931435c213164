"""P21: throughput while somebody else holds a transaction open in our database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import asyncpg

from benchmarks.goals.context import SERVE, Context, windowed
from benchmarks.goals.history import dsn_of
from benchmarks.goals.judging import at_least
from benchmarks.goals.rows import Benchmark, Row, against
from benchmarks.goals.turns import Figures, Turns
from benchmarks.stacks import RunningStack

HELD, FREE = "lakebus, a foreign transaction open", "lakebus, none open"
_WINDOW_S, _FULL_S, _QUICK_S = 5.0, 1_800.0, 30.0

CONDITIONS = f"""\
Two stacks with default settings are up. In the database of one a foreign session began a \
repeatable read transaction, read our tables and stays idle in it, for 30 minutes (a quick run: \
{_QUICK_S:g} s; `--held-s` names another time; the table of goals says how long it was). Windows \
of {_WINDOW_S:g} s, 8 clients, 100 rows of JSON, Serve door, alternate \
between the two until the time is over; the pairs of the last half are judged, when the \
transaction is old."""


def run(context: Context, turns: Turns) -> None:
    seconds = context.options.held_s or (_QUICK_S if context.options.quick else _FULL_S)
    with ExitStack() as opened:
        held = opened.enter_context(context.stack_or_note(turns))
        # What is alone needs no time.
        free = None if held is None else opened.enter_context(context.stack_or_note(turns))
        if held is None or free is None:
            return
        with foreign_transaction(held), _load(context, held) as one, _load(context, free) as other:
            one.ready(60)
            other.ready(60)
            sides = [(HELD, held, one), (FREE, free, other)]
            began, number = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                for contender, stack, load in sides if number % 2 == 0 else reversed(sides):
                    turns.take(
                        contender, number,
                        lambda s=stack, p=load: _window(s, p, time.monotonic() - began),  # type: ignore[misc]
                        limit_s=_WINDOW_S + 110,
                    )  # fmt: skip
                number += 1


def _load(context: Context, stack: RunningStack) -> Any:
    return context.load(stack, stack.url, table="bystander", clients=8, seed=1, rows=100)


def _window(stack: RunningStack, load: Any, held_s: float) -> Figures:
    found = windowed(load, stack.supervisor, seconds=_WINDOW_S, limit_s=_WINDOW_S + 100)
    return found | {"since_s": round(held_s)}


@contextmanager
def foreign_transaction(stack: RunningStack) -> Iterator[None]:
    """Idle in a transaction with a snapshot, as a forgotten psql is."""

    loop = asyncio.new_event_loop()
    try:
        session = loop.run_until_complete(asyncpg.connect(dsn_of(stack)))
        for statement in (
            "SET idle_in_transaction_session_timeout = 0",
            "BEGIN ISOLATION LEVEL REPEATABLE READ",
            "SELECT count(*) FROM pg_class",
        ):
            loop.run_until_complete(session.execute(statement))
        yield
        loop.run_until_complete(session.execute("COMMIT"))  # fails if it was not open so long
        loop.run_until_complete(session.close())
    finally:
        loop.close()


def judge(turns: Turns) -> list[Row]:
    old = Turns()
    for contender in (HELD, FREE):
        runs = turns.figures.get(contender, {})
        half = max(runs, default=0) / 2
        old.figures[contender] = {n: run for n, run in runs.items() if n >= half}
    since = max(turns.values(HELD, "since_s"), default=0)
    return [
        against(
            old, "P21", f"published rows/s, 8 clients, {SERVE} door", ours=HELD, peer=FREE,
            figure="rows_per_s", unit="rows/s", bound=at_least(0.95),
            note=f"held for {since / 60:.0f} min of the 30 wanted",
        )
    ]  # fmt: skip


BENCHMARK = Benchmark(
    "bystander", ("P21",), "throughput beside a foreign transaction", CONDITIONS, run, judge
)
