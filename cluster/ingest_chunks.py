"""Rows of files cut into requests, by a rule that gives the same requests for the same content.

Why a killed ingest can be started again: where a chunk ends depends on the content alone, never on
how fast it was read, how it was compressed, what its file is called, or what was sent before. The
idempotency key of a chunk is a hash of its content, so the same command sends the same requests
with the same keys, and the server stores each once (contract A3).

The rule, version 1. A chunk is the longest run of whole rows of one file within `CHUNK_BYTES` and
`ROWS_MAX`; a row that is longer is a chunk alone, and a last row without a line end belongs to the
row before it. NDJSON: lines. CSV: records (a line end inside
quotes is none), each chunk with the file's header line before it. JSON: elements of the outer
array, as they are written. Parquet: whole row groups by the sizes in the footer, or a slice of one
that is larger; Arrow: the same of record batches. A change of the rule is a new `RULE`, and so new
keys: content that was sent under another rule is stored again.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click

from cluster.ingest_sources import Content
from cluster.ingest_tables import arrow_pieces, parquet_pieces
from lakebus.errors import MalformedBody

RULE = 1
CHUNK_BYTES = 8 * 1024 * 1024
#: Below what one request may have (setting `http.rows_max`, 1,000,000).
ROWS_MAX = 250_000
#: A longer row cannot be sent (setting `http.body_bytes_max`), so no more than this is held.
ROW_BYTES_MAX = 64 * 1024 * 1024
_ARROW = "application/vnd.apache.arrow.stream"
MEDIA_TYPES = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv",
    "arrow": _ARROW,
    "parquet": _ARROW,  # row groups are sent as Arrow streams
}
_JSON_TEXT = 1024 * 1024

_LINE = rb"[^\n]*+\n"
# A quote opens a field only at its begin; elsewhere it is a character (RFC 4180).
_FIELD = rb'(?:"(?:[^"]++|"")*+"[^,\n]*+|[^",\n][^,\n]*+|)'
_RECORD = _FIELD + rb"(?:," + _FIELD + rb")*+\n"
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The body of one request. `digest` identifies its rows."""

    body: bytes
    media_type: str
    digest: bytes


def chunks_of(content: Content) -> Iterator[Chunk]:
    """The requests of one file. Raises MalformedBody where its rows cannot be told apart."""

    cut = _CUTTERS[content.form]
    for body, digest in cut(content):
        yield Chunk(body, MEDIA_TYPES[content.form], digest or hashlib.sha256(body).digest())


class Keys:
    """Idempotency keys of one run. Equal chunks of a run all count: each has its number among its
    equals, so the keys of a run do not depend on the order of its files."""

    def __init__(self, table: str, own: str | None) -> None:
        self._table = table.lower()
        self._own = own
        self._equals: dict[bytes, int] = {}
        self._given = 0

    def key_of(self, chunk: Chunk) -> str:
        self._given += 1
        if self._own is not None:
            return self._own if self._given == 1 else f"{self._own}-{self._given - 1}"
        number = self._equals.get(chunk.digest, 0)
        self._equals[chunk.digest] = number + 1
        scope = f"lakebus ingest {RULE}\n{self._table}\n{chunk.media_type}\n{number}\n"
        return f"ingest-{RULE}-" + hashlib.sha256(scope.encode() + chunk.digest).hexdigest()


# --- text with line ends -------------------------------------------------------------------


def _ndjson(content: Content) -> Iterator[tuple[bytes, None]]:
    for body in _runs(content, _LINE, b""):
        if body.strip():
            yield body, None


def _csv(content: Content) -> Iterator[tuple[bytes, None]]:
    header, rest = _first_record(content)
    for body in _runs(content, _RECORD, rest):
        # A blank line is a null where there is one column, and nothing where there are more.
        if b"," not in header or body.strip():
            yield header + body, None


def _first_record(content: Content) -> tuple[bytes, bytes]:
    one = re.compile(_RECORD)
    held, ended = b"", False
    while not ended:
        more = content.read(_JSON_TEXT)
        held, ended = held + more, not more
        found = one.match(held)
        if found is not None:
            return held[: found.end()], held[found.end() :]
        _refuse_long(content, held)
    return held, b""


def _runs(content: Content, record: bytes, held: bytes) -> Iterator[bytes]:
    """Runs of whole records; the last may lack its line end."""

    one = re.compile(record)
    run = re.compile(rb"(?:%b){0,%d}+" % (record, ROWS_MAX))
    ended = False
    while True:
        held, ended = _filled(content, held, CHUNK_BYTES, ended)
        if not held:
            return
        end = _end(run, held, min(CHUNK_BYTES, len(held)))
        if ended and len(held) <= CHUNK_BYTES and _end(run, held, len(held), end) == end:
            end = len(held)  # what is left is no whole record: the file ends without a line end
        while end == 0 and not ended:  # one record is longer than a chunk
            _refuse_long(content, held)
            held, ended = _filled(content, held, 2 * len(held), ended)
            found = one.match(held)
            end = found.end() if found is not None else 0
        yield held[: end or len(held)]
        held = held[end:] if end else b""


