"""HTTP calls of the commands: what the Python client has no method for, and answers in a stream.

`Api.client` is the Python client for everything that it has. The calls here follow its rules:
everything sent is safe to repeat (reads are, and writes carry a key), so what is retryable is tried
again until the time is up, and errors are those of `lakebus.errors`.

An answer in a stream is tried again only until its first byte has come; a connection that breaks
later is an error, never a shorter answer (contract D9).
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from lakebus import errors
from lakebus.client import Client, connect
from lakebus.client_door import CONNECT_S, Door
from lakebus.client_forms import pause_after_s, write_headers
from lakebus.client_http import INGEST_URL_HEADER, QUERY_URL_HEADER

JSON = "application/json"
#: Beyond the server's own deadline, for the way there and back.
_GRACE_S = 2.0
#: One attempt waits so long on the server, at most: longer than that it takes no request.
_ATTEMPT_S = 100.0
_READ_BYTES = 256 * 1024
_MEMBERS = frozenset({"type", "title", "status", "detail", "code", "retryable"})
#: Depth first: a class comes after the group whose code it shares, and stays.
_BY_CODE = {kind.code: kind for kind in errors.all_errors()}


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer that is still coming. `parts` raises Unavailable when the connection breaks before
    the end."""

    headers: Mapping[str, str]
    parts: Iterator[bytes]


