"""Reading JSON exactly: every key in order, every number as its text, every value's own text.

This is the slow, exact reader. It is the authority on what a body means wherever the fast decoder
gives up: it sees duplicate keys, keeps number text (so nothing passes through a double, contract
A10), and knows the position of a fault. It stands on CPython's own JSON scanner; the members of an
object are walked here because no hook of that scanner gives the text of a member.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from lakebus.errors import MalformedBody

JSON_DEPTH_MAX = 200
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class NumberText(str):
    """The text of a JSON number, told apart from a JSON string by its class."""

    __slots__ = ()


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON; write it as a string")


_SCANNER = json.JSONDecoder(
    parse_float=NumberText, parse_int=NumberText, parse_constant=_refuse_constant
)


#: What `raw_decode` calls; called directly because it runs twice for every value.
_scan_once: Callable[[str, int], tuple[Any, int]] = _SCANNER.scan_once  # type: ignore[attr-defined]


class Member(NamedTuple):
    """One member of an object: `text` is the value as written.

    A named tuple because there is one for every value of a body, and it is made in half the time.
    """

    key: str
    value: Any
    text: str


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row as written. `members` is None when the row is not an object."""

    text: str
    members: list[Member] | None


def body_text(body: bytes) -> str:
    """The body as text. Raises MalformedBody with the byte position of the fault."""

    try:
        return str(body, "utf-8")
    except UnicodeDecodeError as fault:
        raise MalformedBody(
            f"the body is not UTF-8 at byte {fault.start}; send it encoded as UTF-8",
            position=fault.start,
        ) from None


def read_rows(text: str) -> Iterator[JsonRow]:
    """The rows of an application/json body: an array of objects, or one object."""

    start = _skip(text, 0)
    if text.startswith("[", start):
        yield from _read_array(text, start)
        return
    if not text.startswith("{", start):
        raise _malformed(text, start, "the body must be a JSON array of objects, or one object")
    row, end = _read_row(text, start)
    _expect_end(text, end)
    yield row


def read_lines(text: str) -> Iterator[JsonRow]:
    """The rows of an application/x-ndjson body: one JSON value a line, blank lines skipped."""

    # Only a line feed ends a line: str.splitlines would also split inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        start = _skip(line, 0)
        if start == len(line):
            continue
        try:
            row, end = _read_row(line, start)
            _expect_end(line, end)
        except MalformedBody as fault:
            raise MalformedBody(f"line {number}: {fault.detail}", line=number) from None
        yield row


def read_object(text: str) -> list[Member]:
    """The members of a body that must be one object."""

    start = _skip(text, 0)
    if not text.startswith("{", start):
        raise _malformed(text, start, "the body must be one JSON object")
    row, end = _read_row(text, start)
    _expect_end(text, end)
    return row.members or []


def read_elements(text: str) -> list[Member]:
    """The elements of a text that is one array; they have no key."""

    elements: list[Member] = []
    position = _skip(text, _skip(text, 0) + 1)
    if text.startswith("]", position):
        _expect_end(text, position + 1)
        return elements
    while True:
        value, end = _scan(text, position)
        elements.append(Member("", value, text[position:end]))
        position = _skip(text, end)
        if text.startswith("]", position):
            _expect_end(text, position + 1)
            return elements
        if not text.startswith(",", position):
            raise _malformed(text, position, "expected a comma or the end of the array")
        position = _skip(text, position + 1)


def compact_json(raw: bytes) -> bytes:
    """JSON text without white space outside of strings; numbers and escapes stay as written.

    Raises ValueError (also as msgspec.DecodeError) when it is not JSON, holds a lone surrogate, or
    is nested deeper than JSON_DEPTH_MAX. UTF-8 is checked by the caller.
    """

    if raw.count(b"[") + raw.count(b"{") > JSON_DEPTH_MAX and _depth(raw) > JSON_DEPTH_MAX:
        raise ValueError(f"nested deeper than {JSON_DEPTH_MAX} levels")
    return msgspec.json.format(raw, indent=-1)


def _depth(raw: bytes) -> int:
    depth = deepest = 0
    for byte in _STRING.sub(b"", raw):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _read_array(text: str, start: int) -> Iterator[JsonRow]:
    position = _skip(text, start + 1)
    if text.startswith("]", position):
        _expect_end(text, position + 1)
        return
    while True:
        row, end = _read_row(text, position)
        position = _skip(text, end)
        yield row
        if text.startswith("]", position):
            _expect_end(text, position + 1)
            return
        if not text.startswith(",", position):
            raise _malformed(text, position, "expected a comma or the end of the array")
        position = _skip(text, position + 1)


def _read_row(text: str, start: int) -> tuple[JsonRow, int]:
    if not text.startswith("{", start):
        _, end = _scan(text, start)
        return JsonRow(text[start:end], None), end
    members, end = _read_members(text, start)
    return JsonRow(text[start:end], members), end


def _read_members(text: str, start: int) -> tuple[list[Member], int]:
    members: list[Member] = []
    position = _skip(text, start + 1)
    if text.startswith("}", position):
        return members, position + 1
    while True:
        if not text.startswith('"', position):
            raise _malformed(text, position, "expected a key in double quotes")
        key, end = _scan(text, position)
        position = _skip(text, end)
        if not text.startswith(":", position):
            raise _malformed(text, position, "expected a colon after the key")
        position = _skip(text, position + 1)
        value, end = _scan(text, position)
        members.append(Member(key, value, text[position:end]))
        position = _skip(text, end)
        if text.startswith("}", position):
            return members, position + 1
        if not text.startswith(",", position):
            raise _malformed(text, position, "expected a comma or the end of the object")
        position = _skip(text, position + 1)


def _scan(text: str, start: int) -> tuple[Any, int]:
    try:
        return _scan_once(text, start)
    except StopIteration as stop:
        raise _malformed(text, stop.value, "expected a value") from None
    except json.JSONDecodeError as fault:
        raise _malformed(text, fault.pos, fault.msg[0].lower() + fault.msg[1:]) from None
    except RecursionError:
        raise _malformed(text, start, "a value is nested too deeply") from None
    except ValueError as fault:
        raise _malformed(text, start, str(fault)) from None


def _skip(text: str, position: int) -> int:
    if text[position : position + 1] > " ":
        return position
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _expect_end(text: str, position: int) -> None:
    position = _skip(text, position)
    if position != len(text):
        raise _malformed(text, position, "there is more text after the end of the JSON value")


def _malformed(text: str, position: int, reason: str) -> MalformedBody:
    if text.startswith("\ufeff"):
        position, reason = 0, "the body starts with a byte order mark; send UTF-8 without it"
    elif position >= len(text):
        reason = f"the body ends too early: {reason}"
    # The caller counts bytes, the scanner characters.
    offset = len(text[:position].encode("utf-8"))
    return MalformedBody(f"not JSON at byte {offset}: {reason}", position=offset)
