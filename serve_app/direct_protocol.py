"""One connection of the direct door: uvicorn's HTTP protocol, bounded in bytes and in time.

Behind Serve's route HAProxy and Serve's wrapper bound a connection; here this does. A head has a
size and a time to arrive, a request a time to be answered in, and a client that leaves ends the
work that was done for it. Refusals of the protocol are problems like all others.

Times are kept by the door's one clock tick (`overdue`), not by a timer for each request.
"""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lakebus.clock import new_uuid
from lakebus.errors import LakebusError, MalformedRequest, Unavailable
from serve_app.calls import AT_HAND, Header, Scope
from serve_app.problems import MEDIA_TYPE, render

#: What HAProxy takes by its buffers: 16 KiB, less what it keeps free for rewriting.
HEAD_BYTES_MAX = 15 * 1024
#: How long the rest of an answer may take to reach a client whose connection is being closed.
_LINGER_S = 5.0
#: A connection that was just accepted is about to send its request.
_YOUNG_S = 1.0
#: The word that a client waits for before it sends its body; no answer yet.
_CONTINUE = b"HTTP/1.1 100"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`request_s`: from the head of a request to the end of its answer."""

    connections_max: int = 4096
    head_s: float = 10.0
    request_s: float = 105.0
    idle_s: float = 90.0


class DoorState(ServerState):
    """What the connections of one door share; `connections` are those that are open."""

    def __init__(self, limits: ConnectionLimits) -> None:
        super().__init__()
        self.limits = limits
        self.draining = False


class DoorProtocol(HttpToolsProtocol):
    """A connection. All of its private state of uvicorn's that is used here is used by uvicorn's
    own subclasses and tests too; the version is pinned, and `tests/unit/test_direct_door.py`
    drives each of it over a socket."""

    server_state: DoorState

    def __init__(self, config: Config, state: DoorState) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._limits = state.limits
        self.timeout_keep_alive = state.limits.idle_s  # type: ignore[assignment] # any number will do
        self._task: asyncio.Task[None] | None = None
        self._answering: RequestResponseCycle | None = None
        self._outlet = _Outlet(self)
        self._refusal: LakebusError | None = None
        self._head_bytes = self._unfinished_bytes = 0
        self._heading = self._lingering = False
        self._request_until_s = 0.0
        self._closing_until_s = 0.0
        self._since_s = self.loop.time()
        self._head_until_s = self._since_s + self._limits.head_s

    # --- a connection's life -----------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._outlet.send = transport.write
        self._outlet.is_closing = transport.is_closing
        if len(self.connections) > self._limits.connections_max:
            self._refuse(
                Unavailable(
                    f"this server has {self._limits.connections_max} connections, as many as it "
                    "may; use them again, or try again",
                    retry_after_s=1.0,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        cycle, task = self._answering, self._task
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if task is not None:
                task.cancel()  # nobody is there to be answered; the work ends (contract D9)

    @property
    def busy(self) -> bool:
        """A request is being read or answered, or one is about to come."""

        if self._lingering or self.transport.is_closing():
            return True  # what was answered is still on its way
        cycle = self.cycle
        if cycle is None:
            return self._heading or self.loop.time() < self._since_s + _YOUNG_S
        return self._heading or not cycle.response_complete or bool(self.pipeline)

    def last_answers(self) -> None:
        """The requests that are being answered are the last on this connection."""

        for cycle in (self._answering, self.cycle):
            if cycle is not None:
                cycle.keep_alive = False

    def overdue(self, now_s: float) -> None:
        """Ends the connection if something of it has taken too long."""

        cycle = self.cycle
        if self._lingering or self.transport.is_closing():
            self._closing_until_s = self._closing_until_s or now_s + _LINGER_S
            if now_s > self._closing_until_s:
                self.transport.abort()
        elif cycle is not None and (not cycle.response_complete or cycle.more_body):
            if now_s > self._request_until_s:
                self.transport.abort()
        elif (self._heading or cycle is None) and now_s > self._head_until_s:
            if self._heading:
                self._refuse(
                    MalformedRequest(
                        f"the head of the request did not arrive within {self._limits.head_s:g} s"
                    )
                )
            else:  # nothing was sent, so nothing is answered
                self.transport.close()

    def close_gently(self) -> None:
        """Closes over what the client still sends: closing over unread bytes would reset the
        connection, and the client might never see its answer."""

        cycle = self._answering
        if not self._heading and (cycle is None or not cycle.more_body):
            self.transport.close()
        elif not self._lingering and not self.transport.is_closing():
            self._lingering = True
            self.transport.write_eof()

    # --- the parser's callbacks --------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._lingering or self.transport.is_closing():
            return
        begun = self._heading
        super().data_received(data)
        if begun and self._heading and not self._lingering:
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > HEAD_BYTES_MAX:
                self._refuse(_head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heading = True
        self._head_bytes = self._unfinished_bytes = 0
        self._head_until_s = self.loop.time() + self._limits.head_s

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        self._count_head(len(name) + len(value) + 4)

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refusal = _head_too_large()
            raise self._refusal  # to the parser, which stops

    def on_headers_complete(self) -> None:
        self._heading = False
        self._request_until_s = self.loop.time() + self._limits.request_s
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, self._outlet)
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.more_body = False  # of a request that was answered before its end too

    def on_response_complete(self) -> None:
        self._outlet.flush()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        self._outlet.begin()
        task = self.loop.create_task(_run(cycle, app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        self._task = task

    # --- refusals ----------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for anything that the parser refuses."""

        self._heading = True  # more of it may come
        self._refuse(self._refusal or MalformedRequest("this is not HTTP/1.1 (RFC 9112)"))

    def _refuse(self, error: LakebusError) -> None:
        """An answer instead of the application's; the connection ends with it."""

        cycle = self._answering
        if cycle is not None and not cycle.response_complete:
            self.transport.close()  # it would be taken for the end of the answer that goes on
            return
        self.transport.write(_refusal_bytes(error))
        self.close_gently()


