"""Frames between parent and child, seen from the parent's end of the socket."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import pytest

from storage.engine.channels import Channel, ChildDied
from storage.engine.wire import DATA, END, ERROR, FRAME_BYTES_MAX, HEAD, frame


async def _pair() -> tuple[Channel, socket.socket, asyncio.Event]:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    channel = await Channel.open(ours, lost.set)
    return channel, theirs, lost


async def test_frames_of_any_size_arrive_whole_and_in_order() -> None:
    channel, theirs, _ = await _pair()
    payloads = [
        bytes([n % 251]) * size for n, size in enumerate((0, 1, 262_139, 262_140, 900_000, 3))
    ]
    sending = asyncio.create_task(
        asyncio.to_thread(theirs.sendall, b"".join(frame(DATA, p) for p in payloads))
    )
    for payload in payloads:
        assert await channel.next_frame() == (DATA, payload)
    await sending
    channel.close()
    theirs.close()


async def test_bytes_that_come_one_by_one() -> None:
    channel, theirs, _ = await _pair()
    whole = frame(DATA, b"abc") + frame(END, b"")
    for at in range(len(whole)):
        theirs.send(whole[at : at + 1])
        await asyncio.sleep(0)
    assert await channel.next_frame() == (DATA, b"abc")
    assert await channel.next_frame() == (END, b"")
    channel.close()
    theirs.close()


async def test_D9_slow_reader_stops_the_sender() -> None:
    channel, theirs, _ = await _pair()
    theirs.setblocking(False)
    block = frame(DATA, b"x" * 100_000)
    sent = 0
    idle_turns = 0
    while idle_turns < 50:
        try:
            sent += theirs.send(block[sent % len(block) :])
            idle_turns = 0
        except BlockingIOError:
            idle_turns += 1
        await asyncio.sleep(0)
    assert sent < 8 << 20
    received = 0
    while received < sent // len(block):
        kind, payload = await channel.next_frame()
        assert (kind, len(payload)) == (DATA, 100_000)
        received += 1
    channel.close()
    theirs.close()


async def test_discard_drops_everything_until_the_end() -> None:
    channel, theirs, _ = await _pair()
    channel.begin(b"request")
    assert theirs.recv(100) == b"request"
    theirs.sendall(frame(DATA, b"a") * 3)
    channel.discard()
    theirs.sendall(frame(DATA, b"b") + frame(ERROR, b"e"))
    await asyncio.wait_for(channel.idle.wait(), 5)
    channel.begin(b"next")
    theirs.sendall(frame(DATA, b"c"))
    assert await channel.next_frame() == (DATA, b"c")
    channel.close()
    theirs.close()


async def test_death_comes_after_what_was_received() -> None:
    channel, theirs, lost = await _pair()
    theirs.sendall(frame(DATA, b"last"))
    theirs.close()
    await asyncio.wait_for(lost.wait(), 5)
    assert await channel.next_frame() == (DATA, b"last")
    with pytest.raises(ChildDied):
        await channel.next_frame()
    with pytest.raises(ChildDied):
        channel.send(b"x")


async def test_frame_longer_than_allowed_ends_the_channel() -> None:
    channel, theirs, lost = await _pair()
    theirs.sendall(HEAD.pack(FRAME_BYTES_MAX + 1, DATA) + b"x" * 10)
    await asyncio.wait_for(lost.wait(), 5)
    with pytest.raises(ChildDied):
        await channel.next_frame()
    theirs.close()


def test_parent_never_imports_duckdb() -> None:
    code = (
        "import sys, storage.engine.engine; "
        "sys.exit(any(m.split('.')[0] in ('duckdb', '_duckdb', 'pyarrow') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
