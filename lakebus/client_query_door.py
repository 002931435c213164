"""The client's ways to the direct doors for what is asked: as `lakebus.client_door` for rows.

SQL has a door of its own; waiting for rows uses the one that the rows took. A query or a wait
changes nothing, so whatever the door leaves open may be asked again by Serve's route: it
reads the same snapshot if one is named, and a newer one otherwise. What the door says of the query
itself (wrong SQL, no such table, no time left) is the answer, like everything that is not a sign of
the door's own end. Of an answer that is read piece by piece only the head can be asked for again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from lakebus.client_door import DirectWay, left_s
from lakebus.client_http import QUERY_URL_HEADER, Connections, Exchange, Reply


class QueryWay(DirectWay):
    """How SQL is sent."""

    def open(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Reply:
        """One request, and its answer as far as the head. Raises as `Connections.open`."""

        def direct(connections: Connections) -> Reply | None:
            found = connections.open(method, target, body, headers, timeout_s=timeout_s)
            if found.status < 400:
                return found
            refusal = Refusal(found)
            return None if self._is_elsewhere(refusal.status, refusal.body) else refusal

        until_s = time.monotonic() + timeout_s
        answer = self._by_door(direct, until_s)
        if answer is None:
            answer = self._usual.open(method, target, body, headers, timeout_s=left_s(until_s))
            self._door.learn(answer.header(QUERY_URL_HEADER))
        return answer

    def _is_elsewhere(self, status: int, body: bytes) -> bool:
        return is_elsewhere(status, body)

    def _told(self, answer: Exchange) -> str | None:
        return answer.query_url


class VisibilityWay(DirectWay):
    """How a client waits for rows: by the door that it writes through, once it knows that."""

    def _is_elsewhere(self, status: int, body: bytes) -> bool:
        return is_elsewhere(status, body)

    def _told(self, answer: Exchange) -> str | None:
        return answer.ingest_url


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
    """Of what answers to SQL and waits: the door ends or starts, is another lake's, or is no
    lakebus. What it says of the query or wait itself is believed, or one without time left would
    run twice, and a wait that ran out would send rows the other way."""

    if status < 400:
        return False
    if status == 401:
        return True
    try:
        code = json.loads(body)["code"]
    except (ValueError, KeyError, TypeError):
        return True
    return not isinstance(code, str) or code == "unavailable"
