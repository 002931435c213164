"""The record: what is logged is what is read, in the right order, whatever kills the writer."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from lakebus.errors import IdempotencyConflict, OutcomeUnknown, Unavailable
from lakebus.tokens import VisibilityToken
from tests.history.forging import valid_history
from tests.history.record import (
    Covered,
    Fail,
    Header,
    Ingest,
    Invoke,
    Line,
    Ok,
    Read,
    Receipt,
    Receipted,
    RecordInvalid,
    Rows,
    Token,
    Unknown,
    Wait,
    assemble,
    encode_line,
    load,
    read_lines,
)
from tests.history.recorder import Recorder, RecordMisused
from tests.history.rows import (
    group_of,
    group_sql,
    groups_of,
    groups_of_rows,
    row_check,
    rows_of,
)

ROOT = Path(__file__).parents[2]
SENT = Ingest(request=1, principal="p", target="t", tables={"t": 2}, key="k")
TOKEN = Token("h", 3, {1: 5}, ((1, 4),))
RECEIPT = Receipt("b1-1-4", "t", 2, 0, "v1:00", TOKEN, "digest")


def test_every_event_survives_writing_and_reading(tmp_path: Path) -> None:
    lines, _ = valid_history(4)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(map(encode_line, lines)))
    assert read_lines(path) == lines
    assert load([path]) == assemble([lines])


def test_a_recorder_logs_the_invoke_before_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    recorder = Recorder.to_file(path, process="a", seed=3)
    with recorder.begin("c", SENT) as op:
        assert isinstance(read_lines(path)[-1], Invoke)
        op.ok(Receipted(RECEIPT))
    recorder.close()
    history = load([path])
    (operated,) = history.operations
    assert history.seed == 3
    assert operated.operation == SENT
    assert isinstance(operated.end, Ok)
    assert operated.end.result == Receipted(RECEIPT)
    assert operated.begin < operated.end.at


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (Unavailable("not now"), Fail),
        (OutcomeUnknown("lost"), Unknown),
        (ConnectionResetError("gone"), Unknown),
        (KeyboardInterrupt(), Unknown),
    ],
)
def test_an_exception_logs_the_end_that_it_proves(error: BaseException, end: type) -> None:
    recorder = Recorder.in_memory()
    with pytest.raises(type(error)), recorder.begin("c", SENT):
        raise error
    (operated,) = recorder.history().operations
    assert type(operated.end) is end


def test_a_typed_error_keeps_its_code_and_batch() -> None:
    recorder = Recorder.in_memory()
    with recorder.begin("c", SENT) as op:
        op.error(IdempotencyConflict("other payload", batch_id="b1-1-4"))
    (operated,) = recorder.history().operations
    assert isinstance(operated.end, Fail)
    assert (operated.end.code, operated.end.batch_id) == ("idempotency_conflict", "b1-1-4")


def test_a_code_that_excludes_no_effect_is_unknown() -> None:
    recorder = Recorder.in_memory()
    with recorder.begin("c", SENT) as op:
        op.fail("outcome_unknown")
    assert isinstance(recorder.history().operations[0].end, Unknown)


def test_misuse_of_a_recorder_is_refused() -> None:
    recorder = Recorder.in_memory()
    with pytest.raises(RecordMisused, match="without ok"), recorder.begin("c", SENT):
        pass
    assert isinstance(recorder.history().operations[0].end, Unknown)
    with recorder.begin("c", SENT) as op:
        with pytest.raises(RecordMisused, match="does not answer"):
            op.ok(Covered(1))
        op.ok(Receipted(RECEIPT))
        with pytest.raises(RecordMisused, match="has ended"):
            op.unknown("late")
    with pytest.raises(RecordMisused, match="begun already"), op:
        pass
    with pytest.raises(RecordMisused, match="inside"):
        recorder.begin("c", SENT).unknown("never begun")


def test_a_closed_record_takes_nothing_more(tmp_path: Path) -> None:
    recorder = Recorder.to_file(tmp_path / "a.jsonl", process="a")
    recorder.close()
    with pytest.raises(RecordMisused, match="closed"):
        recorder.note("late")
    with pytest.raises(FileExistsError):
        Recorder.to_file(tmp_path / "a.jsonl", process="a")


def test_events_of_a_clock_that_stands_still_are_ordered() -> None:
    recorder = Recorder.in_memory(now_ns=lambda: 5)
    for _ in range(3):
        with recorder.begin("c", Wait((TOKEN,))) as op:
            op.ok(Covered(4))
    times = [line.at for line in recorder.lines if isinstance(line, Invoke | Ok)]
    assert times == sorted(set(times))


def test_threads_share_a_recorder(tmp_path: Path) -> None:
    recorder = Recorder.to_file(tmp_path / "a.jsonl", process="a")

    def work() -> None:
        for _ in range(200):
            with recorder.begin("c", SENT) as op:
                op.ok(Receipted(RECEIPT))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    lines = read_lines(tmp_path / "a.jsonl")
    times = [line.at for line in lines if not isinstance(line, Header)]
    assert times == sorted(set(times))
    assert len(load([tmp_path / "a.jsonl"]).operations) == 800


def test_a_killed_writer_loses_nothing_that_it_logged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = f"""
import os, signal, pathlib
from tests.history.record import Wait, Covered, Token
from tests.history.recorder import Recorder
recorder = Recorder.to_file(pathlib.Path({str(path)!r}), process="a")
for _ in range(50):
    with recorder.begin("c", Wait((Token("h"),))) as op:
        op.ok(Covered(1))