def _end(run: re.Pattern[bytes], held: bytes, until: int, begin: int = 0) -> int:
    found = run.match(held, begin, until)
    return found.end() if found is not None else begin


def _filled(content: Content, held: bytes, size: int, ended: bool) -> tuple[bytes, bool]:
    """At least `size` bytes, or all that there are."""

    parts, count = [held], len(held)
    while not ended and count < size:
        part = content.read(size - count)
        parts.append(part)
        count += len(part)
        ended = not part
    return (b"".join(parts) if len(parts) > 1 else held), ended


def _refuse_long(content: Content, held: bytes | str) -> None:
    if len(held) > ROW_BYTES_MAX:
        raise MalformedBody(
            f"{content.name} has a row of more than {ROW_BYTES_MAX} bytes, or is no"
            f" {content.form}: is there a quote that is never closed, or another --format meant?"
        )


# --- JSON ----------------------------------------------------------------------------------


def _json(content: Content) -> Iterator[tuple[bytes, None]]:
    elements: list[bytes] = []
    size = 0
    for element in _elements(content):
        if elements and (size + len(element) > CHUNK_BYTES or len(elements) == ROWS_MAX):
            yield b"[" + b",".join(elements) + b"]", None
            elements, size = [], 0
        elements.append(element)
        size += len(element) + 1
    if elements:
        yield b"[" + b",".join(elements) + b"]", None


def _elements(content: Content) -> Iterator[bytes]:
    """The texts of the objects of an array, or of the one object that is there instead."""

    text = _Text(content)
    first = text.next_character()
    if first == "{":
        yield text.value().encode()
    elif first == "[":
        text.skip()
        more = text.next_character() != "]"
        while more:
            yield text.value().encode()
            mark = text.next_character()
            if mark not in (",", "]"):
                raise text.wrong("a comma or the end of the array was expected")
            more = mark == ","
            if more:
                text.skip()
        text.skip()
    elif first:
        raise text.wrong("an array of objects, or one object, was expected")
    if text.next_character():
        raise text.wrong("there is more behind the end; for one object a line: --format ndjson")


class _Text:
    """The text of a JSON file, a window at a time. Values are found by the parser and passed on as
    they are written, so that the server alone judges them."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan: Callable[[str, int], tuple[object, int]] = json.JSONDecoder(
            parse_int=str, parse_float=str
        ).raw_decode
        self._window, self._place, self._ended, self._row = "", 0, False, 0

    def next_character(self) -> str:
        """The next that is no space, not taken; nothing at the end."""

        while True:
            found = _SPACE.match(self._window, self._place)
            self._place = found.end() if found is not None else self._place
            if self._place < len(self._window):
                return self._window[self._place]
            if not self._fill():
                return ""

    def skip(self) -> None:
        self._place += 1

    def value(self) -> str:
        """The text of the object that is next."""

        if self.next_character() != "{":
            raise self.wrong("an object was expected")
        while True:
            try:
                _, end = self._scan(self._window, self._place)
            except (ValueError, RecursionError) as error:
                _refuse_long(self._content, self._window[self._place :])
                if not self._fill():
                    raise self.wrong(str(error)) from None
                continue
            found, self._place = self._window[self._place : end], end
            self._row += 1
            return found

    def wrong(self, why: str) -> MalformedBody:
        return MalformedBody(f"{self._content.name} is broken at row {self._row}: {why}")

    def _fill(self) -> bool:
        """More text, at least as much again as is held, so that a long value is scanned seldom."""

        if self._ended:
            return False
        left = self._window[self._place :]
        data = self._content.read(max(_JSON_TEXT, len(left)))
        self._ended = not data
        try:
            self._window = left + self._decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self.wrong(f"this is not UTF-8 ({error.reason})") from None
        self._place = 0
        return True


# --- tables --------------------------------------------------------------------------------


def _parquet(content: Content) -> Iterator[tuple[bytes, bytes]]:
    yield from parquet_pieces(content, chunk_bytes=CHUNK_BYTES, rows_max=ROWS_MAX)


def _arrow(content: Content) -> Iterator[tuple[bytes, bytes]]:
    yield from arrow_pieces(content, chunk_bytes=CHUNK_BYTES, rows_max=ROWS_MAX)


_CUTTERS: dict[str, Callable[[Content], Iterator[tuple[bytes, bytes | None]]]] = {
    "json": _json,
    "ndjson": _ndjson,
    "csv": _csv,
    "arrow": _arrow,
    "parquet": _parquet,
}


def require_form(form: str | None, name: str) -> str:
    """Raises click.UsageError."""

    if form is None:
        raise click.UsageError(
            f"Say what the rows of {name} are written in: --format {', '.join(MEDIA_TYPES)}."
        )
    return form