async def _run(cycle: RequestResponseCycle, app: Any) -> None:
    """The answer to a request, whose body can be had without a message where all of it is there."""

    taken = False

    def take_body() -> bytes | None:
        nonlocal taken
        if taken or cycle.more_body or cycle.disconnected or cycle.response_complete:
            return None
        taken = True
        cycle.flow.resume_reading()
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    scope = cast(Scope, cycle.scope)
    scope[AT_HAND] = take_body
    try:
        await cycle.run_asgi(app)
    finally:
        del scope[AT_HAND]  # requests leave no cycles


class _Outlet:
    """The transport as a request's answer sees it: one whose end is gentle, and that sends the head
    of an answer with the first part of its body: one packet, and one system call less."""

    __slots__ = ("_close", "_head", "_heading", "is_closing", "send")
    send: Callable[[bytes], None]
    is_closing: Callable[[], bool]

    def __init__(self, connection: DoorProtocol) -> None:
        self._close = connection.close_gently
        self._heading = False
        self._head = b""

    def begin(self) -> None:
        """Another answer."""

        self._heading = True

    def write(self, data: bytes) -> None:
        if self._heading and not data.startswith(_CONTINUE):
            self._heading, self._head = False, data
            return
        if self._head:
            data, self._head = b"".join((self._head, data)), b""
        self.send(data)

    def flush(self) -> None:
        """The answer has ended, maybe without a body."""

        if self._head:
            head, self._head = self._head, b""
            self.send(head)

    def close(self) -> None:
        self.flush()
        self._close()


def _head_too_large() -> MalformedRequest:
    return MalformedRequest(
        f"the request line and the headers have more than {HEAD_BYTES_MAX} bytes together"
    )


def refusal_of(error: LakebusError) -> tuple[int, list[Header], bytes]:
    """(status, headers, body) of an answer that is not the application's."""

    request_id = str(new_uuid())
    status, headers, body = render(error, request_id=request_id)
    named = [
        (b"content-type", MEDIA_TYPE),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    return status, [*named, *headers], body


def _refusal_bytes(error: LakebusError) -> bytes:
    """The same as it is sent, by which the connection ends."""

    status, headers, body = refusal_of(error)
    lines = [b"HTTP/1.1 %d %s" % (status, http.HTTPStatus(status).phrase.encode())]
    lines += [name + b": " + value for name, value in (*headers, (b"connection", b"close"))]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
