"""The client's way to the direct door for queries: as `lakebus.client_door`, for what is asked.

A query changes nothing, so whatever the door leaves open may be asked again by Serve's route: it
reads the same snapshot if one is named, and a newer one otherwise. What the door says of the query
itself (wrong SQL, no such table, no time left) is the answer, like everything that is not a sign of
the door's own end. Of an answer that is read piece by piece only the head can be asked for again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from lakebus.client_door import IngestWay
from lakebus.client_http import QUERY_URL_HEADER, Exchange, Reply, TransportFailed


class QueryWay(IngestWay):
    """How SQL is sent: by the direct door while it answers, or else the way of all calls."""

    def open(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Reply:
        """One request, and its answer as far as the head. Raises as `Connections.open`."""

        until_s = time.monotonic() + timeout_s
        url = self._door.url()
        if url is not None:
            try:
                answer: Reply = self._connections(url).open(
                    method, target, body, headers, timeout_s=timeout_s
                )
                if answer.status < 400:
                    return answer
                refusal = Refusal(answer)
                if not self._is_elsewhere(refusal.status, refusal.body):
                    return refusal
            except TransportFailed:
                if self._given_up(until_s):
                    raise
            else:
                self._door.failed()
        left_s = max(0.001, until_s - time.monotonic())
        answer = self._usual.open(method, target, body, headers, timeout_s=left_s)
        self._door.learn(answer.header(QUERY_URL_HEADER))
        return answer

    def _is_elsewhere(self, status: int, body: bytes) -> bool:
        return is_elsewhere(status, body)

    def _told(self, answer: Exchange) -> str | None:
        return answer.query_url


class Refusal(Reply):
    """An answer that was read to its end to see whose it is."""

    def __init__(self, answer: Reply) -> None:
        with answer:
            self.status = answer.status
            self.body = bytes(answer.read())
            self._retry_after = answer.header("retry-after")

    def header(self, name: str) -> str | None:
        return self._retry_after if name == "retry-after" else None

    def read(self, size: int = -1) -> bytes:
        taken, self.body = (self.body, b"") if size < 0 else (self.body[:size], self.body[size:])
        return taken

    def close(self) -> None:
        return


def is_elsewhere(status: int, body: bytes) -> bool:
    """Whether what answered at the door's address is not to be believed: it ends or starts, is
    another lake's, or is no lakebus at all. The usual way then says what is true."""

    if status < 400:
        return False
    if status == 401:
        return True
    try:
        code = json.loads(body)["code"]
    except (ValueError, KeyError, TypeError):
        return True
    return not isinstance(code, str) or code == "unavailable"
