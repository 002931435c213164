"""P9 and P13: what many small commits do to the next commit, and to queries."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from typing import Any
from urllib.parse import quote

import asyncpg

from benchmarks import data, measures
from benchmarks.goals import judging
from benchmarks.goals.context import Context, PeerPostgres, wait_quiet
from benchmarks.goals.judging import at_most
from benchmarks.goals.programs import Failed
from benchmarks.goals.rows import Benchmark, Row, absent, information, spread_of
from benchmarks.goals.turns import Figures, Turns
from benchmarks.http1 import Connection
from benchmarks.stacks import RunningStack

ROWS, COMMITS, QUICK_COMMITS = 100, 10_000, 500
#: New sessions read the system's own tables; that is not what commits cost.
WARM_COMMITS = 100
OURS = "lakebus, commits in a row"
LAKES = {"ducklake": 2_000, "delta": 1_000, "iceberg": 300}
NAMES = {"ducklake": "DuckLake", "delta": "Delta", "iceberg": "Iceberg"}
COUNTERS = ("transactions", "rows_read", "wal_bytes")
SMALL, UNMERGED, MERGED = "lakebus, small batches", "DuckLake, not merged", "DuckLake, merged"
PAIRS = 30
_PEER_S, _LIMIT_S = 90.0, 900.0
TABLE = "history"

#: Request 7,777 of the load (of the quick one, 77) has the row that the point look-up wants.
QUERIES = {
    "count": "SELECT count(*) FROM {t}",
    "point": "SELECT event_id, device, region, ts, value, amount, note FROM {t}"
    " WHERE event_id = {point}",
    "range_group": "SELECT region, count(*), avg(value) FROM {t}"
    " WHERE ts BETWEEN TIMESTAMP '2026-03-05' AND TIMESTAMP '2026-03-15' GROUP BY region",
    "top10": "SELECT event_id, amount FROM {t} ORDER BY amount DESC, event_id LIMIT 10",
}

CONDITIONS = f"""\
P9: one client writes {COMMITS:,} bodies of {ROWS} rows, each when the last was visible, so that \
each is a snapshot of its own, after {WARM_COMMITS} that are not counted; maintenance is off. \
Counted in the embedded PostgreSQL, in \
tenths: transactions (in the place of statements), rows read and WAL bytes a snapshot, the \
stack's own polling included. Peers: one writer; growth of the time of a commit, not counters, \
over fewer commits (or {_PEER_S:g} s): for information.
P13: {COMMITS:,} bodies of {ROWS} rows by 8 clients, maintenance by default and left to itself \
until its files stay as many or are few (at most 3 minutes); the peer has the same commits from \
one writer, not merged, then merged once. Then each query in turns, ours over HTTP by the query \
replica's direct door (as in P12), the peer's in process with two threads, {PAIRS} times."""


def run(context: Context, turns: Turns) -> None:
    commits = QUICK_COMMITS if context.options.quick else COMMITS
    if context.options.wants("P9"):
        _in_a_row(context, turns, commits)
    if context.options.wants("P13"):
        _small_batches(context, turns, commits)


# --- P9 --------------------------------------------------------------------------------------


def _in_a_row(context: Context, turns: Turns, commits: int) -> None:
    with context.stack_or_note(turns, maintenance_enabled="false") as stack:
        if stack is not None:
            turns.take(OURS, 0, lambda: asyncio.run(_commits(stack, commits)), limit_s=_LIMIT_S)
    if context.options.peers is not None:
        with context.postgres() as server:
            for store, most in LAKES.items():
                turns.take(
                    f"{NAMES[store]}, commits in a row", 0,
                    lambda s=store, m=most: _growth(context, server, s, min(m, commits)),  # type: ignore[misc]
                    limit_s=_PEER_S + 120,
                )  # fmt: skip


async def _commits(stack: RunningStack, commits: int) -> Figures:
    await measures.make_table(stack.url, stack.api_key, TABLE)
    database = await asyncpg.connect(dsn_of(stack))
    connection = Connection(stack.url, stack.api_key)
    rng = random.Random(9)
    templates = [data.Template(ROWS, rng) for _ in range(100)]
    tenths: list[dict[str, float]] = []
    tenth, latencies = commits // 10, list[float]()
    before, first = dict[str, float](), 0
    for number in range(WARM_COMMITS + tenth * 10):
        began = time.perf_counter()
        answer = await connection.request(
            "POST", f"/v1/tables/{TABLE}/rows?wait=visible",
            body=templates[number % len(templates)].body(number),
            headers={"Content-Type": "application/json", "Idempotency-Key": f"h-{number}"},
        )  # fmt: skip
        latencies.append((time.perf_counter() - began) * 1000)
        if answer.status != 200:
            raise Failed(f"a write was answered {answer.status}: {answer.body[:200]!r}")
        done = number + 1 - WARM_COMMITS
        if done >= 0 and done % tenth == 0:
            last = int(answer.json()["snapshot_id"])
            now = await _counters(database)
            made = last - first
            if done:
                tenths.append(
                    {name: round((now[name] - before[name]) / made, 2) for name in COUNTERS}
                    | {"visible_ms_p50": round(statistics.median(latencies), 3), "snapshots": made}
                )
            before, first = now, last
            latencies.clear()
    connection.close()
    await database.close()
    grown = {
        f"{name}_growth": round(tenths[-1][name] / max(tenths[0][name], 1e-9), 3)
        for name in (*COUNTERS, "visible_ms_p50")
    }
    return {"requests": tenth * 10, **grown, "tenths": tenths}


async def _counters(database: Any) -> dict[str, float]:
    """After the moment in which idle sessions hand in what they counted."""

    await asyncio.sleep(1.5)
    found = await database.fetchrow(
        "SELECT sum(xact_commit) AS transactions, sum(tup_returned + tup_fetched) AS rows_read,"
        " pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0') AS wal_bytes"
        " FROM pg_stat_database WHERE datname = current_database()"
    )
    return {name: float(found[name]) for name in COUNTERS}


def dsn_of(stack: RunningStack) -> str:
    """Of the stack's embedded database, as the role that owns it."""

    passwords = json.loads((stack.data_dir / "secrets" / "postgres.json").read_text())
    port = json.loads((stack.data_dir / "postgres" / "state.json").read_text())["port"]
    return f"postgresql://lakebus:{quote(passwords['owner'])}@127.0.0.1:{port}/lakebus"


