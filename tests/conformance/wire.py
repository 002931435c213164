"""A wire that can fail: a TCP proxy between one process and its database.

It loses a reply (the database did the work, nobody hears of it) or holds a request (the process
was paused half way through sending it). Both are what a network and a scheduler really do, and
both can be made at an exact place here, without a pause of the test itself.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

_CHUNK = 256 * 1024


@dataclass(slots=True, eq=False)
class _Link:
    """One connection through the proxy; `sent` counts chunks of requests since the pause began."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    sent: int = 0


@dataclass(slots=True)
class Wire:
    """`pause` lets so many chunks of each connection pass, then all but the last
    `withhold_bytes` of one more, then nothing."""

    host: str
    port: int
    _server: asyncio.Server | None = None
    _links: set[_Link] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _lose_reply: bool = False
    _paused: tuple[int, int] | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> int:
        """Listens on a free local port and returns it."""

        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Cuts every connection."""

        assert self._server is not None
        self._server.close()
        for link in tuple(self._links):
            _cut(link)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose_next_reply(self) -> None:
        """The next bytes from the database vanish, and their connection with them."""

        self._lose_reply = True
        self.lost.clear()

    def pause(self, *, chunks: int, withhold_bytes: int) -> None:
        for link in self._links:
            link.sent = 0
        self._paused = (chunks, withhold_bytes)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            back_reader, back_writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.close()
            return
        link = _Link(writer, back_writer)
        self._links.add(link)
        try:
            await asyncio.gather(self._requests(reader, link), self._replies(back_reader, link))
        except (ConnectionError, asyncio.CancelledError):
            pass  # an end like any other: the finally cuts both sides
        finally:
            self._links.discard(link)
            _cut(link)

    async def _requests(self, reader: asyncio.StreamReader, link: _Link) -> None:
        while data := await reader.read(_CHUNK):
            data = self._held_back(link, data)
            if data:
                link.server.write(data)
                await link.server.drain()
        _cut(link)

    def _held_back(self, link: _Link, data: bytes) -> bytes:
        if self._paused is None:
            return data
        chunks, withhold_bytes = self._paused
        link.sent += 1
        if link.sent <= chunks:
            return data
        return data[:-withhold_bytes] if link.sent == chunks + 1 else b""

    async def _replies(self, reader: asyncio.StreamReader, link: _Link) -> None:
        while data := await reader.read(_CHUNK):
            if self._lose_reply:
                self._lose_reply = False
                self.lost.set()
                _cut(link)
                return
            link.client.write(data)
            await link.client.drain()
        _cut(link)


def _cut(link: _Link) -> None:
    for side in (link.client, link.server):
        with suppress(OSError, RuntimeError):
            side.transport.abort()
