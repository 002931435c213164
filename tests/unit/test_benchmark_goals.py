"""How the goals' harness judges, what it does with turns that fail, and a run of it with fakes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data
from benchmarks.closed_load import ClosedLoad
from benchmarks.goals import ingest, processes, programs
from benchmarks.goals.__main__ import options_of, parse
from benchmarks.goals.context import Context, Options
from benchmarks.goals.judging import (
    PAIRS_WANTED,
    Bound,
    Spread,
    Verdict,
    at_least,
    at_most,
    bootstrap,
    judge_count,
    judge_ratio,
    judge_value,
)
from benchmarks.goals.programs import Failed, program
from benchmarks.goals.registry import BENCHMARKS, UnknownGoal, chosen, goals_of
from benchmarks.goals.report import Report, goal_table
from benchmarks.goals.rows import Benchmark, Row, against, alone
from benchmarks.goals.turns import Turns

ABOUT: dict[str, Any] = {
    "cores": 2, "cpu": "a cpu", "memory_gib": 8.0, "kernel": "6", "python": "3.11",
    "packages": {"ray": "2"}, "commit": "abc", "load_average_at_start": 0.1,
}  # fmt: skip


# --- judging ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "near"),
    [
        (at_least(1.0), True),
        (at_most(1.2), True),
        (at_least(0.77), True),
        (at_least(0.7), False),
        (at_least(12), False),
        (at_most(1.0, "ms"), False),
    ],
    ids=str,
)
def test_bound_within_1_3_of_unity_is_near(bound: Bound, near: bool) -> None:
    assert bound.near_unity is near


@pytest.mark.parametrize(
    ("ours", "bound", "verdict"),
    [
        ([120.0] * 5, at_least(12), Verdict.PASS),
        ([119.0] * 5, at_least(12), Verdict.SHORT),
        ([2.0] * 5, at_most(0.2), Verdict.PASS),
        ([3.0] * 5, at_most(0.2), Verdict.SHORT),
    ],
    ids=["at least, met", "at least, missed", "at most, met", "at most, missed"],
)
def test_ratio_far_from_unity_is_judged_by_medians(
    ours: list[float], bound: Bound, verdict: Verdict
) -> None:
    found = judge_ratio(ours, [10.0] * 5, bound)
    assert (found.verdict, found.reason) == (verdict, "")


def test_median_decides_not_the_best_run() -> None:
    found = judge_ratio([1000.0, 110.0, 110.0, 110.0, 110.0], [10.0] * 5, at_least(12))
    assert found.verdict is Verdict.SHORT
    assert found.value == pytest.approx(11.0)


def test_few_repetitions_are_said_beside_the_verdict() -> None:
    assert judge_ratio([200.0], [10.0], at_least(12)).reason == "1 of 5 repetitions"


@pytest.mark.parametrize(("ours", "peer"), [([], [1.0]), ([1.0], []), ([], [])])
def test_missing_side_is_not_measured(ours: list[float], peer: list[float]) -> None:
    assert judge_ratio(ours, peer, at_least(2)).verdict is Verdict.NOT_MEASURED


def test_run_that_gave_nothing_is_no_division() -> None:
    assert judge_ratio([1.0, 1.0], [0.0, 1.0], at_least(2)).verdict is Verdict.UNDECIDED


def test_near_unity_a_win_needs_thirty_pairs() -> None:
    few = judge_ratio([2.0] * 29, [1.0] * 29, at_least(1.0))
    assert (few.verdict, few.reason) == (Verdict.UNDECIDED, "29 of 30 pairs")
    assert judge_ratio([2.0] * 30, [1.0] * 30, at_least(1.0)).verdict is Verdict.PASS


def test_near_unity_a_loss_may_be_stated_on_fewer_pairs() -> None:
    assert judge_ratio([1.0] * 5, [2.0] * 5, at_least(1.0)).verdict is Verdict.SHORT
    assert judge_ratio([1.0] * 4, [2.0] * 4, at_least(1.0)).verdict is Verdict.UNDECIDED


def test_near_unity_the_interval_must_clear_the_bound_not_the_mean() -> None:
    rng = random.Random(1)
    ours = [math.exp(rng.gauss(0.02, 0.3)) for _ in range(PAIRS_WANTED)]
    found = judge_ratio(ours, [1.0] * PAIRS_WANTED, at_least(1.0))
    assert found.interval is not None
    assert found.interval[0] < 1.0 < found.interval[1]
    assert found.verdict is Verdict.UNDECIDED
    steady = judge_ratio([1.1 + n % 3 / 100 for n in range(30)], [1.0] * 30, at_most(1.2))
    assert steady.verdict is Verdict.PASS


def test_bootstrap_interval_covers_the_truth_about_nineteen_times_of_twenty() -> None:
    rng = random.Random(5)
    covered = 0
    for _ in range(60):
        pairs = [math.exp(rng.gauss(math.log(1.1), 0.2)) for _ in range(12)]
        low, high = bootstrap(pairs, resamples=400)
        covered += low <= 1.1 <= high
    assert 48 <= covered <= 60


def test_bootstrap_of_equal_pairs_is_a_point_and_is_repeatable() -> None:
    assert bootstrap([1.5] * 10) == pytest.approx((1.5, 1.5))
    pairs = [1.0, 1.2, 1.4]
    assert bootstrap(pairs) == bootstrap(pairs)


def test_value_and_count_are_judged_in_their_unit() -> None:
    assert judge_value([1.0, 2.0, 30.0, 1.0, 1.0], at_most(7, "ms")).verdict is Verdict.PASS
    assert judge_count([0.0, 0.0], at_most(0, "requests")).verdict is Verdict.PASS
    assert judge_count([0.0, 1.0], at_most(0, "requests")).verdict is Verdict.SHORT
    assert judge_value([], at_most(7, "ms")).verdict is Verdict.NOT_MEASURED


def test_busy_machine_gives_no_win_but_does_not_hide_a_loss() -> None:
    win, loss = (judge_value([ms] * 5, at_most(7, "ms")) for ms in (1.0, 9.0))
    assert win.beside_others(0.1) == win
    busy = win.beside_others(1.2)
    assert (busy.verdict, busy.reason) == (Verdict.UNDECIDED, "others took 1.2 cores meanwhile")
    assert loss.beside_others(1.2).verdict is Verdict.SHORT


# --- turns -----------------------------------------------------------------------------------


def test_failed_turn_is_written_down_and_not_tried_a_third_time() -> None:
    turns, tried = Turns(), []

    def fails() -> dict[str, Any]:
        tried.append(1)
        raise OSError("the disk is gone")

    for repetition in range(4):
        assert turns.take("a peer", repetition, fails, limit_s=5) is None
    assert len(tried) == 2
    assert turns.failures[0] == "a peer, repetition 1: the disk is gone"


def test_turn_that_hangs_ends_at_its_limit() -> None:
    turns = Turns()
    assert turns.take("a peer", 0, lambda: time.sleep(60) or {}, limit_s=0.05) is None  # type: ignore[func-returns-value]
    assert "took longer than 0.05 s" in turns.failures[0]


def test_pairs_are_of_the_repetitions_that_both_have() -> None:
    turns = Turns()
    for repetition in (0, 1, 2):
        turns.take("ours", repetition, lambda n=repetition: {"x": n}, limit_s=5)  # type: ignore[misc]
    for repetition in (2, 0):
        turns.take("peer", repetition, lambda n=repetition: {"x": 10 * n}, limit_s=5)  # type: ignore[misc]
    assert turns.pairs("ours", "peer", "x") == ([0, 2], [0, 20])


# --- programs --------------------------------------------------------------------------------

ECHO = """
import sys, time
from benchmarks import windows
print("a library says something")
if input() == '"die"': sys.exit("no")
windows.serve_plain(lambda **a: time.sleep(a.pop("sleep", 0)) or a)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "echo_program.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(programs.ROOT)]))
    return tmp_path / "log"