def _order(server: PeerPostgres, store: str) -> dict[str, Any]:
    dsn = server.database()
    return {"store": store, "dsn": dsn, "folder": str(server.folder / dsn.rpartition("/")[2])}


def _growth(context: Context, server: PeerPostgres, store: str, commits: int) -> Figures:
    with context.peer("history", _order(server, store)) as peer:
        peer.ready(60)
        found: Figures = peer.window(_PEER_S + 60, step="commit", commits=commits, seconds=_PEER_S)
        return found


# --- P13 -------------------------------------------------------------------------------------


def _small_batches(context: Context, turns: Turns, commits: int) -> None:
    with context.stack_or_note(turns) as stack, context.postgres() as server:
        if stack is None:
            return
        if turns.take(
            f"{SMALL}, loading", 0, lambda: _load(context, stack, commits), limit_s=_LIMIT_S
        ) is None or context.options.peers is None:  # fmt: skip
            return
        with context.peer("history", _order(server, "ducklake")) as peer:
            loaded = turns.take(
                f"{UNMERGED}, loading", 0, lambda: _load_peer(peer, commits), limit_s=_LIMIT_S
            )
            if loaded is None:
                return
            wait_quiet(stack.supervisor)
            point = (data.FIRST_REQUEST + commits * 7 // 9) * data.ROWS_MAX + 77
            for contender in (UNMERGED, MERGED):
                if contender == MERGED:
                    turns.take(
                        f"{MERGED}, merging", 0, lambda: peer.window(300, step="merge"),
                        limit_s=310,
                    )  # fmt: skip
                for name, sql in QUERIES.items():
                    turns.take(
                        f"{name}: {contender}", 0,
                        lambda s=sql: _asked(stack, peer, s, point),  # type: ignore[misc]
                        limit_s=_LIMIT_S,
                    )  # fmt: skip


def _load(context: Context, stack: RunningStack, commits: int) -> Figures:
    with context.load(
        stack, stack.url, table=TABLE, clients=8, seed=0, rows=ROWS, warm_s=0.0
    ) as load:
        load.ready(60)
        found: Figures = load.window(400, seconds=300.0, requests_max=commits)
    files = asyncio.run(_settled(stack))
    return found | {"files_at_the_end": files}


async def _settled(stack: RunningStack) -> int:
    """Files of the table when maintenance has done what it does by itself."""

    connection = Connection(stack.url, stack.api_key)
    end, files, since = time.monotonic() + 180, -1, time.monotonic()
    while time.monotonic() < end and time.monotonic() - since < 45 and not 0 <= files <= 4:
        answer = await connection.request("GET", f"/v1/tables/{TABLE}")
        now = int(answer.json()["files"])
        if now != files:
            files, since = now, time.monotonic()
        await asyncio.sleep(1.0)
    connection.close()
    return files


def _load_peer(peer: Any, commits: int) -> Figures:
    peer.ready(60)
    found: Figures = peer.window(600, step="commit", commits=commits, seconds=500)
    if found["requests"] < commits:
        raise Failed(f"DuckLake made {found['requests']} of {commits} commits in 500 s")
    return found


def _asked(stack: RunningStack, peer: Any, sql: str, point: int) -> Figures:
    ours, theirs = [], []
    lake_sql = sql.format(t="lake.t", point=point)

    async def over_http() -> None:
        connection = Connection(stack.asked, stack.api_key)
        for number in range(PAIRS + 2):
            began = time.perf_counter()
            answer = await connection.query(sql.format(t=TABLE, point=point))
            took = (time.perf_counter() - began) * 1000
            if answer.status != 200:
                raise Failed(f"a query was answered {answer.status}: {answer.body[:200]!r}")
            said = peer.window(60, step="ask", sql=lake_sql)
            if said["rows"] != len(answer.json()["rows"]):
                raise Failed("the peer's answer has another number of rows")
            if number >= 2:
                ours.append(round(took, 3))
                theirs.append(said["ms"])
        connection.close()

    asyncio.run(over_http())
    return {
        "requests": PAIRS, "query_ms_p50": measures.percentile(ours, 0.5),
        "peer_ms_p50": measures.percentile(theirs, 0.5), "ours_ms": ours, "peer_ms": theirs,
    }  # fmt: skip


# --- the judging -----------------------------------------------------------------------------


def judge(turns: Turns) -> list[Row]:
    rows = []
    run = turns.figures.get(OURS, {}).get(0, {})
    for name in COUNTERS:
        what = f"{name.replace('_', ' ')} a snapshot, last tenth by first"
        if not run:
            rows.append(absent("P9", what, "ours gave no figure"))
            continue
        bound = at_most(1.05)
        values = [tenth[name] for tenth in (run["tenths"][0], run["tenths"][-1])]
        rows.append(
            Row(
                "P9", what, name.replace("_", " "), spread_of(values),
                judging.judge_count([run[f"{name}_growth"]], bound), bound,
                note=f"first {values[0]:g}, last {values[1]:g}, of {run['requests']:,} commits",
            )
        )  # fmt: skip
    for store in LAKES:
        values = turns.values(f"{NAMES[store]}, commits in a row", "growth")
        if values and run:
            commits = turns.values(f"{NAMES[store]}, commits in a row", "requests")[0]
            rows.append(
                information(
                    "P9", "growth of the time of a commit", "x", [run["visible_ms_p50_growth"]],
                    f"times of {commits:.0f} commits; the goal is in counters",
                    peer_name=NAMES[store], peer=spread_of(values),
                )
            )  # fmt: skip
    for contender, wanted in ((UNMERGED, 0.2), (MERGED, 0.8)):
        rows += [_query(turns, name, contender, wanted) for name in QUERIES]
    return rows


def _query(turns: Turns, name: str, contender: str, wanted: float) -> Row:
    what, bound = f"{name} after many small batches", at_most(wanted)
    run = turns.figures.get(f"{name}: {contender}", {}).get(0)
    if run is None:
        return absent("P13", f"{what}, by {contender}", "no figure of ours, or of the peer")
    files = turns.figures[f"{SMALL}, loading"][0]["files_at_the_end"]
    judged = judging.judge_ratio(run["ours_ms"], run["peer_ms"], bound)
    others = turns.others_cores(f"{name}: {contender}")
    return Row(
        "P13", what, "ms", spread_of(run["ours_ms"]), judged.beside_others(others), bound,
        contender, spread_of(run["peer_ms"]),
        f"ours over HTTP, {files} files; the peer in process",
    )  # fmt: skip


BENCHMARK = Benchmark(
    "history",
    ("P9", "P13"),
    "what many small commits do to the next commit and to queries",
    CONDITIONS,
    run,
    judge,
)
