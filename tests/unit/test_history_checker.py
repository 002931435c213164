"""The checker accepts what keeps the contract: valid histories of a model, whatever the seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.anomalies import CONTRACT, Findings, Kind
from tests.history.checker import EXPECTED_CODES, check
from tests.history.end_state import (
    EndState,
    EntryFact,
    FileFact,
    QuarantineFact,
    Range,
    ShardEnd,
    SnapshotFact,
    read_end_state,
    write_end_state,
)
from tests.history.end_state import Line as HistoryLine
from tests.history.forging import OPERATORS, valid_history
from tests.history.record import (
    RESULT_OF,
    BatchSeen,
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
    Status,
    Token,
    Unknown,
    assemble,
    encode_line,
    load,
)
from tests.history.rows import group_of

ROOT = Path(__file__).parents[2]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(20, 400))
def test_random_valid_histories_pass(seed: int, steps: int) -> None:
    lines, end_state = valid_history(seed, steps=steps)
    history = assemble([lines])
    with_truth = check(history, end_state)
    assert with_truth.ok, str(with_truth)
    alone = check(history)
    assert alone.ok, str(alone)


def test_valid_histories_hold_everything_that_can_happen() -> None:
    outcomes: set[str] = set()
    replays = successors = windows = 0
    for seed in range(60):
        lines, end_state = valid_history(seed)
        verdict = check(assemble([lines]), end_state)
        outcomes |= verdict.outcomes.keys()
        replays += sum(
            isinstance(line, Invoke)
            and isinstance(line.operation, Ingest)
            and line.operation.attempt > 1
            for line in lines
        )
        windows += sum(
            isinstance(line, Invoke)
            and isinstance(line.operation, Read)
            and line.operation.window is not None
            for line in lines
        )
        successors += sum(bool(fact.successor_batch_id) for fact in end_state.quarantined)
    assert outcomes >= {
        f"{kind.__name__.lower()} {end}" for kind in RESULT_OF for end in ("ok", "unknown")
    }
    assert outcomes >= {
        "ingest fail idempotency_conflict",
        "ingest fail quarantined",
        "ingest fail table_not_found",
        "ingest fail unavailable",
        "read fail quarantined",
        "read fail table_not_found",
        "wait fail quarantined",
    }
    assert min(replays, successors, windows) > 20


def test_every_kind_is_documented_and_forged() -> None:
    assert CONTRACT.keys() == set(Kind)
    assert {kind for _, kinds in OPERATORS for kind in kinds[:1]} == set(Kind)


def test_every_kind_of_operation_has_expected_codes() -> None:
    assert EXPECTED_CODES.keys() == {kind.__name__.lower() for kind in RESULT_OF}


def test_a_verdict_says_what_broke_and_where() -> None:
    sent = Ingest(request=1, principal="p", target="t", tables={"t": 2})
    read = Read(("t",))
    lines: list[Line] = [
        Header(process="a", clock="virtual", seed=77),
        Invoke("a.1", 1, "c", sent),
        Fail("a.1", 2, "rows_invalid"),
        Invoke("a.2", 3, "c", read),
        Ok("a.2", 4, Rows(9, {"t": {1: group_of(1, "t", 2)}})),
    ]
    verdict = check(assemble([lines]))
    assert verdict.kinds == {Kind.ABORTED_READ}
    assert verdict.outcomes == {"ingest fail rows_invalid": 1, "read ok": 1}
    assert verdict.unexpected == {"ingest rows_invalid": 1}
    text = str(verdict)
    for words in ("aborted read", "A4 A10", "seed 77", "a.1 by c at 1", "a.2 by c at 3"):
        assert words in text


def test_findings_are_all_counted_and_some_kept() -> None:
    findings = Findings(kept_max=2)
    for number in range(5):
        findings.add(Kind.PHANTOM, f"{number}")
    assert (findings.counts[Kind.PHANTOM], len(findings.kept)) == (5, 2)


# --- what the record may not be ------------------------------------------------------------------

_SENT = Ingest(request=1, principal="p", target="t", tables={"t": 1}, key="k")


def _history(*attempts: Ingest) -> None:
    lines: list[Header | Invoke] = [Header(process="a", clock="virtual")]
    lines += [Invoke(f"a.{n}", n, "c", attempt) for n, attempt in enumerate(attempts)]
    check(assemble([lines]))


def test_a_request_without_key_is_sent_once() -> None:
    once = msgspec.structs.replace(_SENT, key=None)
    _history(once)
    with pytest.raises(RecordInvalid, match="no key"):
        _history(once, once)


def test_attempts_of_a_request_have_one_key() -> None:
    _history(_SENT, _SENT)
    with pytest.raises(RecordInvalid, match="different keys"):
        _history(_SENT, msgspec.structs.replace(_SENT, key="other"))


def test_a_read_answers_the_tables_it_was_asked_for() -> None:
    lines: list[Line] = [
        Header(process="a", clock="virtual"),
        Invoke("a.1", 1, "c", Read(("t",))),
        Ok("a.1", 2, Rows(1, {"u": {}})),
    ]
    with pytest.raises(RecordInvalid, match="other tables"):
        check(assemble([lines]))


# --- the command ---------------------------------------------------------------------------------


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.history", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_tells_by_its_exit_code(tmp_path: Path) -> None:
    lines, end_state = valid_history(5)
    record, truth = tmp_path / "a.jsonl", tmp_path / "truth.json"
    record.write_bytes(b"".join(map(encode_line, lines)))
    write_end_state(truth, end_state)
    assert read_end_state(truth) == end_state
    good = _command(record, "--end-state", truth)
    assert (good.returncode, good.stdout.endswith("no anomaly\n")) == (0, True), good.stderr
    late = msgspec.structs.replace(end_state, files=end_state.files[1:])
    write_end_state(truth, late)
    bad = _command(record, "--end-state", truth)
    assert (bad.returncode, "dangling file" in bad.stdout) == (1, True), bad.stderr
    record.write_bytes(b"nothing\n")
    unreadable = _command(record)
    assert (unreadable.returncode, "cannot be judged" in unreadable.stderr) == (2, True)


def test_a_killed_client_leaves_a_history_that_can_be_judged(tmp_path: Path) -> None:
    """A record that ends anywhere is a record of clients that died there."""
    lines, _ = valid_history(9)
    whole = b"".join(map(encode_line, lines))
    path = tmp_path / "a.jsonl"
    for cut in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:cut])
        counts = check(load([path])).counts
        # Only what nobody was told of is missing: then a quarantined entry may look like a loss.
        assert counts.keys() <= {Kind.STALE_READ, Kind.POSITION_GAP}


def test_an_unknown_end_is_as_good_as_none() -> None:
    """Whether a client logs `unknown` or dies is the same for the verdict."""
    lines, end_state = valid_history(11)
    silent = [line for line in lines if not isinstance(line, Unknown)]
    assert len(silent) < len(lines)
    assert check(assemble([silent]), end_state).ok


def test_a_quarantined_entry_is_no_loss_when_somebody_asked() -> None:
    """Without the catalog's truth, the entry's status tells a quarantine from a stale read."""
    sent = Ingest(request=1, principal="p", target="t", tables={"t": 1})
    token = Token("h", 0, {0: 1})
    receipt = Receipt("b1-0-0", "t", 1, 0, "v1:x", Token("h", 0, {0: 1}, ((0, 0),)), "d")
    lines: list[Line] = [
        Header(process="a", clock="virtual"),
        Invoke("a.1", 1, "c", sent),
        Ok("a.1", 2, Receipted(receipt)),
        Invoke("a.2", 3, "d", Read(("t",), (token,))),
        Ok("a.2", 4, Rows(5, {"t": {}})),
    ]
    assert check(assemble([lines])).kinds == {Kind.STALE_READ}
    lines += [
        Invoke("a.3", 5, "c", Status("b1-0-0")),
        Ok("a.3", 6, BatchSeen("quarantined")),
    ]
    assert check(assemble([lines])).ok


@pytest.mark.parametrize("state", ["quarantined", "published"])
def test_D4_an_ingest_told_quarantined_is_stored(state: str) -> None:
    """With `wait=visible` the refusal names an entry; its rows must not be seen, and it must have
    been quarantined."""
    sent = Ingest(request=1, principal="p", target="t", tables={"t": 1}, wait="visible")
    lines: list[Line] = [
        Header(process="a", clock="virtual"),
        Invoke("a.1", 1, "c", sent),
        Fail("a.1", 2, "quarantined", "", "b1-0-0"),
    ]
    facts = EndState(
        lines=(HistoryLine(1, "h", 0, {}),),
        shards=(ShardEnd(0, 1, 1),),
        snapshots=(
            SnapshotFact(1, None, 1, "2026-01-01T00:00:00.000001Z", "genesis", {0: 0}),
            SnapshotFact(2, 1, 1, "2026-01-01T00:00:00.000002Z", "append", {0: 1}),
        ),
        ranges=(Range(0, 0, 1, 2),),
        files=() if state == "quarantined" else (FileFact("f", "t", 1, 2),),
        entries=(EntryFact("b1-0-0", 0, 0, 1, state, 2),),
        quarantined=(QuarantineFact("b1-0-0", 0, 0),) if state == "quarantined" else (),
        drained=True,
    )
    found = check(assemble([lines]), facts).kinds
    assert found == (set() if state == "quarantined" else {Kind.FALSE_QUARANTINE})
    assert check(assemble([lines])).ok
