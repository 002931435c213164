"""What may be given as rows, and the bytes that it becomes."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json
import math
import sys
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lakebus.client_errors import PackageMissing
from lakebus.client_rows import ARROW, CSV, JSON, NDJSON, PARQUET, body_of, encode_rows
from lakebus.errors import LakebusError, MalformedBody, all_errors
from lakebus.writer_batches import WriterLimits, pieces_of

END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"
TABLE = pa.table({"id": [1, 2], "note": ["a", None]})


def rows_in(stream: bytes) -> list[dict[str, Any]]:
    assert stream.endswith(END_MARK)
    with pa.ipc.open_stream(stream) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        TABLE,
        TABLE.to_batches()[0],
        TABLE.to_batches(max_chunksize=1),
        TABLE.to_reader(),
        TABLE.to_reader(max_chunksize=1),
    ],
    ids=["table", "batch", "batches", "reader", "reader in parts"],
)
def test_columns_of_arrow_go_as_a_stream_with_its_end_mark(rows: Any) -> None:
    content, media_type = encode_rows(rows)
    assert media_type == ARROW
    assert rows_in(content) == TABLE.to_pylist()


def test_objects_go_as_json_whatever_iterates_over_them() -> None:
    rows = TABLE.to_pylist()
    for given in (rows, tuple(rows), iter(rows), (row for row in rows), {1: rows[0]}.values()):
        content, media_type = encode_rows(given)
        assert media_type == JSON
        assert json.loads(content) == (rows if len(json.loads(content)) == 2 else rows[:1])
    assert json.loads(encode_rows({"id": 1})[0]) == {"id": 1}
    mapping = types.MappingProxyType({"id": types.MappingProxyType({"a": 1})})
    assert json.loads(encode_rows([mapping])[0]) == [{"id": {"a": 1}}]
    assert encode_rows((b"id\n1\n", CSV)) == (b"id\n1\n", CSV)


def test_maps_by_keys_that_are_no_text_are_said_as_pairs() -> None:
    """As answers have them: what `fetchall` gave can be sent."""

    day = dt.date(2026, 1, 31)
    rows = [{"m": {day: math.nan, dt.date(2026, 2, 1): None}, "t": {"a": {uuid.UUID(int=7): 1}}}]
    assert json.loads(encode_rows(rows)[0]) == [
        {
            "m": [{"key": "2026-01-31", "value": "NaN"}, {"key": "2026-02-01", "value": None}],
            "t": {"a": [{"key": str(uuid.UUID(int=7)), "value": 1}]},
        }
    ]


def test_values_of_numpy_are_said_as_what_they_are() -> None:
    row = {
        "i": np.int64(2**53 + 1), "f": np.float32(1.5), "n": np.float32("nan"), "b": np.bool_(True)
    }  # fmt: skip
    assert json.loads(encode_rows([row])[0]) == [{"i": 2**53 + 1, "f": 1.5, "n": "NaN", "b": True}]
    with pytest.raises(MalformedBody):  # as a number it would be taken for one
        encode_rows([{"t": np.datetime64("2026-01-01T00:00:00", "ns")}])


@pytest.mark.parametrize(
    "rows",
    [7, None, b"id\n1\n", object(), [{"x": object()}], [{"x": {1, 2}}]],
    ids=["number", "none", "bytes", "object", "object_in_a_row", "set_in_a_row"],
)
def test_what_holds_no_rows_is_refused_with_a_sentence(rows: Any) -> None:
    with pytest.raises(MalformedBody, match=r"cannot be sent|media type"):
        encode_rows(rows)


def test_a_lazy_frame_is_told_to_collect() -> None:
    lazy = type("LazyFrame", (), {})()
    with pytest.raises(MalformedBody, match="collect"):
        encode_rows(lazy)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "media_type", "coding"),
    [
        ("a.json", JSON, None),
        ("a.NDJSON", NDJSON, None),
        ("a.b.jsonl", NDJSON, None),
        ("a.csv", CSV, None),
        ("a.parquet", PARQUET, None),
        ("a.arrows", ARROW, None),
        ("a.csv.gz", CSV, "gzip"),
        ("a.ndjson.zst", NDJSON, "zstd"),
        ("a.json.lz4", JSON, "lz4"),
    ],
)
def test_files_go_as_they_are(
    tmp_path: Path, name: str, media_type: str, coding: str | None
) -> None:
    file = tmp_path / name
    file.write_bytes(b"as it is")
    for given in (file, str(file)):
        body = body_of(given)
        assert (body.content, body.media_type, body.coding) == (b"as it is", media_type, coding)
    assert body.headers().get("content-encoding") == coding


def test_an_arrow_file_becomes_a_stream(tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    with pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write(TABLE)
    assert rows_in(body_of(file).content) == TABLE.to_pylist()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(MalformedBody, match="whole Arrow file"):
        body_of(file)


@pytest.mark.parametrize("name", ["rows", "rows.txt", "rows.gz", ""])
def test_a_file_whose_name_says_nothing_is_refused(name: str) -> None:
    with pytest.raises(MalformedBody, match=r"must end in one of"):
        body_of(name)


def test_a_file_that_is_not_there_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError):
        body_of("nowhere.csv")


# --- packages that are optional --------------------------------------------------------------


@pytest.fixture
def without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)


@pytest.mark.usefixtures("without_pyarrow")
def test_what_needs_a_package_says_which(tmp_path: Path) -> None:
    with pytest.raises(PackageMissing, match="pip install pyarrow") as missing:
        encode_rows(TABLE)
    assert missing.value.members == {"package": "pyarrow"}
    assert isinstance(missing.value, ImportError)
    file = tmp_path / "a.feather"
    file.write_bytes(b"ARROW1")
    with pytest.raises(PackageMissing):
        body_of(file)


def test_errors_of_the_client_are_typed_and_not_of_the_api() -> None:
    assert issubclass(PackageMissing, LakebusError)
    assert PackageMissing not in all_errors()


class Frame:
    """As much of a polars DataFrame as is used; the real one is tried by hand."""

    __module__ = "polars.dataframe.frame"

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.height = table.num_rows

    def slice(self, start: int, size: int) -> Frame:
        return Frame(self.table.slice(start, size))

    def write_ipc_stream(self, sink: io.BytesIO, *, compat_level: str) -> None:
        assert compat_level == "oldest"
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write(self.table)


@pytest.fixture
def polars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = types.ModuleType("polars")
    level = type("CompatLevel", (), {"oldest": staticmethod(lambda: "oldest")})
    package.CompatLevel = level  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polars", package)
    return iter(())


@pytest.mark.usefixtures("polars")
def test_frames_of_polars_go_as_a_stream() -> None:
    content, media_type = encode_rows(Frame(TABLE))
    assert media_type == ARROW
    assert rows_in(content) == TABLE.to_pylist()
    pieces = list(pieces_of(Frame(TABLE), WriterLimits(rows_max=1)))
    assert [rows_in(piece.content) for piece in pieces] == [[row] for row in TABLE.to_pylist()]


def test_frames_of_pandas_go_without_their_index() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "id": [1, 2],
            "note": ["a", None],
            "at": pandas.to_datetime(["2026-01-01", None], utc=True),
        },
        index=[7, 8],
    )
    content, media_type = encode_rows(frame)
    assert media_type == ARROW
    at = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    found = rows_in(content)
    assert [row["id"] for row in found] == [1, 2]
    assert (found[0]["at"].to_pydatetime() if hasattr(found[0]["at"], "to_pydatetime") else
            found[0]["at"]) == at  # fmt: skip
    assert (found[1]["note"], found[1]["at"]) == (None, None)
    assert set(found[0]) == {"id", "note", "at"}
    pieces = list(pieces_of(frame, WriterLimits(rows_max=1)))
    assert [piece.rows for piece in pieces] == [1, 1]
    mixed = pandas.DataFrame({"x": [1, "a", decimal.Decimal(1)]})
    with pytest.raises(MalformedBody, match="no form in Arrow"):
        encode_rows(mixed)