def test_program_answers_windows_and_is_ended(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_END_S", 0.1)
    with program("echo_program", {}, log=echo) as running:
        assert running.ready(30) == {"ready": True}
        assert running.window(30, seconds=2) == {"seconds": 2}
        pid = running.pid
        with pytest.raises(Failed, match=r"did not end a window within 0\.05 s"):
            running.window(0.05, sleep=20)
    assert not Path(f"/proc/{pid}").exists()


def test_program_that_dies_says_where_to_look(echo: Path) -> None:
    with (
        program("echo_program", "die", log=echo) as running,  # type: ignore[arg-type]
        pytest.raises(Failed, match="see its log"),
    ):
        running.ready(30)
    assert "no" in echo.read_text()


LAST_WORDS = """
import signal, sys, time
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(60)
finally:
    print("down", file=sys.stderr)
"""


def test_program_that_takes_too_long_may_take_its_stack_down(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-I", "-S", "-c", LAST_WORDS]
    # What arrives before the program is ready for it waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with pytest.raises(Failed, match=r"took longer than 0\.05 s"):
            programs.said(command, timeout_s=0.05, log=log)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert "down" in log.read_text()


# --- the load ---------------------------------------------------------------------------------


async def test_load_counts_refusals_and_drops_and_gives_every_request_its_own_key() -> None:
    seen: list[tuple[bytes, bytes]] = []
    asked: list[Any] = []
    serving: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
                body = await reader.readexactly(length)
                status, answer = b"200 OK", b"{}"
                if b"/v1/visibility" in head:
                    asked.append(json.loads(body))
                else:
                    seen.append((re.search(rb"Idempotency-Key: (\S+)", head)[1], body))  # type: ignore[index]
                    status, answer = b"202 Accepted", b'{"receipt": {"visibility_token": "t"}}'
                    if len(seen) == 5:
                        status, answer = b"429 Slow", b'{"code": "backpressure"}'
                    if len(seen) == 9:
                        break
                writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status, len(answer)))
                for byte in (answer[:3], answer[3:]):  # an answer may come in pieces
                    writer.write(byte)
                    await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    load = ClosedLoad(
        url=url, read_url=url, api_key="k", table="t", clients=3, rows=10, seed=1, templates=4
    )
    found = await load.window(seconds=30.0, requests_max=20)
    load.close()
    await asyncio.gather(*serving)
    server.close()
    await server.wait_closed()
    assert found["failures"] == {"backpressure": 1, "dropped": 1}
    assert (found["requests"], found["rows"], found["visible"]) == (18, 180, True)
    assert len({key for key, _ in seen}) == len({body for _, body in seen}) == 20
    assert asked == [{"token": ["t", "t", "t"], "timeout_ms": 60_000}]
    assert found["load_cpu_us_per_request"] > 0


