"""The checker understands compaction and collection, and what may not be missing after them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.history.anomalies import Kind
from tests.history.checker import Verdict, check
from tests.history.end_state import EndState, FileFact, SnapshotFact
from tests.history.forging import valid_history
from tests.history.record import assemble

replace = msgspec.structs.replace


def collected(end_state: EndState) -> tuple[EndState, FileFact]:
    """The first file of an append is compacted into another one, expired and collected. Answers
    the file that went, too."""
    appends = {fact.snapshot_id for fact in end_state.snapshots if fact.operation == "append"}
    gone = next(
        file
        for file in end_state.files
        if file.first_snapshot in appends and file.last_snapshot is None
    )
    last = end_state.snapshots[-1]
    swapped = SnapshotFact(
        last.snapshot_id + 1,
        last.snapshot_id,
        last.serial,
        "2027-01-01T00:00:00.000000Z",
        "compact",
        last.watermark,
        {gone.table: gone.rows},
        {gone.table: gone.rows},
        {gone.table: 1},
    )
    told = [
        replace(
            fact,
            expired=True,
            rows_added={f.table: f.rows for f in end_state.files if _of(f, fact)},
            files_added={f.table: 1 for f in end_state.files if _of(f, fact)},
        )
        for fact in end_state.snapshots
    ]
    files = [file for file in end_state.files if file is not gone]
    files.append(replace(gone, file_id="compacted", first_snapshot=swapped.snapshot_id))
    after = replace(
        end_state,
        snapshots=(*told, swapped),
        files=tuple(files),
        collected={gone.table: 1},
    )
    return after, gone


def _of(file: FileFact, fact: SnapshotFact) -> bool:
    return file.first_snapshot == fact.snapshot_id


def judged(seed: int, change: Any = None) -> Verdict:
    lines, end_state = valid_history(seed)
    after, gone = collected(end_state)
    if change is not None:
        after = change(after, gone)
    return check(assemble([lines]), after)


@pytest.mark.parametrize("seed", range(5))
def test_collected_files_are_no_anomaly(seed: int) -> None:
    verdict = judged(seed)
    assert verdict.ok, str(verdict)


def test_a_file_that_is_gone_without_a_record_is_found() -> None:
    verdict = judged(1, lambda after, gone: replace(after, collected={}))
    assert verdict.kinds == {Kind.DANGLING_FILE}


def test_more_files_collected_than_are_missing_is_found() -> None:
    verdict = judged(1, lambda after, gone: replace(after, collected={gone.table: 2}))
    assert verdict.kinds == {Kind.DANGLING_FILE}


def test_a_publication_that_says_other_rows_than_were_sent_is_found() -> None:
    def lie(after: EndState, gone: FileFact) -> EndState:
        snapshots = [
            replace(fact, rows_added={**fact.rows_added, gone.table: gone.rows + 1})
            if fact.snapshot_id == gone.first_snapshot
            else fact
            for fact in after.snapshots
        ]
        return replace(after, snapshots=tuple(snapshots))

    assert Kind.DANGLING_FILE in judged(1, lie).kinds


def test_a_swap_that_loses_rows_is_found_by_the_reads_after_it() -> None:
    def shrink(after: EndState, gone: FileFact) -> EndState:
        """A delete that nobody asked for, before the last reads."""
        second = after.snapshots[1]
        less = replace(second, rows_removed={gone.table: 1})
        snapshots = (after.snapshots[0], less, *after.snapshots[2:])
        return replace(after, snapshots=snapshots)

    assert Kind.PHANTOM in judged(1, shrink).kinds
