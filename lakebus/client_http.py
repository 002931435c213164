"""Connections of the client: kept alive, shared by threads, and honest about how they failed.

An answer is whole only when its framing says so: a body shorter than its Content-Length, or without
the last chunk, is a failure, never a short answer (contract D9). Answers are read by `http.client`;
requests are written here, head and body in one piece, which costs half of what it does there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import http.client
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from lakebus.errors import Cancelled, MalformedRequest

#: "http://host:port; door=id": what answers tell of the direct door (`lakebus.client_door`).
INGEST_URL_HEADER = "lakebus-ingest-url"
#: The same of the direct door for queries (`lakebus.client_query_door`).
QUERY_URL_HEADER = "lakebus-query-url"
_IDLE_MAX = 32
#: Bodies up to this size are copied behind their head, and are one packet with it.
_TOGETHER_BYTES_MAX = 256 * 1024
_LOST = (OSError, http.client.HTTPException)
_PORTS = {"http": 80, "https": 443}


class TransportFailed(Exception):
    """No whole answer. `sent`: the request may have reached the server; `answered`: the answer had
    begun."""

    def __init__(self, reason: str, *, sent: bool, answered: bool = False) -> None:
        super().__init__(reason)
        self.sent = sent
        self.answered = answered


@dataclass(frozen=True, slots=True)
class Exchange:
    """A whole answer."""

    status: int
    body: bytes
    retry_after_s: float | None
    #: What the server says of its direct doors (`lakebus.client_door`).
    ingest_url: str | None = None
    query_url: str | None = None


class CallScope:
    """Lets another thread end the call that a thread is in: by breaking its connection, which stops
    the work on the server too (contract D9)."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._end: Callable[[], object] | None = None

    def cancel(self) -> None:
        with self._lock:
            self.cancelled.set()
            if self._end is not None:
                self._end()

    def enter(self, end: Callable[[], object]) -> None:
        """`end` wakes up the thread that is in the call. Raises Cancelled."""

        with self._lock:
            self.check()
            self._end = end

    def leave(self) -> None:
        """Before the connection goes to anybody else."""

        with self._lock:
            self._end = None

    def check(self) -> None:
        """Raises Cancelled."""

        if self.cancelled.is_set():
            raise Cancelled("the call was cancelled by its caller, here")


#: The scope of the call that this context is in, if it can be cancelled.
SCOPE: contextvars.ContextVar[CallScope | None] = contextvars.ContextVar("lakebus", default=None)


class Reply(ABC):
    """An answer whose body is read piece by piece, whichever way it came. Closing it early cancels
    what the server does for it."""

    status: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def retry_after_s(self) -> float | None:
        text = self.header("retry-after")
        return float(text) if text is not None and text.isdecimal() else None

    @abstractmethod
    def header(self, name: str) -> str | None: ...

    @abstractmethod
    def read(self, size: int = -1) -> bytes | memoryview: ...

    @abstractmethod
    def close(self) -> None: ...


