"""P1 to P5, P8 and P26: durable, acknowledged and published rows a second, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.goals import judging, processes
from benchmarks.goals.context import (
    DIRECT,
    SERVE,
    Context,
    PeerPostgres,
    wait_quiet,
    windowed,
)
from benchmarks.goals.judging import Verdict, at_least, at_most
from benchmarks.goals.programs import Failed
from benchmarks.goals.rows import Benchmark, Row, absent, against, alone, spread_of
from benchmarks.goals.turns import Figures, Turns
from benchmarks.stacks import RunningStack

ROWS = 100
CLIENTS = (8, 64)
_READY_S, _MORE_S = 60.0, 100.0

DUCKLAKE = "DuckLake, 8 writers"
BATCH_8, BATCH_64 = "DuckLake batching, 800 rows", "DuckLake batching, 6,400 rows"
COPY = "PostgreSQL COPY, 8 writers"
DELTA, ICEBERG = "Delta, 8 writers", "Iceberg, 8 writers"

#: Contender: store, writers, rows a commit, threads of each writer.
PEERS = {
    DUCKLAKE: ("ducklake", 8, 100, 1),
    BATCH_8: ("ducklake", 1, 800, 2),
    BATCH_64: ("ducklake", 1, 6_400, 2),
    COPY: ("postgres-copy", 8, 100, 1),
    DELTA: ("delta", 8, 100, 1),
    ICEBERG: ("iceberg", 8, 100, 1),
}
#: Measured in each repetition; the others once, for the conflicts that their users see.
REPEATED = (DUCKLAKE, BATCH_8, BATCH_64, COPY)
ONCE = (DELTA, ICEBERG)

#: P26: µs of CPU a request at 64 clients that the prototype took: all of ours, PostgreSQL's part.
PROTOTYPE = {SERVE: (766.0, 81.0), DIRECT: (415.0, 64.0)}

CONDITIONS = f"""\
Ours: `lakebus up` with default settings (embedded PostgreSQL, fsync; one ingest replica), a \
fresh stack in each repetition, over HTTP, authenticated, JSON bodies of {ROWS} rows (about 20 \
kB), an idempotency key for each request, each acknowledged after its commit. The time runs \
until the last receipt's token is visible, so the rate is of published rows. Ids differ in every \
row; the other columns come from 1,000 random bodies.
Peers: the same rows, ready in the form each takes most readily (Arrow; tuples for COPY): \
turning JSON into it is outside their time, and inside ours. Each in its own processes on the \
same cores, for as many seconds; the catalog in a fresh PostgreSQL of the same version and \
settings as ours, fsync on. Our stack is down meanwhile. DuckLake, Delta and Iceberg call no \
fsync for their data files (a power cut can lose a commit that their catalog has), and \
acknowledge to their own process, not over HTTP; DuckLake's retries are its defaults; rows are \
not inlined. PostgreSQL COPY: a table with a primary key, one COPY of {ROWS} tuples a \
transaction; it has no snapshots, no SQL over files and keeps rows, not Parquet.
A warm-up of a second (peers: a commit for each writer) comes before the time. The load \
generator runs on the same cores and its CPU is in every figure."""


def name(door: str, clients: int) -> str:
    return f"lakebus {door}, {clients} clients"


# --- the turns -------------------------------------------------------------------------------


def run(context: Context, turns: Turns) -> None:
    blocks: list[Callable[[Context, Turns, int], None]] = [_ours, _peers]
    for repetition in range(context.options.repetitions):
        # Who begins changes, so that a drift of the machine favours nobody.
        for block in blocks if repetition % 2 == 0 else reversed(blocks):
            block(context, turns, repetition)
    if context.options.peers is not None and context.options.pairs:
        _pairs(context, turns)


def _ours(context: Context, turns: Turns, repetition: int) -> None:
    with context.stack_or_note(turns) as stack:
        if stack is None:
            return
        for clients in CLIENTS:
            for door, url in context.doors(stack).items():
                turns.take(
                    name(door, clients), repetition,
                    lambda d=door, u=url, c=clients: load_turn(  # type: ignore[misc]
                        context, stack, u, table=f"t_{d.lower()}_{c}", clients=c,
                        seed=1 + repetition,
                    ),
                    limit_s=context.options.seconds + _READY_S + _MORE_S,
                )  # fmt: skip
                wait_quiet(stack.supervisor)


def load_turn(
    context: Context, stack: RunningStack, url: str, *, table: str, clients: int, seed: int
) -> Figures:
    with context.load(stack, url, table=table, clients=clients, seed=seed, rows=ROWS) as load:
        load.ready(_READY_S)
        seconds = context.options.seconds
        found = windowed(load, stack.supervisor, seconds=seconds, limit_s=seconds + _MORE_S)
    if not found["visible"]:
        raise Failed("the last receipts were not visible within a minute")
    return found


def _peers(context: Context, turns: Turns, repetition: int) -> None:
    if context.options.peers is None:
        return
    names = REPEATED if repetition else (*REPEATED, *ONCE)
    with context.postgres() as server:
        for contender in names:
            turns.take(
                contender, repetition,
                lambda c=contender: _peer_turn(context, server, c),  # type: ignore[misc]
                limit_s=context.options.seconds + _READY_S + _MORE_S,
            )  # fmt: skip


def peer_order(server: PeerPostgres, contender: str) -> dict[str, Any]:
    store, writers, rows, threads = PEERS[contender]
    dsn = server.database()
    return {
        "store": store, "writers": writers, "rows": rows, "threads": threads, "dsn": dsn,
        "folder": str(server.folder / dsn.rpartition("/")[2]),
    }  # fmt: skip


def _peer_turn(context: Context, server: PeerPostgres, contender: str) -> Figures:
    with context.peer("writers", peer_order(server, contender)) as writers:
        writers.ready(_READY_S)
        seconds = context.options.seconds
        return windowed(writers, server.pid, seconds=seconds, limit_s=seconds + _MORE_S)


# --- pairs, for the goals near unity ---------------------------------------------------------

#: Door and clients of ours, and the peer.
PAIRS = ((SERVE, 8, BATCH_8), (DIRECT, 8, COPY))
_PAIR_S, _PAIR_QUIET_S = 2.0, 4.0


def paired(contender: str) -> str:
    return f"{contender} (pairs)"


def _pairs(context: Context, turns: Turns) -> None:
    """Short windows in turns, both contenders ready throughout. Our stack stays up beside the
    peer's windows; what it takes of the processor is in their figures."""

    with context.stack_or_note(turns) as stack, context.postgres() as server:
        if stack is None:
            return
        doors = context.doors(stack)
        for door, clients, peer in PAIRS:
            if door not in doors or _lost_already(turns, name(door, clients), peer):
                continue
            with ExitStack() as opened:
                load = opened.enter_context(
                    context.load(
                        stack, doors[door], table=f"p_{door.lower()}_{clients}", clients=clients,
                        seed=99, rows=ROWS,
                    )
                )  # fmt: skip
                writers = opened.enter_context(context.peer("writers", peer_order(server, peer)))
                try:
                    load.ready(_READY_S)
                    writers.ready(_READY_S)
                except Failed as error:
                    turns.failures.append(f"pairs with {peer}: {error}")
                    continue
                _take_pairs(context, turns, stack, load, writers, name(door, clients), peer)