# --- processes, rows, report -----------------------------------------------------------------


def test_processes_are_told_apart_by_their_command_lines() -> None:
    assert processes.group_of("postgres: lakebus lakebus 127.0.0.1(1) idle") == "PostgreSQL"
    assert processes.group_of("ray::ServeReplica:api:api") == "ingest replica"
    assert processes.group_of("ray::ServeReplica:query:query") == "query replica"
    assert processes.group_of("ray::RoleActor") == "core"
    assert processes.group_of("ray::lakebus:job:compact") == "jobs"
    assert processes.group_of("python -I -c import json") is None


def test_cpu_of_this_process_is_seen_and_only_grows() -> None:
    before = processes.cpu_seconds(os.getpid())
    assert processes.OTHER in before
    assert all(seconds >= 0 for seconds in processes.used(before, before).values())
    assert processes.status_mib(os.getpid(), "VmHWM") > 1


def test_parts_of_a_request_are_medians_the_dearest_first() -> None:
    runs = [{"core": 120.0, "jobs": 0.2}, {"core": 180.0, "PostgreSQL": 400.0}, {"core": 130.0}]
    assert ingest.parts(runs) == "medians of its parts: core 130; "
    assert ingest.parts(runs[1:2]) == "medians of its parts: PostgreSQL 400, core 180; "
    assert ingest.parts([]) == ""