class Way(Protocol):
    """How requests reach a server: connections, or `lakebus.client_ray` inside a Ray cluster."""

    def close(self) -> None: ...

    def exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Exchange: ...

    def open(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Reply: ...


class Answer(Reply):
    """An answer whose body is read piece by piece. Closing it early breaks the connection, which
    cancels what the server does for it."""

    def __init__(
        self,
        connections: Connections,
        used: socket.socket,
        response: http.client.HTTPResponse,
        scope: CallScope | None,
        *,
        keep: bool,
    ) -> None:
        self.status = response.status
        self._connections = connections
        self._socket: socket.socket | None = used
        self._response = response
        self._scope = scope
        self._keep = keep and not response.will_close

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end; all that is left for -1. Raises
        TransportFailed when the body ends before its end."""

        if self._socket is None:
            return b""
        try:
            # Without a size it raises IncompleteRead where it is cut short; with one it does not.
            part = self._response.read() if size < 0 else self._response.read(size)
        except (*_LOST, ValueError) as error:
            self.close()
            raise _failed(error, answered=True) from error
        if size < 0 or (size and len(part) < size):
            self._ended()
        return part

    def close(self) -> None:
        used = self._leave()
        if used is not None:
            _break(used)
            self._response.close()
            used.close()

    def _ended(self) -> None:
        missing = self._response.length
        if missing:
            self.close()
            raise TransportFailed(f"{missing} bytes are missing", sent=True, answered=True)
        used = self._leave()
        if used is not None:
            self._response.close()
            self._connections.give(used, keep=self._keep)

    def _leave(self) -> socket.socket | None:
        used, self._socket = self._socket, None
        if self._scope is not None:
            self._scope.leave()
        return used


class Connections:
    """Idle connections to one server. A kept connection that the server has closed meanwhile is
    replaced once by a new one, and only if it failed before anything of the answer came."""

    def __init__(self, url: str, *, connect_s: float | None = None) -> None:
        """`connect_s`: how long making a connection may take, less than the call's own time."""

        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if host is None or parts.scheme not in _PORTS or not _is_plain(url):
            raise MalformedRequest(
                f"{url!r} is not the address of a server, like http://host:8350, nor 'ray', which"
                " is for jobs on the Ray cluster that serves lakebus"
            )
        self._connect_s = connect_s
        self._host = host
        self._port = _PORTS[parts.scheme] if port is None else port
        named = f"[{host}]" if ":" in host else host
        self._named = named if port is None else f"{named}:{port}"
        self._prefix = parts.path.rstrip("/")
        self._tls = _tls_context() if parts.scheme == "https" else None
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Idle connections end at once, those in use with their call."""

        with self._lock:
            idle, self._idle = self._idle, []
            self._closed = True
        for used in idle:
            used.close()

    def exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Exchange:
        """One request and its whole answer. Raises TransportFailed, Cancelled."""

        with self.open(method, target, body, headers, timeout_s=timeout_s) as answer:
            whole = answer.read()
            return Exchange(
                answer.status,
                whole,
                answer.retry_after_s,
                answer.header(INGEST_URL_HEADER),
                answer.header(QUERY_URL_HEADER),
            )

    def open(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Answer:
        """One request, and its answer as far as the head. Raises TransportFailed, Cancelled,
        MalformedRequest."""

        head = self._head(method, target, body, headers)
        kept = self._take()
        if kept is not None:
            try:
                return self._on(kept, method, head, body, timeout_s)
            except TransportFailed as error:
                if not isinstance(
                    error.__cause__, (http.client.RemoteDisconnected, ConnectionError)
                ):
                    raise
        return self._on(self._new(timeout_s), method, head, body, timeout_s)

    def give(self, used: socket.socket, *, keep: bool) -> None:
        if keep:
            with self._lock:
                if len(self._idle) < _IDLE_MAX and not self._closed:
                    self._idle.append(used)
                    return
        used.close()

    def _on(
        self, used: socket.socket, method: str, head: bytes, body: bytes, timeout_s: float
    ) -> Answer:
        scope = SCOPE.get()
        response: http.client.HTTPResponse | None = None
        try:
            used.settimeout(timeout_s)
            if scope is not None:
                scope.enter(functools.partial(_break, used))
            refused = _send(used, head, body)
            response = http.client.HTTPResponse(used, method=method)
            response.begin()
        except _LOST as error:
            _drop(used, response)
            raise _failed(error) from error
        except BaseException:
            _drop(used, response)
            raise
        return Answer(self, used, response, scope, keep=not refused)

    def _head(self, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        lines = [
            f"{method} {self._prefix}{target} HTTP/1.1",
            f"host: {self._named}",
            "accept-encoding: identity",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if body or method != "GET":
            lines.append(f"content-length: {len(body)}")
        if not all(map(_is_plain, lines)) or " " in target:
            raise MalformedRequest("a header or a path may hold visible ASCII characters only")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    def _new(self, timeout_s: float) -> socket.socket:
        within_s = timeout_s if self._connect_s is None else min(timeout_s, self._connect_s)
        try:
            used = socket.create_connection((self._host, self._port), within_s)
            used.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                used = self._tls.wrap_socket(used, server_hostname=self._host)
        except (OSError, UnicodeError) as error:
            raise _failed(error, sent=False) from error
        return used

    def _take(self) -> socket.socket | None:
        with self._lock:
            return self._idle.pop() if self._idle else None


def _send(used: socket.socket, head: bytes, body: bytes) -> bool:
    """True when the server did not want the whole body: it may have answered why all the same."""

    try:
        if len(body) <= _TOGETHER_BYTES_MAX:
            used.sendall(head + body)
        else:
            used.sendall(head)
            used.sendall(body)
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _tls_context() -> Any:
    import ssl  # here, because it takes a while and most are not asked for it

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _failed(error: Exception, *, sent: bool = True, answered: bool = False) -> TransportFailed:
    return TransportFailed(f"{type(error).__name__}: {error}", sent=sent, answered=answered)


def _drop(used: socket.socket, response: http.client.HTTPResponse | None) -> None:
    if response is not None:
        response.close()
    used.close()


def _break(used: socket.socket) -> None:
    """A thread that waits for the connection wakes up."""

    with contextlib.suppress(OSError):  # it is gone already
        used.shutdown(socket.SHUT_RDWR)
