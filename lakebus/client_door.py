"""The client's way to the direct door: used for rows when it is known and answers, by itself.

Answers of Serve's route tell a client the address of the direct door, where one is open that this
client can reach by what the server knows. Before the first use, and again after each failure, the
door is asked who it is, without the key and for half a second at most: an address that leads
nowhere costs that once in a while, and one that leads to a stranger never sees the key. A door
that fails rests, longer each time, and rows go through Serve's route meanwhile, which always works.

Going on by the other way is safe, because all rows carry an idempotency key (contract A3, A6).
"""

from __future__ import annotations

import json
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from lakebus.client_http import SCOPE, Connections, Exchange, Reply, TransportFailed, Way
from lakebus.errors import MalformedRequest

#: The id, in what the door says of itself.
DOOR_HEADER = "lakebus-door"
CONNECT_S = 1.0
_ASK_S = 0.5
_REST_S, _REST_S_MAX = 5.0, 600.0
_Got = TypeVar("_Got", Exchange, Reply)
_TOLD = re.compile(r"(https?://[!-:<-~]+); ?door=([0-9a-f]{8,64})")


class Door:
    """What is known of one server's direct door. May be used by several threads.

    `given`: its address, where the caller knows it; then nothing is learned. The server's own
    address as `given` means that the direct door is not to be used.
    """

    def __init__(
        self, url: str, given: str | None = None, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        if given is not None:
            Connections(given)  # raises MalformedRequest now and not at the first rows
        self._secure = urlsplit(url).scheme == "https"
        self._fixed = given is not None
        self._url = None if given is None or given.rstrip("/") == url.rstrip("/") else given
        self._id: str | None = None
        self._now_s = now_s
        self._lock = threading.Lock()
        self._open = False
        self._rest_s = _REST_S
        self._rest_until_s = 0.0

    def url(self) -> str | None:
        """Where rows go now; None: through Serve's route."""

        url = self._url
        if self._open or url is None:
            return url
        if self._now_s() < self._rest_until_s or not self._lock.acquire(blocking=False):
            return None  # it rests, or another thread is asking it
        try:
            if self._is_the_one(url):
                self._open, self._rest_s = True, _REST_S
                return url
            self._rest()
            return None
        finally:
            self._lock.release()

    def learn(self, told: str | None) -> None:
        """`told`: the header of an answer of Serve's route."""

        found = None if told is None or self._fixed else _TOLD.fullmatch(told)
        if found is None or (self._secure and not found[1].startswith("https:")):
            return  # a key that came by TLS goes by TLS
        if (found[1], found[2]) != (self._url, self._id):
            try:
                Connections(found[1])
            except MalformedRequest:  # not the caller's mistake
                return
            self._url, self._id = found[1], found[2]
            self._open, self._rest_s, self._rest_until_s = False, _REST_S, 0.0

    def failed(self) -> None:
        with self._lock:
            if self._open:
                self._rest()

    def _rest(self) -> None:
        self._open = False
        self._rest_until_s = self._now_s() + self._rest_s
        self._rest_s = min(_REST_S_MAX, self._rest_s * 2)

    def _is_the_one(self, url: str) -> bool:
        connections = Connections(url, connect_s=_ASK_S)
        try:
            with connections.open("GET", "/healthz", b"", {}, timeout_s=_ASK_S) as answer:
                known = self._id is None or answer.header(DOOR_HEADER) == self._id
                return known and answer.status == 200
        except TransportFailed:
            return False
        finally:
            connections.close()


class DirectWay(ABC):
    """By a direct door while it answers, or else the way of all calls. What is believed of a door's
    answers, and what the usual way tells of the door, is its kind's."""

    def __init__(self, usual: Way, door: Door) -> None:
        self._usual = usual
        self._door = door
        self._direct: tuple[str, Connections] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """The direct connections; the usual ones are their owner's."""

        with self._lock:
            self._closed = True
            direct, self._direct = self._direct, None
        if direct is not None:
            direct[1].close()

    def exchange(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float
    ) -> Exchange:
        """One request and its whole answer. Raises TransportFailed, Cancelled."""

        def direct(connections: Connections) -> Exchange | None:
            found = connections.exchange(method, target, body, headers, timeout_s=timeout_s)
            return None if self._is_elsewhere(found.status, found.body) else found

        until_s = time.monotonic() + timeout_s
        answer = self._by_door(direct, until_s)
        if answer is None:
            left = left_s(until_s)
            answer = self._usual.exchange(method, target, body, headers, timeout_s=left)
            self._door.learn(self._told(answer))
        return answer

    @abstractmethod
    def _is_elsewhere(self, status: int, body: bytes) -> bool:
        """Whether what answered at the door's address is not to be believed: it ends, is another
        lake's, or is no lakebus at all. The usual way then says what is true."""

    @abstractmethod
    def _told(self, answer: Exchange) -> str | None:
        """The header that tells the door."""

    def _by_door(self, send: Callable[[Connections], _Got | None], until_s: float) -> _Got | None:
        """What `send` gets there. None: there is no door now, or its answer is not believed, and
        there is time for the other way. Raises TransportFailed, Cancelled."""

        url = self._door.url()
        if url is None:
            return None
        try:
            answer = send(self._connections(url))
        except TransportFailed:
            self._door.failed()
            scope = SCOPE.get()
            if scope is not None:
                scope.check()
            if time.monotonic() >= until_s:
                raise
            return None
        if answer is None:
            self._door.failed()
        return answer

    def _connections(self, url: str) -> Connections:
        with self._lock:
            if self._closed:
                raise MalformedRequest("the client is closed: make a new one")
            old = self._direct
            if old is not None and old[0] == url:
                return old[1]
            made = Connections(url, connect_s=CONNECT_S)
            self._direct = (url, made)
        if old is not None:
            old[1].close()
        return made


class IngestWay(DirectWay):
    """How rows are sent. Each is sent again by the other way, with its key."""

    def _is_elsewhere(self, status: int, body: bytes) -> bool:
        return is_elsewhere(status, body)

    def _told(self, answer: Exchange) -> str | None:
        return answer.ingest_url


def left_s(until_s: float) -> float:
    """What is left of a call's time for another way."""

    return max(0.001, until_s - time.monotonic())


def is_elsewhere(status: int, body: bytes) -> bool:
    """Of what answers to rows: their key makes asking twice safe, so doubts go the other way."""

    if status < 400:
        return False
    if status == 401 or status >= 500:
        return True
    try:
        return not isinstance(json.loads(body)["code"], str)
    except (ValueError, KeyError, TypeError):
        return True
