"""Bodies of several parts, one a table (multipart/form-data, RFC 7578): cut, and nothing more.

Each part is named by the table (`Content-Disposition: form-data; name="flights"`) and says its own
Content-Type. A part is bytes between two boundaries, never decoded on the way, so binary formats
pass. Whatever is not plainly one thing is refused: unknown ends, parts without a name or a type,
transfer encodings (which RFC 7578 has done away with), bytes behind the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lakebus.errors import MalformedBody, MalformedRequest, UnsupportedMediaType
from storage.rows.decode import SUPPORTED_MEDIA_TYPES

MULTIPART = "multipart/form-data"
#: RFC 2046, section 5.1.1; a space may not be the last character.
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]", re.ASCII)
_PARTS_MAX = 1_000
_HEADERS_BYTES_MAX = 8 * 1024
_PADDING = b" \t"
#: One parameter of a header (RFC 9110, section 5.6.6): a token, or a quoted string.
_PARAMETER = re.compile(
    r"""\s*;\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=(?:"((?:[^"\\]|\\.)*)"|([!#$%&'*+.^_`|~0-9A-Za-z-]+))""",
    re.ASCII | re.DOTALL,
)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """`media_type` in lower case, without parameters."""

    name: str
    media_type: str
    body: bytes


def boundary_of(content_type: str) -> str:
    """The boundary that a Content-Type header names. Raises MalformedRequest."""

    _, parameters = _value_of(content_type)
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedRequest(
            f"Content-Type {MULTIPART} must name the boundary, of 1 to 70 characters (RFC 2046)"
        )
    return boundary


def split_parts(body: bytes, boundary: str) -> list[Part]:
    """The parts in order. Raises MalformedBody, MalformedRequest, UnsupportedMediaType."""

    parts: list[Part] = []
    for piece in _pieces(body, b"--" + boundary.encode("ascii")):
        if len(parts) >= _PARTS_MAX:
            raise MalformedBody(f"the body has more than {_PARTS_MAX} parts")
        parts.append(_part(piece, len(parts) + 1))
    if not parts:
        raise MalformedRequest("the body has no part; send one a table, named by it")
    return parts


def _pieces(body: bytes, delimiter: bytes) -> Iterator[bytes]:
    """What lies between the delimiter lines; what stands before the first one means nothing."""

    place = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if place == 1:
        raise MalformedBody("the body does not begin with the boundary that Content-Type names")
    start = None
    while True:
        after = place + len(delimiter)
        if start is not None:
            yield body[start : place - 2]
        if body.startswith(b"--", after):
            if body[after + 2 :].strip(b" \t\r\n"):
                raise MalformedBody("there are more bytes after the last boundary")
            return
        line_end = body.find(b"\r\n", after)
        if line_end < 0 or body[after:line_end].strip(_PADDING):
            raise MalformedBody("a boundary is not followed by the end of its line")
        # A part may have no header and no byte, so its first line end may begin the delimiter.
        start = line_end + 2
        found = body.find(b"\r\n" + delimiter, line_end)
        if found < 0:
            raise MalformedBody("the last boundary is missing: the body is cut short")
        place = found + 2


def _part(piece: bytes, number: int) -> Part:
    head, separator, body = piece.partition(b"\r\n\r\n")
    if not separator or len(head) > _HEADERS_BYTES_MAX:
        raise MalformedBody(f"part {number} has no headers; it needs Content-Disposition")
    headers = _headers(head, number)
    disposition, parameters = _value_of(headers.get("content-disposition", ""))
    name = parameters.get("name", "")
    if disposition != "form-data" or not name:
        raise MalformedRequest(
            f'part {number} has no name; write Content-Disposition: form-data; name="<table>"'
        )
    what = f"part {number} ({name[:80]})"
    for header in ("content-encoding", "content-transfer-encoding"):
        if headers.get(header, "identity").lower() not in ("identity", "binary", "8bit"):
            raise UnsupportedMediaType(
                f"{what} has a {header}; compress the whole body instead, and say so in the header "
                "Content-Encoding of the request",
                supported=["identity"],
            )
    media_type, parameters = _value_of(headers.get("content-type", ""))
    if not media_type:
        raise UnsupportedMediaType(
            f"{what} has no Content-Type; use {', '.join(SUPPORTED_MEDIA_TYPES)}",
            supported=list(SUPPORTED_MEDIA_TYPES),
        )
    if parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"{what} is not UTF-8; convert it", supported=["utf-8"])
    if parameters.get("header", "").lower() == "absent":
        raise UnsupportedMediaType(
            f"{what} needs a header line, because columns are found by their names",
            supported=["header=present"],
        )
    return Part(name, media_type, body)


def _headers(head: bytes, number: int) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in head.split(b"\r\n"):
        name, colon, value = line.decode("latin-1").partition(":")
        name = name.strip().lower()
        if not colon or not name or name in headers:
            raise MalformedBody(f"part {number} has a header line that cannot be read")
        headers[name] = value.strip()
    return headers


def _value_of(header: str) -> tuple[str, dict[str, str]]:
    """The first word of a header in lower case, and its parameters; none at all where they are not
    well formed or one comes twice."""

    word, _, _ = header.partition(";")
    place, parameters = len(word), dict[str, str]()
    while (match := _PARAMETER.match(header, place)) is not None:
        name, quoted, token = match[1].lower(), match[2], match[3]
        if name in parameters:
            return word.strip().lower(), {}
        parameters[name] = token if quoted is None else _ESCAPED.sub(r"\1", quoted)
        place = match.end()
    return word.strip().lower(), parameters if not header[place:].strip("; \t") else {}
