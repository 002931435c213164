"""Connections of the client: kept alive, shared by threads, and honest about how they failed."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from lakebus.errors import MalformedRequest

_IDLE_MAX = 32


class TransportFailed(Exception):
    """No answer. `sent`: the request may have reached the server."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


@dataclass(frozen=True, slots=True)
class Exchange:
    status: int
    body: bytes
    retry_after_s: float | None


class Connections:
    """Idle connections to one server. A kept connection that the server has closed meanwhile is
    replaced once by a new one, and only if it failed before anything of the answer came."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise MalformedRequest(f"{url!r} is not the address of a server, like http://host:8350")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._prefix = parts.path.rstrip("/")
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Exchange:
        """One request and its whole answer. Raises TransportFailed."""

        kept = self._take()
        if kept is not None:
            try:
                return self._on(kept, method, target, body, headers, timeout_s)
            except TransportFailed as error:
                if not isinstance(
                    error.__cause__, (http.client.RemoteDisconnected, ConnectionError)
                ):
                    raise
        return self._on(self._new(timeout_s), method, target, body, headers, timeout_s)

    def _on(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        body: bytes,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> Exchange:
        sent = False
        try:
            connection.timeout = timeout_s
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(timeout_s)
            sent = True
            connection.request(method, self._prefix + target, body=body, headers=dict(headers))
            answer = connection.getresponse()
            whole = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise TransportFailed(f"{type(error).__name__}: {error}", sent=sent) from error
        if answer.will_close:
            connection.close()
        else:
            self._give(connection)
        return Exchange(answer.status, whole, _seconds(answer.getheader("retry-after")))

    def _new(self, timeout_s: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=timeout_s)

    def _take(self) -> http.client.HTTPConnection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < _IDLE_MAX:
                self._idle.append(connection)
                return
        connection.close()


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None