def test_goals_that_nobody_asked_for_are_not_told_as_missing(tmp_path: Path) -> None:
    assert goals_of("") is None
    assert goals_of("p9, inside") == frozenset({"P9", "P18", "P19", "P20"})
    report = Report(tmp_path, ABOUT, command="bench", quick=True, goals=goals_of("P1"))
    report.begin(fake_benchmark("empty", 1.0), context_of(tmp_path, 1))
    assert [row.goal for row in report.rows()] == ["P1"]


def fake_benchmark(name: str, ours: float, *, fails: bool = False) -> Benchmark:
    def run(context: Context, turns: Turns) -> None:
        for repetition in range(context.options.repetitions):
            turns.take("ours", repetition, lambda: {"rows_per_s": ours, "requests": 3}, limit_s=5)
            turns.take("peer", repetition, lambda: {"rows_per_s": 10.0, "requests": 3}, limit_s=5)
        if fails:
            raise RuntimeError("half way")

    def judge(turns: Turns) -> list[Row]:
        return [
            against(
                turns, "P1", "rows/s", ours="ours", peer="peer", figure="rows_per_s",
                unit="rows/s", bound=at_least(12),
            ),
            alone(turns, "P5", "ack", ours="ours", figure="ack_ms_p50", bound=at_most(7, "ms")),
        ]  # fmt: skip

    return Benchmark(name, ("P1", "P5"), "a fake", "none", run, judge)


class AloneOnTheMachine(Context):
    """Whatever else runs beside the tests is no stranger."""

    def cpu_seconds(self) -> float:
        return processes.busy_seconds()


def context_of(out: Path, repetitions: int) -> Context:
    return AloneOnTheMachine(Options(out, None, True, repetitions, 1.0, 0))


def test_report_prints_a_loss_like_a_win_and_is_written_after_each_turn(tmp_path: Path) -> None:
    report = Report(tmp_path, ABOUT, command="bench", quick=True)
    for name, ours in (("wins", 130.0), ("loses", 110.0)):
        benchmark = fake_benchmark(name, ours)
        turns = report.begin(benchmark, context_of(tmp_path, 5))
        turns.take("ours", 0, lambda: {"rows_per_s": 1.0}, limit_s=5)
        assert f"`{name}` was being measured" in (tmp_path / "report.md").read_text()
        benchmark.run(context_of(tmp_path, 5), turns)
        report.done()
    text = (tmp_path / "report.md").read_text()
    assert "A quick run" in text
    assert "commit abc" in text
    lines = [line for line in text.splitlines() if line.startswith("| P1 ")]
    assert ["**pass**" in line for line in lines] == [True, False]
    assert "| 11 x " in lines[1]
    assert "**short**" in lines[1]
    assert "**not measured** (ours gave no figure)" in text
    document = json.loads((tmp_path / "loses.json").read_text())
    assert document["rows"][0]["verdict"] == "short"
    assert document["machine"] == ABOUT
    assert len(document["turns"]["peer"]) == 5
    assert not list(tmp_path.glob("*.new"))


def test_goals_stand_in_the_order_of_their_numbers() -> None:
    judged = judge_value([1.0] * 5, at_most(2, "ms"))
    rows = [Row(goal, goal, "ms", Spread.of([1.0]), judged) for goal in ("P12", "P2", "P1")]
    assert [line.split()[1] for line in goal_table(rows)[2:]] == ["P1", "P2", "P12"]


