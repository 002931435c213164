"""Calls of jobs inside the cluster: an HTTP call that came as arguments of a Serve handle's call.

The same application answers it (`HttpApplication`), from authentication to the last header, so
there is nothing that this way allows and HTTP does not. The form is in `lakebus.client_ray_calls`.

The body of an Arrow stream is read where it lies in Ray's shared memory: it is sealed there, so it
cannot change between the check and the use. Other bodies are copied, as their parsers want bytes.

When the caller goes away, the application is told so, as by a closed connection: it ends what may
be ended (queries), and finishes what must not be left half-way (an append).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import unquote

from lakebus.client_ray_calls import (
    ANSWER_BYTES_MAX,
    PART_BYTES,
    AnswerHead,
    AnswerPart,
    RequestHead,
    shared,
)
from lakebus.errors import LakebusError, ResultTooLarge, Unavailable
from serve_app.calls import Message, Scope
from serve_app.problems import MEDIA_TYPE, render
from serve_app.routing import HttpApplication
from storage.rows.decode import ARROW_STREAM

_log = logging.getLogger(__name__)
#: Parts that the application may be ahead of what was handed to Ray.
_AHEAD_MAX = 4
#: Applications that finish what they began, although their caller left.
_finishing: set[asyncio.Task[None]] = set()


async def answer_call(
    application: HttpApplication | None, head: RequestHead, body: Any
) -> AsyncGenerator[AnswerHead | AnswerPart, None]:
    """The answer's items; see `lakebus.client_ray_calls`. A broken answer ends without a last."""

    if application is None or application.dependencies is None:
        yield _refused(Unavailable("the replica is starting; try again", retry_after_s=1.0))
        return
    exchange = _Exchange(_body_of(head, body))
    work = asyncio.create_task(exchange.run(application, _scope_of(head, len(exchange.body))))
    _finishing.add(work)
    work.add_done_callback(_finishing.discard)
    try:
        async for item in exchange.items():
            yield item
    finally:
        exchange.leave()


def _scope_of(head: RequestHead, length: int) -> Scope:
    path, _, query = head["target"].partition("?")
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head["headers"]
    ]
    headers.append((b"content-length", str(length).encode("ascii")))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": head["method"],
        "path": unquote(path),
        "raw_path": path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }


def _body_of(head: RequestHead, body: Any) -> bytes | memoryview:
    named = {name.lower(): value for name, value in head["headers"]}
    view = memoryview(body)
    if named.get("content-type") == ARROW_STREAM and "content-encoding" not in named:
        return view.toreadonly()
    return bytes(view)


def _refused(error: LakebusError) -> AnswerHead:
    status, headers, problem = render(error, request_id="")
    named = [("content-type", MEDIA_TYPE.decode("ascii")), *_texts(headers)]
    return {"status": status, "headers": named, "body": [problem], "last": True}


def _texts(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


class _Exchange:
    """One call: the application at one end, the items at the other."""

    def __init__(self, body: bytes | memoryview) -> None:
        self.body = body
        self._asked = False
        self._left = asyncio.Event()
        # The messages that the application sends; None: it sends no more.
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD_MAX)

    async def run(self, application: HttpApplication, scope: Scope) -> None:
        try:
            await application(scope, self._receive, self._send)
        except Exception:  # noqa: BLE001 - its answer had begun, and ends without its end now
            _log.exception("an answer to a job broke off")
        finally:
            await self._put(None)

    def leave(self) -> None:
        """Nobody reads on."""

        self._left.set()
        self.body = b""
        while not self._sent.empty():  # who waits for a place gets one
            self._sent.get_nowait()

    async def items(self) -> AsyncGenerator[AnswerHead | AnswerPart, None]:
        start = await self._sent.get()
        if start is None:
            return
        item: Any = {"status": start["status"], "headers": _texts(start["headers"])}
        total, more = 0, True
        while more:
            pieces: list[Any] = []
            size = 0
            while more and size < PART_BYTES:
                message = await self._sent.get()
                if message is None:  # it broke off, after its head
                    yield item | {"body": [], "last": False}
                    return
                piece = message.get("body", b"")
                pieces.append(shared(piece))
                size += len(piece)
                more = message.get("more_body", False)
            total += size
            if total > ANSWER_BYTES_MAX:
                yield {"failed": _too_large()}
                return
            yield item | {"body": pieces, "last": not more}
            item = {}

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            body, self.body = self.body, b""  # the application's alone, to be let go of
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._put(message)

    async def _put(self, message: Message | None) -> None:
        if not self._left.is_set():
            await self._sent.put(message)


def _too_large() -> tuple[int, bytes]:
    error = ResultTooLarge(
        f"the answer has more than {ANSWER_BYTES_MAX} bytes, which is as much as goes through Ray's"
        " object store; ask for it by HTTP: lakebus.connect(url).query_batches(…)",
        limit_bytes=ANSWER_BYTES_MAX,
    )
    status, _, problem = render(error, request_id="")
    return status, problem
