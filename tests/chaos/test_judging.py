"""What a run proves: answers, recovery, problems, the table. Pure functions, made-up records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.http1 import Answer
from tests.chaos import recovery, verdict
from tests.chaos.answers import Says, judge
from tests.chaos.injector import Done
from tests.chaos.kinds import Placement
from tests.chaos.recovery import Cycle, quantile, served_again_s
from tests.chaos.regressions import regressions
from tests.chaos.report import shown
from tests.chaos.results import Results
from tests.chaos.run import Options, Report
from tests.chaos.schedule import Fault
from tests.chaos.session import FINDING
from tests.history.record import History, Ingest, Read, Receipt, Receipted, Rows, Token
from tests.history.recorder import Recorder

_S = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


def answer(status: int, body: bytes, content_type: str = "application/json") -> Answer:
    return Answer(status, {"content-type": content_type}, body)


@pytest.mark.parametrize(
    ("given", "says", "wrong"),
    [
        (answer(202, b"{}"), Says.YES, False),
        (answer(503, b'{"code": "unavailable", "detail": "x"}'), Says.CODE, False),
        (answer(500, b'{"code": "internal_error", "detail": "x"}'), Says.CODE, True),
        (answer(500, b'{"code": "corrupt", "detail": "x"}'), Says.CODE, True),
        (answer(500, b"Internal Server Error", "text/plain"), Says.FRONT, False),
        (answer(500, b"Internal Server Error"), Says.UNTYPED, True),
        (answer(500, b"<html>", "text/html"), Says.UNTYPED, True),
        (answer(503, b'{"error": "?"}'), Says.UNTYPED, True),
    ],
)
def test_only_typed_answers_and_those_of_the_balancer_are_taken(
    given: Answer, says: Says, wrong: bool
) -> None:
    found = judge(given)
    assert (found.says, found.finding is not None) == (says, wrong)


def ingest(request: int, attempt: int = 1) -> Ingest:
    return Ingest(request, "p", "t", {"t": 1}, key=f"k{request}", attempt=attempt)


def receipted(request: int) -> Receipted:
    token = Token("h", 0, {0: request + 1}, ((0, request),))
    return Receipted(Receipt(f"b1-0-{request}", "t", 1, 0, "f", token, "d"))


def probe_record() -> History:
    """Cycles from 0 to 1 s and, after a write that was lost once, from 2 to 9 s."""
    clock = Clock()
    recorder = Recorder.in_memory(now_ns=clock)

    def read(request: int) -> None:
        with recorder.begin("c-probe", Read(("t",), window=(request, request + 1))) as op:
            op.ok(Rows(1, {"t": {request: (1, 0)}}))

    with recorder.begin("c-probe", ingest(1)) as op:
        clock.now = _S // 2
        op.ok(receipted(1))
    clock.now = _S
    read(1)
    clock.now = 2 * _S
    with recorder.begin("c-probe", ingest(2)) as op:
        op.unknown("dropped: TimeoutError()")
    clock.now = 8 * _S
    with recorder.begin("c-probe", ingest(2, attempt=2)) as op:
        op.ok(receipted(2))
    clock.now = 9 * _S
    read(2)
    clock.now = 50 * _S
    with recorder.begin("c", Read(("t",))) as op:
        op.unknown("dropped: TimeoutError()")
    recorder.note(f"{FINDING}c.1 internal_error")
    recorder.note("fault 1 kill_core done")
    return recorder.history()


def test_recovery_counts_only_cycles_begun_after_the_fault() -> None:
    found = recovery.cycles(probe_record())
    assert [(round(c.began / _S), round(c.ended / _S)) for c in found] == [(0, 1), (2, 9)]
    assert served_again_s(found, int(0.2 * _S)) == pytest.approx(8.8, abs=0.01)
    assert served_again_s(found, 3 * _S) is None


def test_recovery_takes_the_first_of_several_probes() -> None:
    found = [Cycle(10 * _S, 30 * _S), Cycle(11 * _S, 12 * _S)]
    assert served_again_s(found, 5 * _S) == pytest.approx(7.0)


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3.0], 0.99) == 3.0
    assert quantile(range(1, 101), 0.5) == 50
    assert quantile(range(1, 101), 0.99) == 99


def test_outcomes_findings_and_late_failures() -> None:
    history = probe_record()
    assert verdict.outcomes(history) == {
        "ingest": {"ok": 2, "unknown dropped TimeoutError": 1},
        "read": {"ok": 2, "unknown dropped TimeoutError": 1},
    }
    assert verdict.findings(history) == ["c.1 internal_error"]
    assert verdict.late_failures(history, healthy_since=51 * _S) == []
    (late,) = verdict.late_failures(history, healthy_since=3 * _S)
    assert "47.0 s after all was well" in late


def test_a_run_in_which_nothing_happened_proves_nothing() -> None:
    fault = Fault(0, "kill_core", at_s=1.0, hold_s=0.0, ordinal=0, dice=0.0)
    missed = Done(fault, began_s=0.0, missed="nobody")
    minima = verdict.Minima.of(seconds=2, planned=1)
    assert len(verdict.too_little(probe_record(), [missed], minima)) == 1
    assert verdict.too_little(probe_record(), [Done(fault, began_s=0.0)], minima) == []


def report(seed: int, *, problems: list[str]) -> Report:
    made = Report(
        Options(seed, 60.0, Placement.SPREAD, kills=True),
        Path("nowhere"),
        {"packages": {"ray": "2"}, "commit": "c", "cores": 2},
        problems=problems,
    )
    made.faults = [
        {"kind": "kill_core", "missed": "", "served_again_s": 2.0, "restored_s": 3.0},
        {"kind": "kill_core", "missed": "nobody", "served_again_s": None, "restored_s": None},
        {"kind": "partition", "missed": "", "served_again_s": 4.0, "restored_s": None},
    ]
    made.operations = {"ingest": {"ok": 5}}
    return made


def test_results_grow_over_calls(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    for seed in (1, 2):
        results = Results.read(path)
        assert results.next_seed == seed
        results.add(report(seed, problems=[] if seed == 1 else ["lost | found"]))
        results.write(path)
    results = Results.read(path)
    assert (results.kills, len(results.runs)) == (2, 2)
    assert json.loads(path.read_text())["felt"]["partition"] == [[4.0, None], [4.0, None]]
    text = path.with_suffix(".md").read_text()
    assert "| kill_core | 2 | 2.00 | 2.00 | 2.00 | 3.00 | 3.00 | 3.00 |" in text
    assert "2 runs, 1 of which held; 2 kills among 4 faults" in text
    assert "lost / found" in text


def test_a_report_says_whether_it_held() -> None:
    assert shown(report(1, problems=[])).endswith("HELD")
    assert "DID NOT HOLD:\n  lost" in shown(report(1, problems=["lost"]))


def test_the_kept_regressions_can_be_run() -> None:
    assert all(one.found and one.options.seconds > 0 for one in regressions())