def test_goals_are_chosen_by_number_or_name() -> None:
    fakes = (fake_benchmark("wins", 1.0),)
    assert chosen("p5", fakes) == list(fakes)
    assert chosen("", fakes) == chosen("wins,P1", fakes) == list(fakes)
    with pytest.raises(UnknownGoal, match=r"no benchmark for P99; there are: wins \(P1, P5\)"):
        chosen("P1,P99", fakes)


def test_names_of_benchmarks_are_unique_and_every_one_has_goals_and_conditions() -> None:
    assert len({one.name for one in BENCHMARKS}) == len(BENCHMARKS)
    for one in BENCHMARKS:
        assert one.goals
        assert one.conditions
        rows = one.judge(Turns())
        assert {row.goal for row in rows} <= set(one.goals)
        assert {row.judged.verdict for row in rows} <= {Verdict.NOT_MEASURED}, "nothing was run"


def ingest_turns(*doors: str) -> Turns:
    """Ours publishes 100,000 rows/s at each door, DuckLake 5,000, everybody else 100,000."""

    turns = Turns()
    figures = {
        "rows_per_s": 100_000, "requests": 10, "ack_ms_p50": 5.0, "ack_ms_p99": 20.0,
        "cores_of_others": 0.0, "server_cpu_us_per_request": {"PostgreSQL": 60.0, "core": 300.0},
    }  # fmt: skip
    ours = [ingest.name(door, clients) for door in doors for clients in ingest.CLIENTS]
    for contender in (*ours, *ingest.REPEATED):
        mine = figures | ({"rows_per_s": 5_000} if contender == ingest.DUCKLAKE else {})
        turns.figures[contender] = dict.fromkeys(range(5), mine)
    return turns


def test_ingest_says_which_door_is_not_there_and_judges_the_other() -> None:
    rows = {(row.goal, row.what): row.judged for row in ingest.judge(ingest_turns("Serve"))}
    served = rows["P1", "published rows/s, 8 clients, Serve door"]
    assert (served.verdict, served.value) == (Verdict.PASS, 20.0)
    direct = rows["P1", "published rows/s, 8 clients, direct door"]
    assert direct.verdict is Verdict.NOT_MEASURED
    assert "names no ingest_url" in direct.reason
    level = rows["P3", "published rows/s, 8 clients, Serve door"]
    assert (level.verdict, level.reason) == (Verdict.UNDECIDED, "5 of 30 pairs")


def test_ingest_judges_both_doors_by_their_own_bounds() -> None:
    rows = ingest.judge(ingest_turns("Serve", "direct"))
    found = {(row.goal, row.what): row.judged.verdict for row in rows}
    assert found["P2", "published rows/s, 64 clients, Serve door"] is Verdict.PASS
    assert found["P2", "published rows/s, 64 clients, direct door"] is Verdict.SHORT
    assert found["P5", "ack p50, 8 clients, Serve door"] is Verdict.PASS
    assert found["P5", "ack p50, 8 clients, direct door"] is Verdict.SHORT
    assert Verdict.NOT_MEASURED not in found.values()


def test_quick_run_never_replaces_the_figures_of_a_full_one(tmp_path: Path) -> None:
    quick = options_of(parse(["--quick"]))
    assert (quick.out.name, quick.repetitions, quick.pairs) == ("quick", 1, 3)
    full = options_of(parse(["--out", str(tmp_path), "--repetitions", "7"]))
    assert (full.out, full.repetitions, full.pairs) == (tmp_path, 7, 30)


# --- data ------------------------------------------------------------------------------------


def test_template_gives_every_request_rows_of_its_own_and_keeps_its_length() -> None:
    template = data.Template(100, random.Random(1))
    bodies = [template.body(number) for number in (0, 1, 123_456_789)]
    assert {len(body) for body in bodies} == {len(template)}
    ids = [row["event_id"] for body in bodies for row in json.loads(body)]
    assert len(set(ids)) == 300
    assert json.loads(bodies[0])[0]["event_id"] == data.FIRST_REQUEST * 1_000
    assert sys.getsizeof(bodies[0]) > 10_000
