"""One HTTP call as the routes see it: strict about headers and parameters, and how it answers.

What a caller sends is refused rather than guessed: unknown parameters, repeated ones, numbers out
of range, and repeated headers that we act on are `malformed_request` naming the culprit.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from lakebus.clock import format_time, new_id_text, parse_time
from lakebus.errors import (
    LakebusError,
    MalformedIdempotencyKey,
    MalformedRequest,
    UnsupportedMediaType,
)
from storage.ingesting.grants import Principal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]
#: Where a scope may hold a function that gives all of the body, where all of it has come and none
#: was taken, and None elsewhere. Who has the body at once needs no timer for it.
AT_HAND = "lakebus.body_at_hand"

TIMEOUT_MS_DEFAULT = 30_000
TIMEOUT_MS_MAX = 100_000
_PARAMETERS_MAX = 64
#: A longer query string or media type is no client's standing phrase.
_KNOWN_BYTES = 128
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

NOBODY = Principal(0, "", ())


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: a JSON document, or bytes with their media type."""

    document: object = None
    status: int = 200
    headers: tuple[Header, ...] = ()
    body: bytes | None = None
    media_type: bytes = b"application/json"


@dataclass(slots=True)
class Call:
    """One request. `principal` is set by authentication, `path_values` and `route` (its template)
    by routing, `started` and `status` once the first byte of an answer was sent. `echoed`: who runs
    this application puts the id that the request carries into the answer. `direct`: it came through
    the direct door. `refusal`: what it gets unless it is a replay."""

    scope: Scope
    receive: Receive
    send: Send
    arrived_s: float = field(default_factory=time.monotonic)
    request_id: str = ""
    principal: Principal = NOBODY
    path_values: Mapping[str, str] = field(default_factory=dict)
    started: bool = False
    status: int = 0
    route: str = "none"
    echoed: bool = False
    direct: bool = False
    refusal: LakebusError | None = None
    #: Of a header that came more than once, the last; `_repeats`: some did.
    _named: dict[bytes, bytes] = field(init=False, repr=False)
    _repeats: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        headers = self.scope["headers"]
        self._named = dict(headers)
        self._repeats = len(self._named) < len(headers)
        given = self._values(b"x-request-id")
        if given and _REQUEST_ID.fullmatch(text := given[0].decode("latin-1")):
            self.request_id = text
        else:
            self.request_id, self.echoed = new_id_text(), False

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    # --- headers ----------------------------------------------------------------------------

    def header(self, name: bytes) -> str | None:
        """The value of a header that may come once. `name` in lower case. MalformedRequest."""

        value = self._named.get(name)
        if value is None:
            return None
        if self._repeats and len(self._values(name)) > 1:
            raise MalformedRequest(f"the header {name.decode()} may be sent only once")
        return value.decode("latin-1").strip()

    def joined_header(self, name: bytes) -> str | None:
        """The value of a list header, joined as RFC 9110 section 5.3 says."""

        found = self._values(name)
        return ", ".join(value.decode("latin-1").strip() for value in found) if found else None

    def body_at_hand(self) -> bytes | None:
        """All of the body, where it is there without waiting, and is not asked for twice."""

        take: Callable[[], bytes | None] | None = self.scope.get(AT_HAND)
        return None if take is None else take()

    @property
    def keyed(self) -> bool:
        return b"idempotency-key" in self._named

    def _values(self, name: bytes) -> Sequence[bytes]:
        value = self._named.get(name)
        if value is None:
            return ()
        if not self._repeats:
            return (value,)
        return [one for known, one in self.scope["headers"] if known == name]

    def idempotency_key(self) -> str | None:
        """Raises MalformedIdempotencyKey."""

        try:
            text = self.header(b"idempotency-key")
        except MalformedRequest as error:
            raise MalformedIdempotencyKey(error.detail) from None
        if text is not None and not _IDEMPOTENCY_KEY.fullmatch(text):
            raise MalformedIdempotencyKey(
                "Idempotency-Key must have 1 to 255 visible ASCII characters, without spaces"
            )
        return text

    # --- parameters -------------------------------------------------------------------------

    def parameters(self, allowed: Iterable[str]) -> Parameters:
        """The query string, checked against the names of this route. Raises MalformedRequest."""

        query: bytes = self.scope.get("query_string", b"")
        if not query:
            return NO_PARAMETERS
        values: dict[str, list[str]] = {}
        small = len(query) <= _KNOWN_BYTES
        for name, value in (_known_query if small else _parse_query)(query):
            values.setdefault(name, []).append(value)
        names = tuple(allowed)
        for name in values:
            if name not in names:
                known = f"this route knows {', '.join(names)}" if names else "this route has none"
                raise MalformedRequest(f"unknown parameter {name[:80]!r}; {known}")
        return Parameters(values)

    def deadline_s(self, timeout_ms: int) -> float:
        """The end of the budget, by the monotonic clock, counted from arrival."""

        return self.arrived_s + timeout_ms / 1000

    # --- answers ----------------------------------------------------------------------------

    async def start(self, status: int, headers: Sequence[Header]) -> None:
        self.started = True
        self.status = status
        named = [*headers]
        if not self.echoed:
            named.append((b"x-request-id", self.request_id.encode("latin-1")))
        await self.send({"type": "http.response.start", "status": status, "headers": named})

    async def send_part(self, part: bytes | memoryview, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": part, "more_body": more})

    async def answer(self, answer: Answer) -> None:
        body = answer.body
        if body is None:
            body = msgspec.json.encode(answer.document)
        await self.answer_bytes(answer.status, body, answer.media_type, answer.headers)

    async def answer_bytes(
        self, status: int, body: bytes, media_type: bytes, headers: Sequence[Header] = ()
    ) -> None:
        length = b"%d" % len(body)
        await self.start(
            status, [(b"content-type", media_type), (b"content-length", length), *headers]
        )
        await self.send_part(b"" if self.method == "HEAD" else body, more=False)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Checked names, text values; each reader raises MalformedRequest with the name."""

    values: Mapping[str, Sequence[str]]

    def many(self, name: str) -> Sequence[str]:
        return self.values.get(name, ())

    def text(self, name: str) -> str | None:
        given = self.values.get(name)
        if given is None:
            return None
        if len(given) > 1:
            raise MalformedRequest(f"the parameter {name} may be given only once")
        return given[0]

    def integer(self, name: str, *, low: int, high: int, default: int) -> int:
        found = self.optional_integer(name, low=low, high=high)
        return default if found is None else found

    def optional_integer(self, name: str, *, low: int, high: int) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise MalformedRequest(f"the parameter {name} must be a whole number, {low} to {high}")
        return int(text)

    def boolean(self, name: str, *, default: bool = False) -> bool:
        text = self.text(name)
        if text is None:
            return default
        if text not in ("true", "false"):
            raise MalformedRequest(f"the parameter {name} must be true or false")
        return text == "true"

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        text = self.text(name)
        if text is None:
            return default
        if text not in choices:
            raise MalformedRequest(f"the parameter {name} must be one of {', '.join(choices)}")
        return text

    def timeout_ms(self, *, low: int = 1, default: int = TIMEOUT_MS_DEFAULT) -> int:
        return self.integer("timeout_ms", low=low, high=TIMEOUT_MS_MAX, default=default)


NO_PARAMETERS = Parameters({})


def _parse_query(query: bytes) -> Sequence[tuple[str, str]]:
    if b"%00" in query:
        raise MalformedRequest("the query string holds the character NUL, which no value here has")
    try:
        found = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_PARAMETERS_MAX,
        )
        return tuple(found)
    except ValueError:
        raise MalformedRequest(
            "the query string cannot be read: write name=value pairs joined by &, in UTF-8 with "
            f"percent-encoding, at most {_PARAMETERS_MAX} of them"
        ) from None


#: Clients say the same again and again, and reading it is a tenth of what a small request costs.
_known_query = functools.lru_cache(maxsize=512)(_parse_query)


def media_type_of(call: Call, supported: Sequence[str]) -> str:
    """The request's media type without parameters, in lower case. Raises UnsupportedMediaType."""

    text = call.header(b"content-type") or ""
    small = len(text) <= _KNOWN_BYTES
    return (_known_media_type if small else _read_media_type)(text, tuple(supported))


def _read_media_type(text: str, supported: Sequence[str]) -> str:
    kind, _, rest = text.partition(";")
    kind = kind.strip().lower()
    if kind not in supported:
        named = f"the media type {kind[:80]!r} is" if kind else "a body without Content-Type is"
        raise UnsupportedMediaType(
            f"{named} not supported here; use {', '.join(supported)}", supported=list(supported)
        )
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", rest, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType("bodies are UTF-8; convert the body", supported=list(supported))
    if kind == "text/csv" and re.search(r"header\s*=\s*\"?absent", rest, re.IGNORECASE):
        raise UnsupportedMediaType(
            "CSV needs a header line, because columns are found by their names",
            supported=list(supported),
        )
    return kind


#: What is refused is not kept.
_known_media_type = functools.lru_cache(maxsize=512)(_read_media_type)


def time_of(text: str, name: str) -> Any:
    """A time that a caller gave. Raises MalformedRequest naming it."""

    try:
        return parse_time(text)
    except (ValueError, OverflowError) as error:
        raise MalformedRequest(
            f"{name} must be an RFC 3339 time with a zone, like 2026-01-31T12:00:00Z, no finer "
            f"than microseconds ({str(error)[:120]})"
        ) from None


def time_text(value: Any) -> str | None:
    return None if value is None else format_time(value)
