"""What a soak judges: pure functions over made-up records, and the model of the ledger."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http1 import Answer
from tests.chaos.kinds import KINDS, Placement, available
from tests.chaos.run import Options, Report
from tests.chaos.soak import jobs, judging
from tests.chaos.soak.calls import whole
from tests.chaos.soak.jobs import JobFact
from tests.chaos.soak.ledger import Condition, Delete, Ledger
from tests.chaos.soak.results import write_soak
from tests.chaos.soak.side import Told
from tests.chaos.soak.streams import Malformed, body_parts, judged, read_head
from tests.chaos.soak.tables import LEDGER, ledger_models, ledger_rows
from tests.history.end_state import EndState, QuarantineFact, Range
from tests.history.record import Fail, History, Ingest, Read, Receipt, Receipted, Token
from tests.history.recorder import Recorder
from tests.history.rows import group_of

_S = 10**9
_TABLE = "orders"


def recorded(*requests: tuple[int, int]) -> History:
    """Acknowledged writes of (request, rows); request n has position n of shard 0."""
    recorder = Recorder.in_memory()
    for request, count in requests:
        operation = Ingest(request, "1", _TABLE, {_TABLE: count}, key=f"key-{request}")
        with recorder.begin("c", operation) as op:
            token = Token("h", 0, {0: request + 1}, ((0, request),))
            op.ok(Receipted(Receipt(f"b1-0-{request}", _TABLE, count, 0, "v1:x", token, "d")))
    return recorder.history()


def ended(*ranges: tuple[int, int, int], quarantined: tuple[int, ...] = ()) -> EndState:
    return EndState(
        lines=(),
        shards=(),
        snapshots=(),
        ranges=tuple(Range(0, lo, hi, snapshot) for lo, hi, snapshot in ranges),
        files=(),
        entries=(),
        quarantined=tuple(QuarantineFact(f"b1-0-{n}", 0, n) for n in quarantined),
        drained=True,
    )


def test_D12_a_feed_that_shows_each_request_whole_is_taken() -> None:
    groups = {n: group_of(n, _TABLE, 3) for n in (1, 2)}
    history = recorded((1, 3), (2, 3), (3, 3))
    truth = ended((1, 4, 7), quarantined=(3,))
    assert judging.feed_problems(history, truth, _TABLE, groups) == []


@pytest.mark.parametrize(
    "groups",
    [
        {1: group_of(1, _TABLE, 3)},  # one is missing
        {1: group_of(1, _TABLE, 3), 2: group_of(2, _TABLE, 2)},  # a row is missing
        {1: group_of(1, _TABLE, 3), 2: (6, 2 * group_of(2, _TABLE, 3)[1])},  # twice
        {n: group_of(n, _TABLE, 3) for n in (1, 2, 9)},  # nobody sent it
    ],
)
def test_D12_a_feed_that_does_not_is_told(groups: dict[int, tuple[int, int]]) -> None:
    history, truth = recorded((1, 3), (2, 3)), ended((1, 3, 7))
    assert judging.feed_problems(history, truth, _TABLE, groups)


def test_D12_a_gap_excuses_what_was_published_in_it_and_only_whole() -> None:
    history, truth = recorded((1, 3), (2, 3)), ended((1, 2, 7), (2, 3, 9))
    first, second = group_of(1, _TABLE, 3), group_of(2, _TABLE, 3)
    assert not judging.feed_problems(history, truth, _TABLE, {1: first}, gaps=[(7, 9)])
    assert judging.feed_problems(history, truth, _TABLE, {2: second}, gaps=[(7, 9)])
    torn = {1: first, 2: (1, 1)}
    assert judging.feed_problems(history, truth, _TABLE, torn, gaps=[(7, 9)])


def test_refusals_that_no_client_provoked_are_told() -> None:
    recorder = Recorder.in_memory()
    for request, code in enumerate(("unavailable", "idempotency_conflict"), 1):
        with recorder.begin("c", Ingest(request, "1", _TABLE, {_TABLE: 1})) as op:
            op.fail(code)
    assert judging.write_problems(recorder.history()) == []
    with recorder.begin("c", Ingest(9, "1", _TABLE, {_TABLE: 1})) as op:
        op.fail("table_not_found")
    assert len(judging.write_problems(recorder.history())) == 1


def test_E3_a_read_of_a_missing_file_is_found() -> None:
    recorder = Recorder.in_memory()
    with recorder.begin("c", Read((_TABLE,))) as op:
        op.fail("unavailable", "503 this server is stopping")
    assert judging.missing_reads(recorder.history()) == []
    with recorder.begin("c", Read((_TABLE,))) as op:
        op.fail("unavailable", "503 the data could not be read just now; try again")
    assert len(judging.missing_reads(recorder.history())) == 1


def test_E2_lost_intents_are_found_in_snapshots_and_in_metrics() -> None:
    assert judging.abort_problems({"published": 5, "lease_lost": 2}, {"leases_lost": 3}) == []
    assert judging.abort_problems({"intent_lost": 1}, {})
    assert judging.abort_problems({}, {"ranges_ended{intent_lost}": 1})


def test_files_that_pile_up_are_told() -> None:
    table = {
        "small_max": 30, "small_at_end": 10, "small_typical_first": 20, "small_typical_last": 22,
        "partitions_at_end": 0,
    }  # fmt: skip
    sampled = {"samples": 100, "tables": {"orders": table}}
    assert judging.file_problems(sampled, minutes=1) == []
    for name in ("small_max", "small_at_end", "small_typical_last"):
        worse = {**sampled, "tables": {"orders": {**table, name: 5_000}}}
        assert judging.file_problems(worse, minutes=1)
    assert judging.file_problems({**sampled, "samples": 2}, minutes=30)


def test_D8_too_few_pairs_and_changed_answers_are_told() -> None:
    told = {"pairs": 200, "changed": 0, "tagged": 100, "asked_again_least_of_a_tagged": 2}
    assert judging.pair_problems(told, wanted=200) == []
    assert judging.pair_problems(told, wanted=201)
    assert judging.pair_problems({**told, "changed": 1}, wanted=200)
    assert judging.pair_problems({**told, "asked_again_least_of_a_tagged": 0}, wanted=200)


def test_a_time_with_compaction_is_told_from_one_without() -> None:
    now = [0]
    recorder = Recorder.in_memory(now_ns=lambda: now[0])
    for request, (began_s, took_s) in enumerate(((1, 1), (10, 2)), 1):
        now[0] = began_s * _S
        with recorder.begin("c", Ingest(request, "1", _TABLE, {_TABLE: 1})) as op:
            now[0] += took_s * _S
            token = Token("h", 0, {0: 1}, ((0, request),))
            op.ok(Receipted(Receipt("b1-0-1", _TABLE, 1, 0, "v1:x", token, "d")))
    found = judging.latencies(
        recorder.history(), [(1_011.0, 1_020.0)], wall_less_monotonic_s=1_000.0
    )
    assert found["durable_during_compaction"] == {"count": 1, "p50_ms": 2000, "p99_ms": 2000}
    assert found["durable_otherwise"] == {"count": 1, "p50_ms": 1000, "p99_ms": 1000}


# --- jobs ----------------------------------------------------------------------------------------


def job(kind: str = "compact", **report: Any) -> JobFact:
    return JobFact(kind, "done", 1, report, None, 10.0, 12.0)


def test_E1_sums_and_rows_that_do_not_hold_are_told() -> None:
    whole_report: dict[str, Any] = {
        "hash_sum_before": "5", "hash_sum_removed": "2", "hash_sum_after": "3",
        "rows_in": 4, "rows_out": 3, "rows_removed": 1,
    }  # fmt: skip
    assert jobs.problems_of([job(**whole_report)]) == []
    wrapped = {"hash_sum_before": "0", "hash_sum_removed": "1", "hash_sum_after": "f" * 32}
    assert jobs.problems_of([job(**whole_report | wrapped)]) == []
    for wrong in ({"hash_sum_after": "4"}, {"rows_out": 4}):
        assert len(jobs.problems_of([job(**whole_report | wrong)])) == 1


def test_E6_errors_of_a_validation_and_bugs_of_jobs_are_told() -> None:
    assert jobs.problems_of([job("validate", errors=0, warnings=3)]) == []
    finding = {"severity": "error", "code": "missing_object"}
    assert jobs.problems_of([job("validate", errors=1, findings=[finding])])
    away = JobFact("retain", "failed", 9, {}, {"code": "unavailable"}, 1.0, 2.0)
    assert jobs.problems_of([away]) == []
    bug = JobFact("retain", "failed", 1, {}, {"code": "internal_error"}, 1.0, 2.0)
    assert len(jobs.problems_of([bug])) == 1


def test_jobs_are_added_up_by_kind() -> None:
    again = JobFact("compact", "done", 3, {"swaps": 2}, None, 10.0, 13.0)
    retained = job("retain", snapshots={"first": 3, "last": 7})
    totals = jobs.totals([job(swaps=1, rows_in=5), again, retained])
    assert totals["compact"] == {
        "jobs": 2, "done": 2, "swaps": 3, "rows_in": 5, "begun_again": 2, "seconds": 5,
    }  # fmt: skip
    assert totals["retain"]["snapshots_expired"] == 5
    assert jobs.compacting([retained, again, job()]) == [(10.0, 12.0), (10.0, 13.0)]


# --- the ledger ----------------------------------------------------------------------------------


def test_E7_the_model_takes_away_what_was_there_when_it_was_evaluated() -> None:
    ledger = Ledger()
    for request, snapshot_id in ((1, 5), (2, 7), (3, 9)):
        batch = ledger.begin(request, 4)
        batch.snapshot_id = snapshot_id
        batch.over.set()
    all_of = Condition("true", (), lambda row: True)
    # Evaluated at 6, published in 8: what came in 7 and 9 stays.
    assert ledger.apply(Delete(all_of, 6, 8, 4)) == 4
    assert [len(list(ledger.rows_at(n))) for n in (4, 5, 7, 8, 9)] == [0, 4, 8, 4, 8]
    assert ledger.apply(Delete(all_of, 9, 10, 8)) == 8
    assert ledger.check_at(10) == {"n": 0, "c": 0, "k": 0, "g": 0, "notes": 0}
    assert ledger.check_at(5)["n"] == 4
    ledger.forget(8)
    assert [len(list(ledger.rows_at(n))) for n in (8, 9, 10)] == [4, 8, 0]
    assert asyncio.run(ledger.resolved())


def test_rows_are_sent_as_the_model_has_them() -> None:
    sent, models = ledger_rows(7, 30), ledger_models(7, 30)
    assert [row["check_value"] for row in sent] == [one.check for one in models]
    assert group_of(7, LEDGER, 30) == (30, sum(one.check for one in models))
    assert [row["note"] for row in sent] == [one.note for one in models]
    assert [float(row["amount"]) * 100 for row in sent] == pytest.approx(
        [one.cents for one in models]
    )


# --- answers, kinds, results ---------------------------------------------------------------------


def test_an_answer_without_its_end_mark_is_not_whole() -> None:
    headers = {"lakebus-snapshot-id": "9"}
    body = b'{"a":1}\n{"a":2}\n{"complete":true,"row_count":2}\n'
    found = whole(Answer(200, headers, body))
    assert found is not None
    assert (found.snapshot_id, found.rows, found.first()) == (9, 2, {"a": 1})
    assert whole(Answer(200, headers, b'{"a":1}\n{"a":2}\n')) is None
    assert whole(Answer(200, headers, body.replace(b":2}\n{", b"}\n{"))) is not None
    assert whole(Answer(200, headers, body.replace(b'count":2', b'count":3'))) is None


def test_jobs_are_struck_in_a_soak_only() -> None:
    soak = {kind.name for kind in available(Placement.SPREAD, maintenance=True)}
    usual = {kind.name for kind in available(Placement.SPREAD)}
    wanted = {"kill_job", "freeze_job", "kill_maintainer", "lost_swap_replies"}
    assert wanted <= soak
    assert not wanted & usual
    # A missing folder of objects looks like a missing file, which is what a soak looks for.
    assert "objects_away" not in soak
    assert all(kind.weight or kind.soak_weight for kind in KINDS)


def test_the_results_are_kept_as_json_and_markdown(tmp_path: Path) -> None:
    options = Options(seed=4, seconds=60.0, maintenance=True)
    report = Report(options, tmp_path, {"commit": "abc", "cores": 2, "packages": {"duckdb": "2"}})
    report.faults = [
        {"kind": "kill_job", "missed": ""},
        {"kind": "freeze_job", "missed": "no job lives"},
    ]
    report.operations = {"ingest": {"ok": 7}}
    report.soak = Told(
        clients={"historian": {"pairs": 203, "tagged": 101, "changed": 0}},
        publications={"snapshots": {"append": 4, "compact": 2}, "commits": {"published": 4}},
        jobs={"compact": {"jobs": 2, "done": 2, "rows_in": 9}},
        rows_acknowledged=120,
        load_s=60.0,
    )
    report.problems = ["one | thing"]
    write_soak(tmp_path / "soak.json", report)
    document = json.loads((tmp_path / "soak.json").read_text())
    assert (document["kills"], document["rows_per_s"], document["held"]) == (1, 2.0, False)
    text = (tmp_path / "soak.md").read_text()
    for wanted in ("| kill_job | 1 |", "| questions recorded at a snapshot | 203 |", "one | thing"):
        assert wanted in text


def test_a_fail_has_its_detail() -> None:
    """What `missing_reads` rests on."""
    recorder = Recorder.in_memory()
    with recorder.begin("c", Read((_TABLE,))) as op:
        op.fail("unavailable", "a detail")
    (operated,) = recorder.history().operations
    assert isinstance(operated.end, Fail)
    assert operated.end.detail == "a detail"


# --- slow streams ---------------------------------------------------------------------------------


async def _read(answer: bytes) -> bytes:
    reader = asyncio.StreamReader(limit=1024)
    reader.feed_data(answer)
    reader.feed_eof()
    status, headers = await read_head(reader)
    assert status == 200
    return b"".join([part async for part in body_parts(reader, headers)])


_HEAD = b"HTTP/1.1 200 OK\r\nA: b\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        _HEAD + b"Content-Length: 4000\r\n\r\n" + b"x" * 4000,  # longer than a line may be
        _CHUNKED + b"3e8;why\r\n" + b"x" * 1000 + b"\r\nbb8\r\n" + b"x" * 3000 + b"\r\n0\r\n\r\n",
        _HEAD + b"\r\n" + b"x" * 4000,
    ],
)
def test_D9_an_answer_is_read_by_its_length_or_its_chunks(answer: bytes) -> None:
    assert asyncio.run(_read(answer)) == b"x" * 4000


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (_HEAD + b"Content-Length: 4\r\n\r\nxxx", EOFError),
        (_CHUNKED + b"4\r\nxx", EOFError),
        (_CHUNKED + b"4\r\nxxxx\r\n", EOFError),
        (_HEAD, EOFError),
        (_CHUNKED + b"4\r\nxxxxx\r\n0\r\n\r\n", Malformed),
        (_CHUNKED + b"xxxx\r\n", Malformed),
        (_CHUNKED + b"0" * 2000, Malformed),
    ],
)
def test_D9_a_short_answer_is_told_from_a_malformed_one(
    answer: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        asyncio.run(_read(answer))


def test_D9_a_stream_is_whole_when_its_last_line_says_so() -> None:
    mark = b'{"complete":true,"row_count":2}\n'
    assert judged(b"{}\n{}\n" + mark, 3) == {"end": "whole", "lines": 2}
    assert judged(b"{}\n" + mark, 2)["end"] == "wrong"
    assert judged(b"{}\n{}\n", 2)["end"] == "unmarked"
    assert judged(b"", 0)["end"] == "unmarked"
    ends = [{"ends": {"cut": 3}}, {"ends": {"cut": 1, "whole": 0}}]
    assert judging.stream_problems(ends, minutes=3.0)
    assert not judging.stream_problems(ends, minutes=0.5)
    assert not judging.stream_problems([*ends, {"ends": {"whole": 1}}], minutes=3.0)