class Api:
    """One server. May be used by several threads; each has a connection of its own."""

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout_s: float,
        ingest_url: str | None = None,
        query_url: str | None = None,
    ) -> None:
        self.client: Client = connect(
            url, api_key, timeout_s=timeout_s, ingest_url=ingest_url, query_url=query_url
        )
        self.url = url
        # What one of them learns, the other knows: the client waits where rows went.
        self._door = self.client.door or Door(url, ingest_url)
        self._query_door = Door(url, query_url)
        self.timeout_s = timeout_s
        self._authorization = f"Bearer {api_key}"
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = False

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections, self._open = self._open, set()
        for connection in connections:
            connection.close()
        self.client.close()

    def stop(self) -> None:
        """Ends the calls of all threads: they raise Cancelled."""

        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                with suppress(OSError):  # who reads from it wakes up
                    sock.shutdown(socket.SHUT_RDWR)

    # --- calls ------------------------------------------------------------------------------

    def get(
        self,
        path: str,
        query: Mapping[str, str | None] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Raises the typed error of the answer."""

        return self.send("GET", path, query=query, timeout_s=timeout_s)

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | None] | None = None,
        document: object = None,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
        timed: bool = False,
        ingest: bool = False,
    ) -> dict[str, Any]:
        """One call with its retries; the answer's document. `timed` tells the server how long it
        may take; `ingest`: it is rows, which take the direct door while it answers. Raises the
        typed error of the last answer."""

        named = dict(headers or {})
        if document is not None:
            named["content-type"], body = JSON, json.dumps(document).encode()
        if method != "GET":
            named = {**write_headers(key or None), **named}
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while True:
            direct = self._door.url() if ingest else None
            try:
                return self._once(method, path, query, body, named, deadline_s, timed, direct)
            except errors.LakebusError as error:
                if direct is not None and _is_elsewhere(error):
                    self._door.failed()
                    if time.monotonic() < deadline_s and not self._closed:
                        continue  # at once, by the url; the key makes it the same request
                pause_s = pause_after_s(error, attempt)
                if not error.retryable or time.monotonic() + pause_s >= deadline_s:
                    raise
            attempt += 1
            time.sleep(pause_s)

    @contextmanager
    def stream(
        self, path: str, document: object, *, accept: str, timeout_s: float | None = None
    ) -> Iterator[Streamed]:
        """SQL, by the direct door for queries while it answers, and its answer as it comes."""

        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        headers = {"content-type": JSON, "accept": accept}
        body = json.dumps(document).encode()
        attempt = 0
        while True:
            direct = self._query_door.url()
            try:
                answer = self._answer("POST", path, body, headers, deadline_s, direct)
                break
            except errors.LakebusError as error:
                if direct is not None and _is_elsewhere(error):
                    self._query_door.failed()
                    if time.monotonic() < deadline_s and not self._closed:
                        continue  # at once, by the url: it changes nothing
                pause_s = pause_after_s(error, attempt)
                if not error.retryable or time.monotonic() + pause_s >= deadline_s:
                    raise
            attempt += 1
            time.sleep(pause_s)
        told = {name.lower(): value for name, value in answer.getheaders()}
        if direct is None:
            self._query_door.learn(told.get(QUERY_URL_HEADER))
        ended = False
        try:
            yield Streamed(told, _parts_of(answer))
            ended = answer.isclosed()
        finally:
            if not ended:  # closing the connection is what cancels the query
                self._drop()

    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | None] | None,
        body: bytes,
        headers: Mapping[str, str],
        deadline_s: float,
        timed: bool,
        direct: str | None,
    ) -> dict[str, Any]:
        asked = {name: value for name, value in (query or {}).items() if value is not None}
        if timed:
            left_s = min(_ATTEMPT_S, max(0.001, deadline_s - time.monotonic()))
            asked["timeout_ms"] = str(max(1, round(left_s * 1000)))
        target = f"{path}?{urlencode(asked)}" if asked else path
        answer = self._answer(method, target, body, headers, deadline_s, direct)
        if direct is None:
            self._door.learn(answer.getheader(INGEST_URL_HEADER))
        try:
            found: dict[str, Any] = json.loads(answer.read())
        except ValueError:
            raise errors.LakebusError("what answered is no lakebus server: look at --url") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error, sent=True, keyed=method != "GET") from error
        return found

    def _answer(
        self,
        method: str,
        target: str,
        body: bytes,
        headers: Mapping[str, str],
        deadline_s: float,
        direct: str | None = None,
    ) -> http.client.HTTPResponse:
        """The head of a successful answer; its body is to be read. Raises the typed error."""

        if self._closed:
            raise errors.Cancelled("interrupted")
        keyed = "idempotency-key" in headers
        named = {"authorization": self._authorization, **headers}
        left_s = min(_ATTEMPT_S, max(0.001, deadline_s - time.monotonic())) + _GRACE_S
        for fresh in (False, True):
            connection, kept = self._connection(direct or self.url, left_s, fresh=fresh)
            sent = False
            try:
                if connection.sock is None:
                    connection.connect()
                connection.sock.settimeout(left_s)
                sent = True
                prefix = urlsplit(direct or self.url).path.rstrip("/")
                connection.request(method, prefix + target, body, named)
                answer = connection.getresponse()
                if answer.status >= 400:
                    raise _error_of(answer, answer.read())
            except (http.client.RemoteDisconnected, ConnectionError) as error:
                self._drop()
                if kept and not fresh and not self._closed:
                    continue  # the server had closed a kept connection: once more, on a new one
                raise self._failed(error, sent=sent, keyed=keyed) from error
            except (OSError, http.client.HTTPException) as error:
                raise self._failed(error, sent=sent, keyed=keyed) from error
            return answer
        raise AssertionError("the second connection is never a kept one")

    def _failed(self, error: Exception, *, sent: bool, keyed: bool) -> errors.LakebusError:
        self._drop()
        if self._closed:
            return errors.Cancelled("interrupted")
        why = f"{type(error).__name__}: {error}"
        if sent and keyed:
            return errors.OutcomeUnknown(f"the connection failed after the request was sent: {why}")
        return errors.Unavailable(f"the server at {self.url} cannot be reached: {why}")

    # --- connections ------------------------------------------------------------------------

    def _connection(
        self, url: str, timeout_s: float, *, fresh: bool
    ) -> tuple[http.client.HTTPConnection, bool]:
        """(the connection of this thread to the url, whether it was used before)."""

        known: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        if known is not None and self._mine.url != url:
            self._drop()
        elif known is not None and not fresh:
            return known, True
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        within_s = timeout_s if url == self.url else min(timeout_s, CONNECT_S)
        made = kind(parts.hostname or "", parts.port, timeout=within_s)
        self._mine.connection, self._mine.url = made, url
        with self._lock:
            self._open.add(made)
        return made, False

    def _drop(self) -> None:
        connection: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        self._mine.connection = None
        if connection is not None:
            connection.close()
            with self._lock:
                self._open.discard(connection)


def _parts_of(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while part := answer.read1(_READ_BYTES):
            yield part
        if answer.length:  # a length was told, and less came
            raise http.client.IncompleteRead(b"", answer.length)
        # Chunked: the end mark has been read, or read1 has raised.
        answer.close()
    except (OSError, http.client.HTTPException) as error:
        raise errors.Unavailable(
            f"the answer broke off before its end, so it is not whole: {type(error).__name__}"
        ) from error


def _is_elsewhere(error: errors.LakebusError) -> bool:
    """What an answer, or none, of the direct door leaves open, and the url's answer settles."""

    if isinstance(error, (errors.Unauthenticated, errors.Unavailable, errors.OutcomeUnknown)):
        return True
    return type(error) is errors.LakebusError  # no answer of lakebus


def _error_of(answer: http.client.HTTPResponse, body: bytes) -> errors.LakebusError:
    """The typed error of an answer; one that is not ours comes from something in between."""

    text = answer.getheader("retry-after")
    retry_after_s = float(text) if text is not None and text.isdecimal() else None
    try:
        document = json.loads(body)
        kind = _BY_CODE[document["code"]]
    except (ValueError, KeyError, TypeError):
        status = answer.status
        if status >= 500 or status in (404, 408, 429):  # a balancer whose server is starting
            return errors.Unavailable(
                f"what is at --url answered {status}, and is not (yet) a lakebus server",
                retry_after_s=retry_after_s,
            )
        return errors.LakebusError(
            f"the server answered {status} in a form that is not known: look at --url"
        )
    members = {name: value for name, value in document.items() if name not in _MEMBERS}
    error = kind(document["detail"], retry_after_s=retry_after_s, **members)
    error.retryable = bool(document["retryable"])  # type: ignore[misc]
    return error
