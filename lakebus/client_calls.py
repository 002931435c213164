"""How the client makes a call: its budget, its retries, and the typed error that it ends in.

Everything sent here is safe to repeat: reads are, and writes carry an idempotency key and the time
of their first attempt (contract A3, A6, A13). Only what an error calls retryable is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlencode

from lakebus import errors
from lakebus.client_door import DirectWay, Door, IngestWay
from lakebus.client_errors import AnswerTruncated, package_missing
from lakebus.client_forms import (
    JSON,
    document_of,
    error_of,
    json_text,
    milliseconds,
    pause_after_s,
    unreached,
    write_headers,
)
from lakebus.client_http import SCOPE, Connections, Exchange, Reply, TransportFailed, Way
from lakebus.client_query_door import QueryWay, VisibilityWay
from lakebus.client_ray_calls import RAY

TIMEOUT_S = 30.0
#: Beyond the server's own deadline, for the way there and back.
_GRACE_S = 2.0

_Got = TypeVar("_Got", Exchange, Reply)


class Calls:
    """One server and one key. `timeout_s` is the budget of one call, retries included;
    `ingest_url` and `query_url` the direct doors for rows (and waiting for them) and for SQL, which
    are learned from the server unless given."""

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout_s: float = TIMEOUT_S,
        ingest_url: str | None = None,
        query_url: str | None = None,
    ) -> None:
        self.url = url
        self._ingest_url, self._query_url = ingest_url, query_url
        self._connections: Way = _ray() if url == RAY else Connections(url)
        self._direct: IngestWay | None = None
        self._direct_wait: VisibilityWay | None = None
        self._direct_sql: QueryWay | None = None
        #: What is known of the direct door for rows; None on a Ray cluster.
        self.door = Door(url, ingest_url) if url != RAY else None
        if self.door is not None:
            self._direct = IngestWay(self._connections, self.door)
            self._direct_wait = VisibilityWay(self._connections, self.door)
            self._direct_sql = QueryWay(self._connections, Door(url, query_url))
        if not (api_key and api_key.isascii() and api_key.isprintable()):
            raise errors.MalformedRequest("an API key is visible ASCII text, as it was given out")
        self._authorization = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    def close(self) -> None:
        self._connections.close()
        for way in (self._direct, self._direct_wait, self._direct_sql):
            if way is not None:
                way.close()

    def _write(
        self, method: str, path: str, document: object, *, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        headers = write_headers(None) | dict(headers or {})
        body = b""
        if document is not None:
            headers["content-type"], body = JSON, json_text(document)
        return document_of(self._call(method, path, body=body, headers=headers))

    def _read(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        document: object = None,
        timeout_s: float | None = None,
        visibility: bool = False,
    ) -> dict[str, Any]:
        headers = {} if document is None else {"content-type": JSON}
        body = b"" if document is None else json_text(document)
        return document_of(
            self._call(
                method,
                path,
                query=query,
                body=body,
                headers=headers,
                timeout_s=timeout_s,
                visibility=visibility,
            )
        )

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
        headers: Mapping[str, str],
        timeout_s: float | None = None,
        ingest: bool = False,
        visibility: bool = False,
        sql: bool = False,
    ) -> Exchange:
        """One call with its retries, and its whole answer. Raises the typed error of the last.
        `ingest`, `visibility` or `sql`: it is rows, a wait for them or SQL, which take a direct
        door where there is one."""

        direct: DirectWay | None = None
        if ingest or visibility:
            direct = self._direct if ingest else self._direct_wait
        elif sql:
            direct = self._direct_sql
        send = self._connections.exchange if direct is None else direct.exchange
        return self._tried(send, method, path, query, body, headers, timeout_s)

    def _open(
        self,
        method: str,
        path: str,
        *,
        body: bytes,
        headers: Mapping[str, str],
        timeout_s: float,
        sql: bool,
    ) -> Reply:
        """The same for an answer that is read piece by piece; only its head can be retried."""

        way = self._direct_sql if sql and self._direct_sql is not None else self._connections
        return self._tried(way.open, method, path, None, body, headers, timeout_s)

    def _tried(
        self,
        send: Callable[..., _Got],
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: bytes,
        headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> _Got:
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        named = {"authorization": self._authorization, **headers}
        attempt = 0
        while True:
            left_s = max(0.001, deadline_s - time.monotonic())
            target = path
            if query is not None:
                asked = {"timeout_ms": str(milliseconds(left_s)), **query}
                target = f"{path}?{urlencode(asked)}"
            failure: errors.LakebusError
            try:
                answer = send(method, target, body, named, timeout_s=left_s + _GRACE_S)
                if answer.status < 400:
                    return answer
                failure = error_of(_whole(answer))
            except TransportFailed as error:
                _check_not_cancelled()
                failure = unreached(error, keyed="idempotency-key" in named)
            pause_s = pause_after_s(failure, attempt)
            # An answer that always breaks off would be asked for again and again.
            tried = isinstance(failure, AnswerTruncated) and attempt > 0
            if not failure.retryable or tried or time.monotonic() + pause_s >= deadline_s:
                raise failure
            attempt += 1
            _pause(pause_s)


def _ray() -> Way:
    """The way inside a Ray cluster. Raises PackageMissing, MalformedRequest outside of one."""

    try:
        from lakebus.client_ray import RayConnections  # here, because Ray is imported with it
    except ImportError:
        raise package_missing("ray[serve]", 'connect("ray")') from None
    return RayConnections()


def _whole(answer: Exchange | Reply) -> Exchange:
    """Raises TransportFailed."""

    if isinstance(answer, Exchange):
        return answer
    with answer:
        return Exchange(answer.status, bytes(answer.read()), answer.retry_after_s)


def _check_not_cancelled() -> None:
    scope = SCOPE.get()
    if scope is not None:
        scope.check()


def _pause(seconds: float) -> None:
    scope = SCOPE.get()
    if scope is None:
        time.sleep(seconds)
    else:
        scope.cancelled.wait(seconds)
        scope.check()
