"""Multipart bodies: cut at boundaries and nowhere else, everything odd refused."""

from __future__ import annotations

import pytest

from lakebus.errors import LakebusError, MalformedBody, MalformedRequest, UnsupportedMediaType
from storage.rows.multipart import Part, boundary_of, split_parts

_HEAD = b'Content-Disposition: form-data; name="t"\r\nContent-Type: text/csv\r\n\r\n'


def body_of(*pieces: bytes, boundary: bytes = b"B") -> bytes:
    opened = b"".join(b"--" + boundary + b"\r\n" + piece + b"\r\n" for piece in pieces)
    return opened + b"--" + boundary + b"--\r\n"


def test_parts_are_the_bytes_between_boundaries() -> None:
    binary = bytes(range(256)) + b"\r\n--C\r\n\r\n--\r\n-\r\n"
    other = (
        b"content-type: Application/JSON; charset=UTF-8\r\n"
        b'CONTENT-DISPOSITION: form-data; name="ns.u"; filename="x.json"\r\n\r\n[]'
    )
    body = body_of(_HEAD + binary, other, _HEAD)
    assert split_parts(body, "B") == [
        Part("t", "text/csv", binary),
        Part("ns.u", "application/json", b"[]"),
        Part("t", "text/csv", b""),
    ]
    # What stands before the first boundary, and padding behind one, mean nothing (RFC 2046).
    padded = b"preamble\r\n" + body.replace(b"--B\r\n", b"--B \t\r\n")
    assert split_parts(padded, "B") == split_parts(body, "B")
    assert split_parts(body.removesuffix(b"\r\n"), "B") == split_parts(body, "B")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", MalformedBody),
        (b"--X\r\n", MalformedBody),
        (b"--B", MalformedBody),
        (b"--B\r\n" + _HEAD + b"a\n1\r\n", MalformedBody),
        (b"--B\r\n" + _HEAD + b"a\n1\r\n--B\r\n", MalformedBody),
        (body_of(_HEAD + b"a\n1") + b"more", MalformedBody),
        (b"--Bx\r\n" + _HEAD + b"\r\n--B--", MalformedBody),
        (b"--B\r\n--B--", MalformedBody),
        (body_of(b"a\n1"), MalformedBody),
        (body_of(b"no colon\r\n\r\nx"), MalformedBody),
        (body_of(_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Type: a/b\r\n\r\n")), MalformedBody),
        (body_of(b"x: " + b"y" * 9_000 + b"\r\n\r\nx"), MalformedBody),
        (b"--B--", MalformedRequest),
        (body_of(b"Content-Type: text/csv\r\n\r\nx"), MalformedRequest),
        (body_of(_HEAD.replace(b'name="t"', b'name=""')), MalformedRequest),
        (body_of(_HEAD.replace(b"form-data", b"attachment")), MalformedRequest),
        (body_of(b'Content-Disposition: form-data; name="t"\r\n\r\nx'), UnsupportedMediaType),
        (body_of(b"Content-Encoding: gzip\r\n" + _HEAD), UnsupportedMediaType),
        (body_of(b"Content-Transfer-Encoding: base64\r\n" + _HEAD), UnsupportedMediaType),
        (body_of(_HEAD.replace(b"csv", b"csv; charset=latin1")), UnsupportedMediaType),
        # What the mail package of the standard library trips over.
        (body_of(_HEAD.replace(b'name="t"', b"name*0=t; name*=u")), MalformedRequest),
        (body_of(_HEAD.replace(b'"t"', b'"t"; name="u"')), MalformedRequest),
        (body_of(_HEAD.replace(b'"t"', b'"t')), MalformedRequest),
        (body_of(_HEAD.replace(b"csv", b"csv; header=absent")), UnsupportedMediaType),
    ],
)
def test_what_is_not_plainly_parts_is_refused(body: bytes, error: type[LakebusError]) -> None:
    with pytest.raises(error):
        split_parts(body, "B")


def test_every_cut_of_a_body_is_refused() -> None:
    body = body_of(_HEAD + b"a\n1", _HEAD + b"b\n2").removesuffix(b"\r\n")
    whole = split_parts(body, "B")
    for end in range(len(body)):
        with pytest.raises(MalformedBody):
            split_parts(body[:end], "B")
    assert len(whole) == 2


def test_the_boundary_is_named_by_the_content_type() -> None:
    assert boundary_of('multipart/form-data; boundary="a b:c"') == "a b:c"
    assert boundary_of("multipart/form-data; charset=x; boundary=--x") == "--x"
    long = "; boundary=" + "x" * 71
    for bad in ("", "; boundary=", '; boundary="x "', long, '; boundary="\xe9"'):
        with pytest.raises(MalformedRequest):
            boundary_of("multipart/form-data" + bad)
