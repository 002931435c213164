"""What `lakebus ingest` reads: files, the files of folders, standard input; compressed or not.

Compression is told by the first bytes (gzip, zstd), the format by the name or by `--format`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import click

from lakebus.errors import MalformedBody

_SUFFIXES = {
    **{".json": "json", ".ndjson": "ndjson", ".jsonl": "ndjson"},
    **{".csv": "csv", ".parquet": "parquet", ".pq": "parquet"},
    **{".arrow": "arrow", ".arrows": "arrow", ".ipc": "arrow", ".feather": "arrow"},
}
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Source:
    """One file; without a path, standard input. `size_bytes` as it is stored."""

    path: Path | None
    form: str | None
    size_bytes: int | None = None

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


class _Counting(io.RawIOBase):
    """Reads on behind bytes that were looked at, and counts."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.taken_bytes = 0
        self.head = b""
        while len(self.head) < len(_ZSTD) and (more := stream.read(len(_ZSTD) - len(self.head))):
            self.head += more
        self._waiting = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._waiting[: len(view)] or self._stream.read(len(view))
        self._waiting = self._waiting[len(data) :]
        view[: len(data)] = data
        self.taken_bytes += len(data)
        return len(data)


class Content:
    """The content of a source, without its compression."""

    def __init__(self, source: Source, form: str, stored: _Counting) -> None:
        self.name, self.form = source.name, form
        self._path = source.path
        self._stored = stored
        self._plain = not stored.head.startswith((_GZIP, _ZSTD))
        self._stream = _inflated(stored)

    @property
    def taken_bytes(self) -> int:
        """How much of the stored bytes has been read."""

        return self._stored.taken_bytes

    def read(self, count: int) -> bytes:
        """Up to so many bytes; none at the end. Raises MalformedBody when it cannot be inflated."""

        try:
            return self._stream.read(count)
        except (EOFError, zlib.error, OSError) as error:
            raise MalformedBody(f"{self.name} cannot be read to its end: {error}") from None

    @contextmanager
    def as_file(self) -> Iterator[tuple[IO[bytes], bytes]]:
        """(a file that can be read at any place, the hash of its content). What is compressed or
        comes through a pipe is written to a temporary file first."""

        hashed = hashlib.sha256()
        if self._path is not None and self._plain and self._path.is_file():
            while block := self.read(_BLOCK_BYTES):
                hashed.update(block)
            with open(self._path, "rb") as file:
                yield file, hashed.digest()
            return
        with tempfile.TemporaryFile() as spooled:
            while block := self.read(_BLOCK_BYTES):
                hashed.update(block)
                spooled.write(block)
            spooled.seek(0)
            yield spooled, hashed.digest()


def _inflated(stored: _Counting) -> BinaryIO:
    buffered = io.BufferedReader(stored, _BLOCK_BYTES)
    if stored.head.startswith(_GZIP):
        return cast(BinaryIO, gzip.GzipFile(fileobj=buffered, mode="rb"))
    if stored.head.startswith(_ZSTD):
        import pyarrow as pa  # here, because it takes a while and only these files need it

        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(buffered, "r"), "zstd"))
    return buffered


@contextmanager
def opened(source: Source, form: str) -> Iterator[Content]:
    """Raises click.UsageError when the file cannot be opened."""

    if source.path is None:
        yield Content(source, form, _Counting(sys.stdin.buffer))
        return
    try:
        file = open(source.path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise click.UsageError(f"{source.path} cannot be opened: {error.strerror}.") from None
    with file:
        yield Content(source, form, _Counting(cast(BinaryIO, file)))


def sources_of(paths: Sequence[Path], form: str | None) -> tuple[list[Source], list[Path]]:
    """(what is to be read, what of folders is left out because its name tells no format). A folder
    gives its files in order of their names, folders within too; hidden ones and those that begin
    with `_` are no data. Raises click.UsageError for a file whose format nobody told."""

    found: list[Source] = []
    skipped: list[Path] = []
    for path in paths:
        if str(path) == "-":
            found.append(Source(None, form))
        elif path.is_dir():
            for file in _files_below(path):
                known = form or form_of(file)
                if known is None:
                    skipped.append(file)
                else:
                    found.append(Source(file, known, file.stat().st_size))
        else:
            size_bytes = path.stat().st_size if path.is_file() else None
            found.append(Source(path, form or form_of(path), size_bytes))
    return found, skipped


def form_of(path: Path) -> str | None:
    """What the name says: `rows.csv.gz` is CSV."""

    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return _SUFFIXES.get(bare.suffix.lower())


def _files_below(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        for name in sorted(files):
            path = Path(here, name)
            if name[0] not in "._" and path.is_file():
                yield path
