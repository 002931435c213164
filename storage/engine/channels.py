"""The parent's end of one socket to the child: frames in, frames out, with backpressure.

When the reader of an answer is slow, received frames pile up to a mark, then the socket is not read
any more, the child's send blocks, and only that lane stops.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from storage.engine.wire import DATA, END, ERROR, FRAME_BYTES_MAX, HEAD

_BUFFER_BYTES = 256 * 1024
_PAUSE_BYTES = 2 << 20
_RESUME_BYTES = 512 * 1024


class ChildDied(Exception):
    """The child closed the socket: it died, or was killed. Internal to the engine."""


class Channel(asyncio.BufferedProtocol):
    """Frames in order. One reader at a time. `idle`: no answer is under way."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self.sequence = 0
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._frames: deque[tuple[int, bytes]] = deque()
        self._queued_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._lost = False
        self._paused = False
        self._discarding = False
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0
        self._large: tuple[int, memoryview] | None = None
        self._large_filled = 0

    @classmethod
    async def open(cls, end: socket.socket, on_lost: Callable[[], None]) -> Channel:
        """Takes over `end`."""

        loop = asyncio.get_running_loop()
        end.setblocking(False)
        _, channel = await loop.create_unix_connection(lambda: cls(on_lost), sock=end)
        return channel

    # --- use -----------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Raises ChildDied."""

        if self._lost or self._transport is None:
            raise ChildDied
        self._transport.write(data)

    def begin(self, data: bytes) -> None:
        """Sends a request whose answer ends with END or ERROR."""

        self.idle.clear()
        self._discarding = False
        self.send(data)

    async def next_frame(self) -> tuple[int, bytes]:
        """The next frame. Frames that arrived before the child died are still given."""

        while not self._frames:
            if self._lost:
                raise ChildDied
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        kind, payload = self._frames.popleft()
        self._queued_bytes -= len(payload)
        if self._paused and self._queued_bytes <= _RESUME_BYTES:
            self._resume()
        return kind, payload

    def fail_reader(self, error: Exception) -> None:
        """Wakes whoever waits for a frame, with `error`."""

        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def discard(self) -> None:
        """Drops what has come and what will come until the answer's end."""

        self._discarding = True
        self._frames.clear()
        self._queued_bytes = 0
        if self._paused:
            self._resume()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's side ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self.idle.set()
        self._wake()
        self._on_lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is not None:
            return self._large[1][self._large_filled :]
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is not None:
            self._large_filled += nbytes
            kind, whole = self._large
            if self._large_filled == len(whole):
                self._large = None
                self._deliver(kind, bytes(whole))
        else:
            self._filled += nbytes
            self._split()
        if self._frames:
            self._wake()

    def _split(self) -> None:
        at = 0
        while self._filled - at >= HEAD.size:
            length, kind = HEAD.unpack_from(self._buffer, at)
            begin, end = at + HEAD.size, at + HEAD.size + length
            if end <= self._filled:
                self._deliver(kind, bytes(self._buffer[begin:end]))
                at = end
            elif HEAD.size + length > _BUFFER_BYTES:
                self._begin_large(kind, length, begin)
                return
            else:
                break
        rest = self._filled - at
        if at and rest:
            self._buffer[:rest] = bytes(self._buffer[at : self._filled])
        self._filled = rest

    def _begin_large(self, kind: int, length: int, begin: int) -> None:
        if length > FRAME_BYTES_MAX:
            self.close()
            return
        whole = memoryview(bytearray(length))
        have = self._filled - begin
        whole[:have] = self._buffer[begin : self._filled]
        self._large, self._large_filled, self._filled = (kind, whole), have, 0

    def _deliver(self, kind: int, payload: bytes) -> None:
        if kind in (END, ERROR):
            self.idle.set()
        if self._discarding:
            return
        self._frames.append((kind, payload))
        self._queued_bytes += len(payload)
        if kind == DATA and self._queued_bytes > _PAUSE_BYTES and not self._paused:
            self._paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._lost:
            self._transport.resume_reading()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
