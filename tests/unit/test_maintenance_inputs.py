"""Inputs of a rewrite: what is held in memory, what is not, and reading one ahead."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import Corrupt
from lakebus.schemas import Column
from storage.maintenance import verified_inputs
from storage.maintenance.parquet_writing import FileColumns
from storage.maintenance.reading_ahead import ahead
from storage.maintenance.rewriting import RewriteInput
from storage.maintenance.verified_inputs import Piece, one_piece, pieces
from tests.unit.rewrite_rig import MIB, PLAIN, plain_files, run, schema_of, write_input

COLUMNS = FileColumns.of(PLAIN)


def numbers_of(found: list[Piece]) -> list[tuple[list[int], bool]]:
    return [([one.file.file_id.int - 1 for one in p.inputs], p.rows is not None) for p in found]


def test_small_inputs_are_held_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [
        *plain_files(tmp_path, 2, 10),
        # Neighbours far apart: a run of numbers would be packed into hardly anything.
        write_input(tmp_path, PLAIN, {1: [n * 7_919 % 1_000_003 for n in range(5_000)]}, number=2),
        write_input(tmp_path, PLAIN, {1: [1]}, number=3),
    ]
    monkeypatch.setattr(verified_inputs, "SMALL_BYTES", inputs[0].file.size_bytes + 500)
    found = list(pieces(inputs, COLUMNS, bytes_max=MIB))
    assert numbers_of(found) == [([1, 0], True), ([2], False), ([3], True)]
    assert found[0].rows is not None
    assert found[0].rows.num_rows == found[0].recorded_rows == 20
    assert numbers_of(list(one_piece(inputs, COLUMNS, bytes_max=MIB))) == [([1, 0, 2, 3], False)]
    assert numbers_of(list(one_piece(inputs[:2], COLUMNS, bytes_max=MIB))) == [([1, 0], True)]
    assert list(one_piece([], COLUMNS, bytes_max=MIB)) == []
    assert list(pieces([], COLUMNS, bytes_max=MIB)) == []


def test_held_rows_are_bounded_in_memory(tmp_path: Path) -> None:
    inputs = plain_files(tmp_path, 6, 1_000)
    found = list(pieces(inputs, COLUMNS, bytes_max=300_000))
    assert 2 < len(found) < 6
    assert all(piece.rows is not None and piece.rows.nbytes <= 300_000 for piece in found)
    assert [number for some, _ in numbers_of(found) for number in some] == [5, 4, 3, 2, 1, 0]
    assert numbers_of(list(one_piece(inputs, COLUMNS, bytes_max=300_000)))[0][1] is False


def test_a_long_text_that_a_dictionary_repeats_is_not_held(tmp_path: Path) -> None:
    schema = schema_of((1, "s", "varchar"))
    one = write_input(tmp_path, schema, {1: ["x" * 1_000] * 20_000})
    group = pq.read_metadata(one.path).row_group(0)
    assert group.column(0).has_dictionary_page
    assert one.file.size_bytes < 10_000
    (piece,) = pieces([one], FileColumns.of(schema), bytes_max=4 * MIB)
    assert piece.rows is None
    assert [f.rows for f in run(tmp_path, schema, [one], memory_bytes=64 * MIB).files] == [20_000]


def test_rows_of_an_older_schema_are_held_unless_a_type_changed(tmp_path: Path) -> None:
    older = schema_of((1, "id", "integer"), (2, "gone", "varchar"))
    one = write_input(tmp_path, older, {1: [1, 2], 2: ["a", "b"]})
    added = schema_of((1, "number", "integer"), (3, "u", "uuid"), (4, "j", "json"))
    (piece,) = pieces([one], FileColumns.of(added), bytes_max=MIB)
    assert piece.rows is not None
    assert piece.rows.column("number").to_pylist() == [1, 2]
    assert piece.rows.column("u").null_count == piece.rows.column("j").null_count == 2
    wider = dataclasses.replace(added, columns=(Column(1, "number", "bigint"),))
    (piece,) = pieces([one], FileColumns.of(wider), bytes_max=MIB)
    assert piece.rows is None


@pytest.mark.parametrize("small_bytes", [0, MIB])
def test_E6_a_damaged_input_is_named_whether_it_is_held_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(verified_inputs, "SMALL_BYTES", small_bytes)
    (one,) = plain_files(tmp_path, 1, 10)
    wrong = dataclasses.replace(one.file, rows=11)
    with pytest.raises(Corrupt, match="10 rows where the catalog records 11") as caught:
        list(pieces([RewriteInput(wrong, one.path)], COLUMNS, bytes_max=MIB))
    assert caught.value.members["file_id"] == str(one.file.file_id)
    one.path.write_bytes(one.path.read_bytes() + b"x")
    with pytest.raises(Corrupt, match="not the one that the catalog recorded"):
        list(pieces([one], COLUMNS, bytes_max=MIB))


def test_two_threads_write_the_bytes_that_one_writes(tmp_path: Path) -> None:
    inputs = plain_files(tmp_path, 6, 400)
    written = [
        [file.sha256 for file in run(tmp_path, PLAIN, inputs, threads=threads).files]
        for threads in (1, 2)
    ]
    assert written[0] == written[1]


def test_items_made_ahead_come_in_order_and_from_another_thread() -> None:
    threads: list[int] = []

    def items() -> Generator[pa.Scalar, None, None]:
        for number in range(5):
            threads.append(threading.get_ident())
            yield pa.scalar(number)

    assert [item.as_py() for item in ahead(items())] == [0, 1, 2, 3, 4]
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


def test_what_fails_ahead_fails_here_and_what_is_left_is_closed() -> None:
    closed: list[str] = []

    def items(fails: bool) -> Generator[int, None, None]:
        try:
            yield 1
            if fails:
                raise Corrupt("broken")
            yield 2
            yield 3
        finally:
            closed.append("fails" if fails else "left")

    with pytest.raises(Corrupt, match="broken"):
        list(ahead(items(fails=True)))
    begun = ahead(items(fails=False))
    assert next(begun) == 1
    begun.close()
    assert closed == ["fails", "left"]
