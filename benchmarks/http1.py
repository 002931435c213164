"""A small keep-alive HTTP/1.1 client for load: one connection, one request at a time.

It exists because a general client costs more CPU a request than the server under test. It speaks
only what lakebus answers: a status line, headers, and a body by Content-Length or in chunks.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class Dropped(Exception):
    """The connection ended before the answer did: the outcome is not known."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The problem's code, or "" when the body is no problem document."""

        try:
            return str(self.json().get("code", ""))
        except (ValueError, AttributeError):
            return ""


class Connection:
    """Opens lazily, and again after a drop or when the server ended an idle one. Not for concurrent
    use."""

    def __init__(self, url: str, api_key: str, *, timeout_s: float = 130.0) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._head = f"Host: {self._host}:{self._port}\r\nAuthorization: Bearer {api_key}\r\n"
        self._timeout_s = timeout_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Raises Dropped when no complete answer came within the time."""

        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(method, path, body, headers or {})
        except (
            OSError,
            EOFError,
            TimeoutError,
            ValueError,
            IndexError,
            asyncio.LimitOverrunError,
        ) as error:
            self.close()
            raise Dropped(repr(error)) from error

    async def post_json(
        self, path: str, document: Any, *, headers: dict[str, str] | None = None
    ) -> Answer:
        return await self.request(
            "POST",
            path,
            body=json.dumps(document).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
        )

    async def query(self, sql: str, **options: Any) -> Answer:
        return await self.post_json("/v1/query", {"sql": sql, **options})

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> Answer:
        if self._streams is not None and self._streams[0].at_eof():
            # The server ended it while it was idle. Nothing of this request was sent, so that
            # opening another is no repetition.
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                self._host, self._port, limit=16 * 1024 * 1024
            )
        reader, writer = self._streams
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {path} HTTP/1.1\r\n{self._head}{extra}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        raw = await reader.readuntil(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ", 2)[1])
        found = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            if name:
                found[name.lower()] = value.strip()
        if "content-length" in found:
            content = await reader.readexactly(int(found["content-length"]))
        elif found.get("transfer-encoding") == "chunked":
            content = await _chunks(reader)
        elif status in (204, 304):
            content = b""
        else:
            content = await reader.read()
            self.close()
        if found.get("connection", "").lower() == "close":
            self.close()
        return Answer(status, found, content)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return b"".join(parts)
        parts.append(data[:-2])