def _lost_already(turns: Turns, ours: str, peer: str) -> bool:
    """A loss may be stated on the repetitions alone; pairs could only say the same."""

    a, b = turns.pairs(ours, peer, "rows_per_s")
    return judging.judge_ratio(a, b, at_least(1.0)).verdict is Verdict.SHORT


def _take_pairs(
    context: Context, turns: Turns, stack: RunningStack, load: Any, writers: Any, ours: str,
    peer: str,
) -> None:  # fmt: skip
    def our_window() -> Figures:
        return windowed(load, stack.supervisor, seconds=_PAIR_S, limit_s=_PAIR_S + _MORE_S)

    def peer_window() -> Figures:
        before = processes.cpu_seconds(stack.supervisor)
        found: Figures = writers.window(_PAIR_S + _MORE_S, seconds=_PAIR_S)
        used = processes.used(before, processes.cpu_seconds(stack.supervisor))
        beside = sum(used.values())
        return found | {"cores_of_our_stack_beside": round(beside / found["published_s"], 3)}

    sides = [(paired(ours), our_window), (paired(peer), peer_window)]
    for number in range(context.options.pairs):
        for contender, window in sides if number % 2 == 0 else reversed(sides):
            wait_quiet(stack.supervisor, within_s=_PAIR_QUIET_S)
            turns.take(contender, number, window, limit_s=_PAIR_S + _MORE_S + 5)


# --- the judging -----------------------------------------------------------------------------

#: Goal: our clients, the peer, and the bound at each door.
RATIOS = (
    ("P1", 8, DUCKLAKE, {SERVE: at_least(12), DIRECT: at_least(20)}),
    ("P2", 64, DUCKLAKE, {SERVE: at_least(20), DIRECT: at_least(30)}),
    ("P3", 8, BATCH_8, {SERVE: at_least(1.0), DIRECT: at_least(1.6)}),
    ("P3", 64, BATCH_64, {SERVE: at_least(0.3), DIRECT: at_least(0.45)}),
    ("P4", 8, COPY, {SERVE: at_least(0.55), DIRECT: at_least(1.0)}),
)
ACKS = {SERVE: (at_most(7, "ms"), at_most(30, "ms")), DIRECT: (at_most(4, "ms"), at_most(12, "ms"))}


