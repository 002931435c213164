"""How `lakebus ingest` cuts files: whole rows, the same chunks for the same content however it is
read, and keys that follow from the content (contract A3)."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from cluster import ingest_chunks
from cluster.ingest_chunks import Chunk, Keys, chunks_of
from cluster.ingest_sources import Source, opened, sources_of
from lakebus.errors import MalformedBody


class Pipe(io.RawIOBase):
    """Gives its content in pieces of odd sizes, as pipes do."""

    def __init__(self, content: bytes, seed: int) -> None:
        self._content, self._random = content, random.Random(seed)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        count = min(size, self._random.choice((1, 2, 3, 7, 1000)))
        part, self._content = self._content[:count], self._content[count:]
        return part


def cut(content: bytes, form: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """The chunks of a file; the same come from a pipe and from compressed files."""

    path = folder / "file"
    path.write_bytes(content)
    with opened(Source(path, form), form) as whole:
        chunks = list(chunks_of(whole))
    zstd = pa.compress(content, codec="zstd", asbytes=True)
    for again in (content, gzip.compress(content[:5]) + gzip.compress(content[5:]), zstd):
        for seed in (1, 2):
            pipe = Pipe(again, seed)
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
            with opened(Source(None, form), form) as piped:
                assert [one.digest for one in chunks_of(piped)] == [one.digest for one in chunks]
    return chunks


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_chunks, "CHUNK_BYTES", 16)
    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 4)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("content", "bodies"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"12345678\n1\n", [b"12345678\n1\n"]),
        (b"1\n" * 9, [b"1\n" * 4, b"1\n" * 4, b"1\n"]),
        (b"1\n" * 4 + b"2", [b"1\n" * 4 + b"2"]),
        (b"1\n" * 4 + b"2\n3", [b"1\n" * 4, b"2\n3"]),
        (b"1\n2", [b"1\n2"]),
        (b"x" * 40 + b"\n1\n2\n", [b"x" * 40 + b"\n", b"1\n2\n"]),
        (b"1\n" + b"x" * 40, [b"1\n", b"x" * 40]),
        (b"1234567\n" * 3, [b"1234567\n" * 2, b"1234567\n"]),
        (b"1234567\n12345678", [b"1234567\n", b"12345678"]),
        (b"\n" * 20 + b"1\n", [b"1\n"]),
    ],
)
def test_ndjson_is_cut_behind_lines(
    content: bytes, bodies: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = cut(content, "ndjson", tmp_path, monkeypatch)
    assert [chunk.body for chunk in chunks] == bodies


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("rows", "bodies"),
    [
        (b"", []),
        (b"1,2\r\n3,4\r\n", [b"1,2\r\n3,4\r\n"]),
        (b'1,"a\nb\nc\nd\ne\nf"\n3,4\n', [b'1,"a\nb\nc\nd\ne\nf"\n', b"3,4\n"]),
        (b'1,"a\n""b"",\n"\n3,4\n5,6', [b'1,"a\n""b"",\n"\n', b"3,4\n5,6"]),
        (b'1,5" pipe\n2,"a\nb"\n', [b'1,5" pipe\n', b'2,"a\nb"\n']),
        (b'"",\n' * 6, [b'"",\n' * 4, b'"",\n' * 2]),
    ],
)
def test_csv_is_cut_between_records_and_each_chunk_has_the_header(
    rows: bytes, bodies: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b'"a\nx",b\n'
    chunks = cut(header + rows, "csv", tmp_path, monkeypatch)
    assert [chunk.body for chunk in chunks] == [header + body for body in bodies]


@pytest.mark.usefixtures("small")
def test_blank_lines_are_rows_of_a_csv_with_one_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(cut(b"a\n" + b"\n" * 5, "csv", tmp_path, monkeypatch)) == 2
    assert cut(b"a,b\n" + b"\n" * 5, "csv", tmp_path, monkeypatch) == []


def test_csv_chunks_read_alone_are_the_rows_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "CHUNK_BYTES", 300)
    chance = random.Random(7)
    words = ["", "x", 'say "hi"', "two\nlines", "a,b", '""', "\n", "ü" * 9, "5'"]
    table = pa.table({name: [chance.choice(words) for _ in range(400)] for name in "abc"})
    sink = io.BytesIO()
    pa_csv.write_csv(table, sink)
    chunks = cut(sink.getvalue(), "csv", tmp_path, monkeypatch)
    assert len(chunks) > 10
    parsing = pa_csv.ParseOptions(newlines_in_values=True)
    strings = pa_csv.ConvertOptions(column_types=dict.fromkeys("abc", pa.string()))
    parts = [
        pa_csv.read_csv(io.BytesIO(one.body), parse_options=parsing, convert_options=strings)
        for one in chunks
    ]
    assert pa.concat_tables(parts).to_pylist() == table.to_pylist()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("content", "bodies"),
    [
        (b"", []),
        (b" [ ] ", []),
        (b' {"a" : 1 } \n', [b'[{"a" : 1 }]']),
        (b'[{"a":1},\n {"a":2}, {}]', [b'[{"a":1},{"a":2}]', b"[{}]"]),
        (b"[" + b",".join([b"{}"] * 6) + b"]", [b"[{},{},{},{}]", b"[{},{}]"]),
        ('\ufeff[{"ü": "},{"}]'.encode(), ['[{"ü": "},{"}]'.encode()]),
        (b'[{"n": 1e999, "i": ' + b"9" * 30 + b"}]", [b'[{"n": 1e999, "i": ' + b"9" * 30 + b"}]"]),
    ],
)
def test_json_is_cut_between_objects_as_they_are_written(
    content: bytes, bodies: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "_JSON_TEXT", 5)
    chunks = cut(content, "json", tmp_path, monkeypatch)
    assert [chunk.body for chunk in chunks] == bodies
    assert all(json.loads(body) for body in bodies)


@pytest.mark.parametrize(
    ("form", "content", "said"),
    [
        ("json", b'{"a": 1}\n{"a": 2}\n', "--format ndjson"),
        ("json", b'[{"a": 1} {"a": 2}]', "row 1: a comma"),
        ("json", b"[1]", "row 0: an object was expected"),
        ("json", b'[{"a": 1}, {"a": ', "row 1"),
        ("json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("json", b"hello", "an array of objects"),
        ("ndjson", b"x" * 2000, "more than 1000 bytes"),
        ("csv", b'a,b\n1,"' + b"x\n" * 900, "a quote that is never closed"),
        ("ndjson", gzip.compress(b"x\n" * 4500, mtime=0)[:-9], "cannot be read to its end"),
        ("parquet", b"PAR1, but not really", "no whole Parquet file"),
        ("arrow", b"ARROW1, but not really", "no whole Arrow file"),
    ],
)
def test_broken_files_are_named_and_explained(
    form: str, content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "CHUNK_BYTES", 100)
    monkeypatch.setattr(ingest_chunks, "ROW_BYTES_MAX", 1000)
    path = tmp_path / "broken"
    path.write_bytes(content)
    with opened(Source(path, form), form) as whole, pytest.raises(MalformedBody) as error:
        list(chunks_of(whole))
    assert said in error.value.detail
    assert str(path) in error.value.detail


def rows_of(chunks: Sequence[Chunk]) -> list[list[int]]:
    return [pa.ipc.open_stream(chunk.body).read_all()["n"].to_pylist() for chunk in chunks]


def test_parquet_is_cut_by_row_groups_and_large_ones_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(numbers: range, group: int) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.table({"n": list(numbers)}), sink, row_group_size=group)
        return sink.getvalue()

    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 10)
    small = cut(written(range(25), 4), "parquet", tmp_path, monkeypatch)
    assert [len(part) for part in rows_of(small)] == [8, 8, 9]
    large = cut(written(range(25), 25), "parquet", tmp_path, monkeypatch)
    assert rows_of(large) == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]
    assert len({chunk.digest for chunk in [*small, *large]}) == 6
    assert cut(written(range(0), 4), "parquet", tmp_path, monkeypatch) == []


def test_arrow_files_and_streams_are_cut_by_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_chunks, "ROWS_MAX", 10)
    table = pa.table({"n": list(range(30))})
    for make in (pa.ipc.new_file, pa.ipc.new_stream):
        sink = io.BytesIO()
        with make(sink, table.schema) as writer:
            for batch in [
                *table.slice(0, 8).to_batches(max_chunksize=4),
                *table.slice(8).to_batches(),
            ]:
                writer.write_batch(batch)
        chunks = cut(sink.getvalue(), "arrow", tmp_path, monkeypatch)
        assert rows_of(chunks) == [[*range(8)], [*range(8, 18)], [*range(18, 28)], [28, 29]]
    cut_short = sink.getvalue()[:-8]
    (tmp_path / "short").write_bytes(cut_short)
    with (
        opened(Source(tmp_path / "short", "arrow"), "arrow") as whole,
        pytest.raises(MalformedBody),
    ):
        list(chunks_of(whole))


def test_A3_keys_follow_from_content_and_equal_chunks_of_a_run_all_count() -> None:
    def chunk(text: str) -> Chunk:
        return Chunk(text.encode(), "text/csv", text.encode())

    def keys(texts: str, table: str = "t", own: str | None = None) -> Iterator[str]:
        made = Keys(table, own)
        return (made.key_of(chunk(text)) for text in texts)

    assert [*keys("aab")] == [*keys("aab", "T")]
    assert len({*keys("aab")}) == 3
    assert {*keys("aab")} == {*keys("baa")}, "the order of files does not matter"
    assert not {*keys("aab")} & {*keys("aab", "u")}
    assert [*keys("aab", own="k")] == ["k", "k-1", "k-2"]
    assert all(len(key) <= 255 for key in keys("a"))


def test_folders_give_their_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.json.gz", "sub/c.PARQUET", "notes.txt", ".hidden.csv", "_tmp/x.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    found, skipped = sources_of([tmp_path], None)
    assert [(source.path, source.form) for source in found] == [
        (tmp_path / "a.json.gz", "json"),
        (tmp_path / "b.csv", "csv"),
        (tmp_path / "sub" / "c.PARQUET", "parquet"),
    ]
    assert skipped == [tmp_path / "notes.txt"]
    assert [source.form for source in sources_of([tmp_path / "b.csv"], "ndjson")[0]] == ["ndjson"]
