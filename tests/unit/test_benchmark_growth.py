"""Cost as work grows: slopes, what they are judged by, their tables; and the flame graphs."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import manifest as made_up
from benchmarks import profiles
from benchmarks.flames import SVG_BYTES_MAX, at_work, frame_of, picture, read_folded, table
from benchmarks.goals import growth, processes
from benchmarks.goals.context import Context, Options
from benchmarks.goals.judging import Verdict
from benchmarks.goals.report import Report, goal_table
from benchmarks.goals.rows import absent
from benchmarks.goals.turns import Turns
from benchmarks.growth.point import Held
from benchmarks.growth.slopes import end_slope, slope
from benchmarks.manifest import resolve_and_prune
from benchmarks.peers.growth_plots import PICTURES, curves_of
from storage.reading.manifest import Manifest

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, -1.0])
def test_slope_is_the_power_of_the_size(power: float) -> None:
    curve = {float(n): 3.0 * n**power for n in SIZES}
    assert [slope(curve), end_slope(curve)] == pytest.approx([power, power], abs=1e-9)


def test_cost_that_begins_to_grow_late_is_seen_at_the_end_of_the_curve() -> None:
    curve = {float(n): 1_000.0 + n / 100 for n in SIZES}
    whole, end = slope(curve), end_slope(curve)
    assert whole is not None
    assert end is not None
    assert whole < 0.2 < end


def test_slope_needs_two_sizes_at_which_something_was_counted() -> None:
    assert slope({}) is None
    assert slope({10: 4.0}) is None
    assert slope({10: 0.0, 100: 4.0}) is None
    assert end_slope({}) is None


# --- the judging -----------------------------------------------------------------------------


def turns_of(*, publish_power: float = 0.0, resolve_ms: float = 2.0, until: int = 10**6) -> Turns:
    turns = Turns()
    for size in (one for one in SIZES if one <= until):
        curves = {
            "publish, ms": [4.0, 5.0, 6.0],
            "publish, statements": [1.0],
            "publish, rows read": [7.0 * size**publish_power],
            "publish, blocks": [40.0],
            "publish, WAL bytes": [2_000.0],
            f"{growth.RESOLVE}, p99 ms": [resolve_ms] * 5,
            "manifest, MiB": [100.0],
        }
        figures: dict[str, Any] = {
            "size": size, "curves": curves, "tables": 1_000, "snapshots": 100_000,
            "by_table": {"publish": {"snapshot": 70.0, "bus_done": 1.0}}, "requests": 1,
            "cores_of_others": 0.0,
        }  # fmt: skip
        turns.take(growth.contender("files", size), 0, lambda f=figures: f, limit_s=5)  # type: ignore[misc]
    return turns


def verdicts(turns: Turns) -> dict[str, tuple[Verdict, str]]:
    rows = growth.judge(turns)
    assert {row.goal for row in rows} == {"P14", growth.GOAL}
    return {row.what: (row.judged.verdict, row.note) for row in rows}


def row_of(turns: Turns, begin: str) -> tuple[Verdict, str]:
    return next(found for what, found in verdicts(turns).items() if what.startswith(begin))


def test_publish_cost_that_grows_with_files_is_short_and_names_the_table() -> None:
    assert row_of(turns_of(), "publish, by files")[0] is Verdict.PASS
    verdict, note = row_of(turns_of(publish_power=0.5), "publish, by files")
    assert verdict is Verdict.SHORT
    assert "rows read: 22.1 at 10, 7,000 at 1,000,000" in note
    assert "snapshot 70.0, bus_done 1.0" in note


def test_P14_needs_all_files_and_states_the_memory_of_the_manifest() -> None:
    verdict, note = row_of(turns_of(), "resolve")
    assert verdict is Verdict.PASS
    assert "1,000,000 live files, 1,000 tables, 100,000 snapshots" in note
    assert "100 MiB (105 bytes a live file)" in note
    assert row_of(turns_of(resolve_ms=11.0), "resolve")[0] is Verdict.SHORT
    assert row_of(turns_of(until=10_000), "resolve")[0] is Verdict.UNDECIDED


def test_curves_have_a_table_with_slopes_and_failures_stand_below_it(tmp_path: Path) -> None:
    turns = turns_of()
    (title, _, head, _, *lines) = growth.details(turns)
    assert title == "### By files"
    assert head.startswith("| | 10 | 100 | 1,000 |")
    assert lines[0] == "| publish, ms |" + " 5 (4 to 6) |" * 6 + " 0.00 | 0.00 |"
    report = Report(tmp_path, ABOUT, command="bench", quick=False)
    context = Context(Options(tmp_path, None, True, 1, 1.0, 0))
    found = report.begin(growth.BENCHMARK, context)
    found.figures, found.failures = turns.figures, ["files 10: too slow"]
    text = report.text()
    assert "### By files" in text
    assert "- files 10: too slow" in text


ABOUT: dict[str, Any] = {
    "cores": 2, "cpu": "a cpu", "memory_gib": 8.0, "kernel": "6", "python": "3.11",
    "packages": {"ray": "2"}, "commit": "abc", "load_average_at_start": 0.1,
}  # fmt: skip


def test_rows_without_a_number_come_last() -> None:
    rows = [absent(goal, "x", "") for goal in ("growth", "P14", "P2")]
    assert [line.split()[1] for line in goal_table(rows)[2:]] == ["P2", "P14", "growth"]


def test_curves_of_doors_are_kept_apart() -> None:
    turns = {
        "clients, Serve 4": [{"size": 4, "curves": {"rows/s": [5.0]}}],
        "clients, direct 4": [{"size": 4, "curves": {"rows/s": [7.0]}}] * 2,
        "files 4": [{"size": 4, "curves": {"publish, ms": [1.0]}}],
    }
    assert curves_of(turns, "clients") == {
        "Serve: rows/s": {4: [5.0]},
        "direct: rows/s": {4: [7.0, 7.0]},
    }
    assert curves_of(turns, "files") == {"publish, ms": {4: [1.0]}}


def test_pictures_are_of_axes_that_are_measured() -> None:
    assert {axis for _, axis, _, _ in PICTURES} == {*(one.name for one in growth.AXES), "clients"}


async def test_longest_turn_of_the_loop_is_seen() -> None:
    def hold() -> None:
        time.sleep(0.05)

    async with Held() as held:
        await asyncio.sleep(0)
        hold()
        await asyncio.sleep(0)
    assert held.longest_ms >= 50


async def test_resolving_asks_for_each_snapshot_and_prunes_its_files() -> None:
    catalog = made_up.MadeUpCatalog(files=60, tables=3, snapshots=40, seed=1)
    asked: list[int] = []

    async def find(snapshot_id: int) -> None:
        asked.append(snapshot_id)

    found = await resolve_and_prune(
        Manifest(catalog),  # type: ignore[arg-type]
        await catalog.head(),
        tables=["t0", "t1", "t2"],
        snapshots=range(1, 41),
        predicate=made_up.any_value,
        draws=20,
        chance=random.Random(3),
        find=find,
    )
    assert len(asked) == len(found.all_ms) == len(found.both_ms) == 20
    assert set(asked) <= set(range(1, 41))
    assert len(set(asked)) > 5
    parts = zip(found.find_ms, found.view_ms, found.prune_ms, strict=True)
    assert found.all_ms == pytest.approx([sum(one) for one in parts])


# --- flame graphs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        ("main (/srv/me/lake/actors/core.py:12)", "main (actors/core.py)"),
        ("get (/srv/x/lib/python3.11/site-packages/ray/get.py:7)", "get (ray/get.py)"),
        ("run (/usr/lib/python3.11/asyncio/base.py)", "run (asyncio/base.py)"),
        ("spin (/srv/secret/other.py:3)", "spin (other.py)"),
        ("<lambda> (<string>:1)", "<lambda> (<string>)"),
        ("process 17:/srv/x/bin/python -m lakebus", "process 17:python -m lakebus"),
    ],
)
def test_frames_tell_nothing_of_the_machine(frame: str, told: str) -> None:
    assert frame_of(frame, checkout="/srv/me/lake") == told


def test_shares_count_a_function_that_calls_itself_once() -> None:
    stacks = read_folded("a (x.py:1);b (x.py:2);a (x.py:1) 3\na (x.py:1);c (y.py:9) 1\n\n")
    assert sum(stacks.values()) == 4
    lines = table(stacks)
    assert "| `a (x.py)` | 75.0% | 100.0% |" in lines
    assert "| `c (y.py)` | 25.0% | 25.0% |" in lines
    assert "| `b (x.py)` | 0.0% | 75.0% |" in lines


def test_threads_that_wait_are_left_out() -> None:
    wait = "run (threading.py:9);Condition.wait (threading.py:320)"
    stacks = at_work(read_folded(f"{wait} 7\na (x.py:1);Condition.wait (y.py:2) 2\n"))
    assert stacks == {("a (x.py)", "Condition.wait (y.py)"): 2}


def test_picture_is_drawn_to_scale_and_stays_small() -> None:
    stacks = read_folded("a (x.py);b <c> (x.py) 3\na (x.py);d (x.py) 1\n")
    drawn = ElementTree.fromstring(picture(stacks, title="a & b"))
    boxes = {
        group[0].text: float(group[1].attrib["width"])
        for group in drawn.iter("{http://www.w3.org/2000/svg}g")
    }
    assert boxes["a (x.py): 100.0%"] == pytest.approx(1_200, abs=1)
    assert boxes["b <c> (x.py): 75.0%"] == pytest.approx(900, abs=1)
    rng = random.Random(2)
    deep = [";".join(f"f{rng.randrange(10**6)} (x.py)" for _ in range(20)) for _ in range(400)]
    wide = read_folded("\n".join(f"{stack} 1" for stack in deep))
    assert len(picture(wide, title="many").encode()) < SVG_BYTES_MAX


def test_busiest_process_of_a_kind_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    below = {
        1: [(2, "ray::ServeReplica:query:query"), (3, "python -I -c child"), (4, "python -I idle")],
        2: [(3, "python -I -c child"), (4, "python -I idle")],
    }
    looks = iter([1.0, 1.0, 4.0, 1.5])
    monkeypatch.setattr(profiles, "descendants", below.__getitem__)
    monkeypatch.setattr(processes, "cpu_of", lambda pid: next(looks))
    monkeypatch.setattr(profiles, "_LOOK_S", 0.0)
    assert profiles.busiest(1, profiles.TARGETS[3]) == 3


def test_profiler_that_does_not_end_is_told_to_and_then_killed() -> None:
    says = [sys.executable, "-I", "-S", "-c", "import sys; sys.exit('words')"]
    assert profiles.ended_in_time(says, 30.0) == (1, "words\n")
    # A child inherits whether it is ignored, as it is in what a shell runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert profiles.ended_in_time(["sleep", "60"], 0.05) == (-signal.SIGINT, "")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert profiles.ended_in_time(["sleep", "60"], 0.05, write_s=0.05) == (None, "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_report_of_profiles_names_each_process_and_its_picture(tmp_path: Path) -> None:
    stacks = read_folded("a (x.py);b (x.py) 3")
    found = [profiles.Profile(target, stacks, 0.5) for target in profiles.TARGETS]
    profiles.write(tmp_path, found, about=ABOUT, conditions="8 clients")
    text = (tmp_path / "flames.md").read_text()
    for target in profiles.TARGETS:
        assert f"({target.name}.svg)" in text
        assert (tmp_path / f"{target.name}.svg").exists()
    assert "| `b (x.py)` | 100.0% | 100.0% |" in text
