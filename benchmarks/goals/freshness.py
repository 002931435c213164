"""P6, P7 and P17: from a write until its rows are read."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from typing import Any

from benchmarks import measures
from benchmarks.goals import ingest, processes
from benchmarks.goals.context import DIRECT, SERVE, Context, PeerPostgres, wait_quiet
from benchmarks.goals.judging import at_most
from benchmarks.goals.programs import ROOT, Failed, end
from benchmarks.goals.rows import Benchmark, Row, absent, against, alone
from benchmarks.goals.turns import Figures, Turns
from benchmarks.http1 import Connection
from benchmarks.measures import percentile
from benchmarks.stacks import RunningStack

ROWS = 100
POLLING = "DuckLake, polling reader"
PUBLISHED = "published: Materialize 1 to 2.5 s p99, Zerobus 5 s, Redpanda ≥ 10 s; not run here"
_SHARE, _VISIBLE_EACH = 0.5, 5
_LIMIT_S = 180.0

CONDITIONS = f"""\
P6: one client on an idle stack writes {ROWS} rows of JSON with a key and then asks `SELECT \
count(*), max(event_id) … WHERE event_id >= n` with the receipt's token, both over HTTP; from \
the first byte sent to the last byte read. At the direct door the query goes to the query \
replica's own one, as clients of ours do by themselves. The peer: \
a write of {ROWS} ready Arrow rows and a reader that asks the same question again and again, two \
DuckDB instances in one process, no HTTP; until the reader has the answer. The first requests \
are not counted.
P7: an open loop at half of the rows/s that 8 clients published just before on the same stack; \
each request is measured from when it was due, one of {_VISIBLE_EACH} until `/v1/visibility` \
says that its rows are there; at the direct door that is asked there too, as clients of ours do by \
themselves. Competitors publish such figures for other work on other machines: \
no ratio.
P17: the server's own `wait_ms` of a query with a token that was visible long before, on an idle \
stack."""


def one_client(door: str) -> str:
    return f"lakebus {door}, 1 client"


def open_loop(door: str) -> str:
    return f"lakebus {door}, open loop at half of its rate"


SEEN = "lakebus, a token visible already"


def run(context: Context, turns: Turns) -> None:
    requests = 50 if context.options.quick else 200
    for repetition in range(context.options.repetitions):
        if repetition % 2 == 0:
            _ours(context, turns, repetition, requests)
            _peer(context, turns, repetition, requests)
        else:
            _peer(context, turns, repetition, requests)
            _ours(context, turns, repetition, requests)


def _ours(context: Context, turns: Turns, repetition: int, requests: int) -> None:
    with context.stack_or_note(turns) as stack:
        if stack is None:
            return
        for door, url in context.doors(stack).items():
            turns.take(
                one_client(door), repetition,
                lambda d=door, u=url: _write_to_visible(stack, u, f"fresh_{d.lower()}", requests),  # type: ignore[misc]
                limit_s=_LIMIT_S,
            )  # fmt: skip
        turns.take(SEEN, repetition, lambda: _waits(stack, requests * 2), limit_s=_LIMIT_S)
        for door, url in context.doors(stack).items():
            turns.take(
                open_loop(door), repetition,
                lambda d=door, u=url: _half_rate(context, stack, d, u),  # type: ignore[misc]
                limit_s=_LIMIT_S + 4 * context.options.seconds,
            )  # fmt: skip


def _peer(context: Context, turns: Turns, repetition: int, requests: int) -> None:
    if context.options.peers is None:
        return
    with context.postgres() as server:
        turns.take(
            POLLING, repetition, lambda: _polling(context, server, requests), limit_s=_LIMIT_S
        )


def _polling(context: Context, server: PeerPostgres, requests: int) -> Figures:
    dsn = server.database()
    order = {"dsn": dsn, "folder": str(server.folder / "polling"), "rows": ROWS}
    with context.peer("polling_reader", order) as reader:
        reader.ready(60)
        found: Figures = reader.window(_LIMIT_S, requests=requests)
        return found


def _write_to_visible(stack: RunningStack, url: str, table: str, requests: int) -> Figures:
    found = asyncio.run(
        measures.write_to_visible(
            stack.url, stack.api_key, requests=requests, rows=ROWS, table=table,
            write_url=url, read_url=stack.url if url == stack.url else stack.asked,
        )
    )  # fmt: skip
    return {
        "requests": requests,
        "visible_ms_p50": found["write_to_visible_ms_p50"],
        "visible_ms_p99": found["write_to_visible_ms_p99"],
        "ack_ms_p50": found["ack_ms_p50"],
        "ack_ms_p99": found["ack_ms_p99"],
    }


def _waits(stack: RunningStack, requests: int) -> Figures:
    return asyncio.run(_ask_with_old_token(stack, requests))


