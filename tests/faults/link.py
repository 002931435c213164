"""One connection through the proxy: its two lanes, and what it knows of the conversation.

PostgreSQL answers every Sync and every simple Query with exactly one ReadyForQuery, in order. So a
queue of rounds, one for each of them, tells which reply belongs to which statement, also when a
client sends ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults.frames import (
    CANCEL_REQUEST,
    GSS_REQUEST,
    SSL_REQUEST,
    Frame,
    FrameReader,
    application_of,
    bound_statement,
    parsed_statement,
    startup_code,
    text_of,
)
from tests.faults.rules import Act, Armed, Fired, Way

_CHUNK_BYTES = 256 * 1024
_SLOW_STEP_S = 0.02
_NO_LINGER = struct.pack("ii", 1, 0)


class Broken(Exception):
    """Internal: this connection was reset on purpose."""


@dataclass(slots=True, eq=False)
class Lane:
    """One direction. `bandwidth` (bytes per second) is shared by all lanes of that direction."""

    way: Way
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    bandwidth: Mapping[Way, float]
    dropped: bool = False
    holds: list[Armed] = field(default_factory=list)
    delays: list[Armed] = field(default_factory=list)
    counted: list[tuple[int, Armed]] = field(default_factory=list)
    carried_bytes: int = 0

    async def send(self, data: bytes) -> None:
        """Hands bytes on, as slowly as it must."""

        for armed in tuple(self.holds):
            await armed.lifted.wait()
        for armed in tuple(self.delays):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(armed.lifted.wait(), armed.rule.delay_s)
        view = memoryview(data)
        while view and not self.dropped:
            rate = self.bandwidth.get(self.way)
            step = view if rate is None else view[: max(1, int(rate * _SLOW_STEP_S))]
            self.writer.write(step)
            await self.writer.drain()
            self.carried_bytes += len(step)
            view = view[len(step) :]
            if rate is not None:
                await asyncio.sleep(len(step) / rate)

    def end(self) -> None:
        """Tells the receiver that nothing more comes; a black hole tells nothing."""

        if not self.dropped:
            with contextlib.suppress(OSError, RuntimeError):
                self.writer.write_eof()


@dataclass(slots=True)
class _Round:
    """What the server has to answer with one ReadyForQuery."""

    sql: str = ""
    at_reply: list[Armed] = field(default_factory=list)
    reply: bytearray = field(default_factory=bytearray)
    tag: str = ""


class Link:
    """Carries bytes between a client and the server until one of them ends it or a rule does.

    `begin` is called once it is known who connects, and may strike; `matching` asks the rules that
    concern a statement.
    """

    def __init__(
        self,
        *,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        bandwidth: Mapping[Way, float],
        begin: Callable[[Link], None],
        matching: Callable[[Link, str], list[Armed]],
    ) -> None:
        self.number = 0
        self.application = ""
        self.up = Lane(Way.TO_SERVER, client[0], server[1], bandwidth)
        self.down = Lane(Way.TO_CLIENT, server[0], client[1], bandwidth)
        self._begin = begin
        self._matching = matching
        self._statements: dict[bytes, str] = {}
        self._rounds: deque[_Round] = deque()
        self._open = _Round()  # requests since the last Sync
        self._out = bytearray()  # requests looked at and not handed on yet
        self._withheld: Armed | None = None

    # --- faults ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Both sides get a reset, and whatever is on its way is lost."""

        for lane in (self.up, self.down):
            with contextlib.suppress(OSError, RuntimeError):
                raw = lane.writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                lane.writer.transport.abort()

    def strike(self, armed: Armed) -> None:
        """A rule for whole connections begins to hold for this one."""

        rule = armed.rule
        if rule.after_bytes is None:
            self._apply(armed)
        else:
            lane = self.up if rule.way is Way.TO_SERVER else self.down
            lane.counted.append((lane.carried_bytes + rule.after_bytes, armed))

    def _apply(self, armed: Armed, sql: str = "", tag: str = "", status: str = "") -> None:
        rule = armed.rule
        armed.note(Fired(rule.name, self.number, self.application, sql, tag, status))
        if rule.act in (Act.RESET, Act.CUT):
            self.reset()
            return
        for lane in (self.up, self.down):
            if lane.way not in rule.ways():
                continue
            if rule.act is Act.HALF_CLOSE:
                lane.end()
            if rule.act in (Act.HALF_CLOSE, Act.DROP):
                lane.dropped = True
            elif rule.act is Act.HOLD:
                lane.holds.append(armed)
            elif rule.act is Act.DELAY and rule.sql is None:
                lane.delays.append(armed)

    async def _apply_at_statement(
        self, armed: Armed, sql: str, tag: str = "", status: str = ""
    ) -> None:
        self._apply(armed, sql, tag, status)
        if armed.rule.act in (Act.RESET, Act.CUT):
            raise Broken
        if armed.rule.act is Act.DELAY:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(armed.lifted.wait(), armed.rule.delay_s)

    # --- bytes ----------------------------------------------------------------------------------

    async def carry_bytes(self) -> None:
        """Understands nothing of what it carries."""

        self._begin(self)
        await _until_either_breaks(self._carry_raw(self.up), self._carry_raw(self.down))

    async def carry_postgres(self) -> None:
        frames = FrameReader(starting=True)
        frame = await self._startup(frames)
        if startup_code(frame) == CANCEL_REQUEST:
            await self.up.send(frame.data)
        else:
            frames.starting = False
            self.application = application_of(frame)
            self._rounds.append(_Round())
            self._begin(self)
            await self._send(self.up, frame.data)
        await _until_either_breaks(self._requests(frames), self._replies(FrameReader()))

    async def _startup(self, frames: FrameReader) -> Frame:
        """The startup message. Encryption is declined."""

        while True:
            while (frame := frames.next()) is not None:
                if startup_code(frame) not in (SSL_REQUEST, GSS_REQUEST):
                    return frame
                self.down.writer.write(b"N")
            data = await self.up.reader.read(_CHUNK_BYTES)
            if not data:
                raise Broken
            frames.feed(data)

    async def _carry_raw(self, lane: Lane) -> None:
        while data := await lane.reader.read(_CHUNK_BYTES):
            await self._send(lane, data)
        lane.end()

    async def _send(self, lane: Lane, data: bytes) -> None:
        """Hands bytes on, and stops at each place where a rule waits for a count of bytes."""

        while lane.counted:
            place, armed = min(lane.counted, key=lambda one: one[0])
            left = place - lane.carried_bytes
            if len(data) < left or lane.dropped:
                break
            await lane.send(data[:left])
            data = data[left:]
            lane.counted.remove((place, armed))
            if not armed.lifted.is_set():
                self._apply(armed)
                if armed.rule.act is Act.RESET:
                    raise Broken
        await lane.send(data)

    # --- requests -------------------------------------------------------------------------------

    async def _requests(self, frames: FrameReader) -> None:
        while True:
            while (frame := frames.next()) is not None:
                await self._request(frame)
            if self._withheld is None:
                await self._flush()
            data = await self.up.reader.read(_CHUNK_BYTES)
            if not data:
                break
            frames.feed(data)
        self._out += frames.take_rest()
        await self._flush()
        self.up.end()

    async def _request(self, frame: Frame) -> None:
        if frame.kind == b"P":
            name, sql = parsed_statement(frame)
            self._statements[name] = sql
        elif frame.kind == b"B":
            await self._statement(self._statements.get(bound_statement(frame), ""))
        elif frame.kind == b"Q":
            await self._statement(text_of(frame))
        self._out += frame.data
        if frame.kind in (b"Q", b"S"):
            self._rounds.append(self._open)
            self._open = _Round()
            await self._withhold()

    async def _statement(self, sql: str) -> None:
        self._open.sql = sql
        for armed in self._matching(self, sql):
            if armed.rule.at_reply:
                self._open.at_reply.append(armed)
            elif armed.rule.withhold_bytes:
                self._withheld = armed
            else:
                await self._flush()
                await self._apply_at_statement(armed, sql)

    async def _withhold(self) -> None:
        """The request goes on without its last bytes; the rest waits in `_out`."""

        armed, self._withheld = self._withheld, None
        if armed is None:
            return
        kept = self._out[-armed.rule.withhold_bytes :]
        del self._out[-armed.rule.withhold_bytes :]
        await self._flush()
        self._out += kept
        self._apply(armed, self._rounds[-1].sql)

    async def _flush(self) -> None:
        if self._out:
            data = bytes(self._out)
            self._out.clear()
            await self._send(self.up, data)

    # --- replies --------------------------------------------------------------------------------

    async def _replies(self, frames: FrameReader) -> None:
        while data := await self.down.reader.read(_CHUNK_BYTES):
            frames.feed(data)
            out = bytearray()
            while (frame := frames.next()) is not None:
                await self._reply(frame, out)
            if out:
                await self._send(self.down, bytes(out))
        await self._send(self.down, frames.take_rest())
        self.down.end()

    async def _reply(self, frame: Frame, out: bytearray) -> None:
        current = self._rounds[0] if self._rounds else self._open
        if frame.kind == b"C":
            current.tag = text_of(frame)
        elif frame.kind == b"s":  # PortalSuspended: a client that asked for one row got it
            current.tag = "SUSPENDED"
        elif frame.kind == b"E":
            current.tag = ""
        reply = current.reply if current.at_reply else out
        reply += frame.data
        if frame.kind != b"Z":
            return
        if self._rounds:
            self._rounds.popleft()
        if current.at_reply:
            await self._send(self.down, bytes(out))
            out.clear()
            status = frame.body.decode()
            for armed in current.at_reply:
                await self._apply_at_statement(armed, current.sql, current.tag, status)
            out += current.reply


async def _until_either_breaks(*works: Coroutine[Any, Any, None]) -> None:
    """Ends when all have ended, or with the first that fails."""

    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
