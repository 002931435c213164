"""The form of a call that goes through Ray instead of a socket: what both ends agree on.

It is an HTTP call without HTTP: method, target, headers and body go in, status, headers and body
come out, and one application answers both (`serve_app.handle_calls`). A request is two arguments of
the method `METHOD`: a `RequestHead`, and the body, which Ray keeps in shared memory when it is
large. The answer is a stream of items: an `AnswerHead`, then `AnswerPart`s until one is the last; a
stream that ends without that was broken off (contract D9).

Plain dicts of plain values, because the two ends may be of different versions.
"""

from __future__ import annotations

import pickle
from typing import Any, TypedDict

#: The address that means this way.
RAY = "ray"
#: Serve's applications, each with one deployment of its name.
API, QUERY = "api", "query"
QUERY_PATH = "/v1/query"
#: The method of both deployments that answers calls.
METHOD = "answer_call"

#: Ray copies what is smaller, and shares what is larger (its own limit is 100 KiB).
SHARED_BYTES_MIN = 64 * 1024
#: Parts of an answer are put together up to this size.
PART_BYTES = 4 * 1024 * 1024
#: More is not answered through Ray: nothing makes the sender wait for the reader, so all of an
#: answer may lie in the object store (256 MiB by default) at a time.
ANSWER_BYTES_MAX = 128 * 1024 * 1024

Headers = list[tuple[str, str]]


class RequestHead(TypedDict):
    """`target`: path and query string, percent-encoded."""

    method: str
    target: str
    headers: Headers


class AnswerPart(TypedDict, total=False):
    """`body`: pieces of bytes. `failed`: (status, problem document), why what came before is no
    whole answer."""

    body: list[Any]
    last: bool
    failed: tuple[int, bytes]


class AnswerHead(AnswerPart):
    """The first item, with the beginning of the body."""

    status: int
    headers: Headers


def shared(content: bytes | memoryview) -> Any:
    """What Ray is given for bytes, so that the other end reads large ones where they lie."""

    if len(content) < SHARED_BYTES_MIN:
        return bytes(content)
    return pickle.PickleBuffer(content)


def application_of(target: str) -> str:
    """The application that answers a target."""

    return QUERY if target.partition("?")[0] == QUERY_PATH else API