async def _ask_with_old_token(stack: RunningStack, requests: int) -> Figures:
    connection = Connection(stack.url, stack.api_key, timeout_s=60)
    answer = await connection.query("SELECT count(*) FROM first")
    token = answer.json()["visibility_token"]
    waits = []
    for _ in range(requests):
        answer = await connection.query("SELECT count(*) FROM first", min_visibility_token=token)
        if answer.status != 200:
            raise Failed(f"a query was answered {answer.status}: {answer.body[:200]!r}")
        waits.append(float(answer.json()["statistics"]["wait_ms"]))
    connection.close()
    return {
        "requests": requests,
        "wait_ms_p50": percentile(waits, 0.5),
        "wait_ms_p99": percentile(waits, 0.99),
    }


def _half_rate(context: Context, stack: RunningStack, door: str, url: str) -> Figures:
    seconds = context.options.seconds
    table = f"half_{door.lower()}"
    full = ingest.load_turn(context, stack, url, table=table, clients=8, seed=1)
    wait_quiet(stack.supervisor)
    rate = full["rows_per_s"] / ROWS * _SHARE
    before = processes.cpu_seconds(stack.supervisor)
    found = _open_loop(stack, url, table=table, rate=rate, seconds=2 * seconds)
    cpu = processes.used(before, processes.cpu_seconds(stack.supervisor))
    samples = found["samples"]
    visible = [one[2] for one in samples if one[2] is not None]
    if not visible:
        raise Failed("no request of the open loop became visible")
    acks = [one[1] for one in samples]
    return {
        "requests": len(samples),
        "rate_per_s": round(rate, 1),
        "rate_reached_per_s": round(len(samples) / (2 * seconds), 1),
        "full_rows_per_s": full["rows_per_s"],
        "visible_ms_p50": percentile(visible, 0.5),
        "visible_ms_p99": percentile(visible, 0.99),
        "ack_ms_p50": percentile(acks, 0.5),
        "ack_ms_p99": percentile(acks, 0.99),
        "failures": found["failures"],
        "load_cpu_us_per_request": round(found["load_cpu_s"] * 1e6 / len(samples), 1),
        "server_cpu_us_per_request": {
            group: round(used * 1e6 / len(samples), 1) for group, used in cpu.items()
        },
    }


def _open_loop(
    stack: RunningStack, url: str, *, table: str, rate: float, seconds: float
) -> dict[str, Any]:
    order = {
        "url": url, "api_key": stack.api_key, "table": table, "rows": ROWS, "rate": rate,
        "visible_each": _VISIBLE_EACH, "announce": True,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.open_load"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise Failed("the open loop did not get ready")
        stopping = threading.Timer(seconds, process.stdin.close)
        stopping.start()
        text = process.stdout.read()
        found: dict[str, Any] = json.loads(text)
        return found
    finally:
        end(process)


def judge(turns: Turns) -> list[Row]:
    rows: list[Row] = []
    for door in (SERVE, DIRECT):
        ours = one_client(door)
        bounds = (("visible_ms_p50", at_most(0.6)), ("visible_ms_p99", at_most(0.5)))
        if not turns.values(ours, "visible_ms_p50"):
            rows.append(absent("P6", f"write to visible, {door} door", _why(turns, door)))
            continue
        for figure, bound in bounds:
            rows.append(
                against(
                    turns, "P6", f"write to visible {figure[-3:]}, {door} door", ours=ours,
                    peer=POLLING, figure=figure, unit="ms", bound=bound,
                )
            )  # fmt: skip
    for door in (SERVE, DIRECT):
        ours = open_loop(door)
        limits = (("visible_ms_p50", at_most(80, "ms")), ("visible_ms_p99", at_most(250, "ms")))
        if not turns.values(ours, "visible_ms_p50"):
            rows.append(
                absent("P7", f"write to visible at half rate, {door} door", _why(turns, door))
            )
            continue
        for figure, bound in limits:
            rows.append(
                alone(
                    turns, "P7", f"write to visible {figure[-3:]} at half rate, {door} door",
                    ours=ours, figure=figure, bound=bound, note=_rate_note(turns, ours),
                )
            )  # fmt: skip
    rows.append(
        alone(
            turns, "P17", "wait phase of a visible token, p99", ours=SEEN, figure="wait_ms_p99",
            bound=at_most(1, "ms"),
        )
    )  # fmt: skip
    return rows


def _rate_note(turns: Turns, ours: str) -> str:
    wanted, reached = turns.values(ours, "rate_per_s"), turns.values(ours, "rate_reached_per_s")
    failed, done = turns.counted(ours)
    pairs = ", ".join(f"{a:.0f} of {b:.0f}" for a, b in zip(reached, wanted, strict=True))
    return f"requests/s reached of wanted: {pairs}; failed {failed} of {failed + done}; {PUBLISHED}"


def _why(turns: Turns, door: str) -> str:
    if door == DIRECT and turns.values(one_client(SERVE), "visible_ms_p50"):
        return "not there: this stack's connection.json names no ingest_url"
    return "ours gave no figure"


BENCHMARK = Benchmark(
    "freshness",
    ("P6", "P7", "P17"),
    "from a write until its rows are read",
    CONDITIONS,
    run,
    judge,
)