def judge(turns: Turns) -> list[Row]:
    # Pairs may stand alone: a run may ask for nothing else.
    there = {
        door
        for door in (SERVE, DIRECT)
        if any(turns.values(one, "rows_per_s") for one in (name(door, 8), paired(name(door, 8))))
    }
    rows: list[Row] = []
    for goal, clients, peer, bounds in RATIOS:
        for door, bound in bounds.items():
            what = f"published rows/s, {clients} clients, {door} door"
            if door not in there:
                rows.append(absent(goal, what, _why_absent(turns, door)))
                continue
            ours = name(door, clients)
            rows.append(
                against(
                    turns, goal, what, ours=ours, peer=peer, figure="rows_per_s", unit="rows/s",
                    bound=bound, paired_as=(paired(ours), paired(peer)),
                    note=_beside(turns, peer) if bound.near_unity else "",
                )
            )  # fmt: skip
    for door in sorted(there, reverse=True):
        for figure, bound in zip(("ack_ms_p50", "ack_ms_p99"), ACKS[door], strict=True):
            rows.append(
                alone(
                    turns, "P5", f"ack {figure[-3:]}, 8 clients, {door} door", ours=name(door, 8),
                    figure=figure, bound=bound, peer=DUCKLAKE,
                )
            )  # fmt: skip
    rows += [_conflicts(turns)]
    rows += [row for door in sorted(there, reverse=True) for row in _cpu(turns, door)]
    return rows


def _beside(turns: Turns, peer: str) -> str:
    """In pairs our stack is up beside the peer: what that cost the peer."""

    values = spread_of(turns.values(paired(peer), "cores_of_our_stack_beside"))
    if values is None:
        return ""
    return f"our idle stack took {values.median:.2f} cores beside the peer's windows"


def _why_absent(turns: Turns, door: str) -> str:
    if door == DIRECT and turns.values(name(SERVE, 8), "rows_per_s"):
        return "not there: this stack's connection.json names no ingest_url"
    return "ours gave no figure"


def _conflicts(turns: Turns) -> Row:
    ours = [turns.counted(one) for one in turns.figures if one.startswith("lakebus")]
    failed, done = sum(one for one, _ in ours), sum(one for _, one in ours)
    said = [
        f"{peer} {failures} of {failures + requests}"
        for peer in (DUCKLAKE, DELTA, ICEBERG, COPY)
        for failures, requests in (turns.counted(peer),)
        if requests
    ]
    values = [float(failed)] if done else []
    return Row(
        "P8", "refused or failed requests that a client saw", "requests", spread_of(values),
        judging.judge_count(values, at_most(0, "requests")), at_most(0, "requests"),
        note=f"of {failed + done} requests. Seen by callers of peers after their own retries: "
        + "; ".join(said),
    )  # fmt: skip


def _cpu(turns: Turns, door: str) -> list[Row]:
    contender = name(door, 64)
    runs = [
        figures["server_cpu_us_per_request"]
        for figures in turns.figures.get(contender, {}).values()
    ]
    rows = []
    wholes = (
        ("all of ours", [sum(run.values()) for run in runs], PROTOTYPE[door][0], parts(runs)),
        ("PostgreSQL", [run.get("PostgreSQL", 0.0) for run in runs], PROTOTYPE[door][1], ""),
    )
    for what, values, prototype, of_parts in wholes:
        bound = at_most(round(1.3 * prototype), "µs")
        rows.append(
            Row(
                "P26", f"CPU a 100-row request at 64 clients, {what}, {door} door", "µs",
                spread_of(values),
                judging.judge_value(values, bound).beside_others(turns.others_cores(contender)),
                bound,
                note=f"{of_parts}1.3 x the prototype's {prototype:g} µs, which was measured on"
                " another day on a machine of this kind; the load generator is not in it",
            )
        )  # fmt: skip
    return rows


def parts(runs: Sequence[Mapping[str, float]]) -> str:
    """The medians of the groups of processes, the dearest first."""

    groups = {group for run in runs for group in run}
    medians = {group: statistics.median(run.get(group, 0.0) for run in runs) for group in groups}
    dearest = sorted(medians.items(), key=lambda part: (-part[1], part[0]))
    said = ", ".join(f"{group} {us:,.0f}" for group, us in dearest if us >= 0.5)
    return f"medians of its parts: {said}; " if said else ""


BENCHMARK = Benchmark(
    "ingest",
    ("P1", "P2", "P3", "P4", "P5", "P8", "P26"),
    "durable, acknowledged and published rows a second; latency; errors; CPU",
    CONDITIONS,
    run,
    judge,
)