with recorder.begin("c", Wait((Token("h"),))) as op:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    operations = load([path]).operations
    assert len(operations) == 51
    assert [operated.end is None for operated in operations] == [False] * 50 + [True]


# --- reading -------------------------------------------------------------------------------------


def _write(path: Path, lines: list[Line], tail: bytes = b"") -> Path:
    path.write_bytes(b"".join(map(encode_line, lines)) + tail)
    return path


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    lines: list[Line] = [Header("a", "virtual"), Invoke("a.1", 1, "c", SENT)]
    assert read_lines(_write(tmp_path / "a", lines, b'{"event":"ok","id":"a.')) == lines
    assert read_lines(_write(tmp_path / "b", [], b'{"event":"hea')) == []
    assert read_lines(_write(tmp_path / "c", [])) == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([Invoke("a.1", 1, "c", SENT)], "does not begin with a header"),
        (
            [Header("a", "virtual"), Ok("a.1", 1, Receipted(RECEIPT))],
            "never invoked",
        ),
        (
            [Header("a", "virtual"), Invoke("a.1", 1, "c", SENT), Invoke("a.1", 2, "c", SENT)],
            "two events",
        ),
        (
            [Header("a", "virtual"), Invoke("a.1", 5, "c", SENT), Unknown("a.1", 4)],
            "before it began",
        ),
        (
            [Header("a", "virtual"), Invoke("a.1", 1, "c", SENT), Ok("a.1", 2, Covered(1))],
            "another kind",
        ),
        ([Header("a", "virtual", format=99)], "another format"),
    ],
)
def test_a_record_that_breaks_its_rules_is_refused(
    tmp_path: Path, lines: list[Line], words: str
) -> None:
    with pytest.raises(RecordInvalid, match=words):
        load([_write(tmp_path / "a", lines)])


def test_records_of_different_clocks_or_one_name_do_not_mix(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", [Header("a", "monotonic:1")])
    with pytest.raises(RecordInvalid, match="different clocks"):
        load([one, _write(tmp_path / "2", [Header("b", "monotonic:2")])])
    with pytest.raises(RecordInvalid, match="same process name"):
        load([one, _write(tmp_path / "3", [Header("a", "monotonic:1")])])
    assert load([one, _write(tmp_path / "4", [Header("b", "monotonic:1")])]).operations == ()


def test_damage_inside_a_record_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", [Header("a", "virtual")], b"nonsense\n")
    with pytest.raises(RecordInvalid, match="a:2 is no line"):
        load([path])


# --- rows and receipts ---------------------------------------------------------------------------


def test_rows_name_their_request() -> None:
    rows = rows_of(7, "t", 3, variant=1)
    assert [row["row_number"] for row in rows] == [0, 1, 2]
    assert groups_of_rows((row["request"], row["check_value"]) for row in rows) == {
        7: group_of(7, "t", 3, variant=1)
    }
    assert group_of(7, "t", 3) != group_of(7, "t", 3, variant=1) != group_of(7, "u", 3, variant=1)
    assert 0 <= row_check(7, 0, "t", 0) < 2**32


def test_groups_come_from_answers_as_json_gives_them() -> None:
    sql = group_sql(("t", "u"), (3, 9))
    assert sql.count("request >= 3 AND request < 9") == 2
    found = groups_of(("t", "u"), [[0, "7", "2", "123"], [1, 8, 1, 5], [1, None, 1, None]])
    assert found == {"t": {7: (2, 123)}, "u": {8: (1, 5), -1: (1, 0)}}


def test_A2_a_receipt_is_compared_as_a_whole() -> None:
    answer = {
        "batch_id": "b1-1-4",
        "target": "t",
        "rows": 2,
        "rows_rejected": 0,
        "payload_fingerprint": "v1:00",
        "visibility_token": "lb1.x",
        "accepted_at": "2026-01-01T00:00:00.000000Z",
        "idempotency_expires_at": "2026-01-02T00:00:00.000000Z",
    }
    token = VisibilityToken(uuid.UUID(int=1), 0, {1: 5}, frozenset({(1, 4)}))
    receipt = Receipt.of(answer, token)
    assert receipt == Receipt.of(dict(reversed(answer.items())), token)
    assert receipt != Receipt.of(answer | {"accepted_at": "2026-01-01T00:00:00.000001Z"}, token)
    assert receipt.token.own == ((1, 4),)


def test_a_read_is_logged_with_its_groups() -> None:
    recorder = Recorder.in_memory()
    rows = Rows(3, {"t": {1: group_of(1, "t", 2)}}, TOKEN, "2026-01-01T00:00:00.000000Z")
    with recorder.begin("c", Read(("t",), (TOKEN,), window=(0, 9))) as op:
        op.ok(rows)
    (operated,) = recorder.history().operations
    assert isinstance(operated.end, Ok)
    assert operated.end.result == rows
