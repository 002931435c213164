"""The fault proxy, against a fake PostgreSQL that counts what reached it, and plain TCP."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.proxy import Act, Proxy, Rule, Way, rule_from_json
from tests.faults.rules import Armed

LOST = (ConnectionError, asyncio.IncompleteReadError)
_HANG_S = 10.0
_ROOT = Path(__file__).parents[2]


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def statement(sql: str) -> bytes:
    return message(b"Q", sql.encode() + b"\0")


def prepared(sql: str) -> bytes:
    """Parse, Bind, Execute, Sync."""

    return (
        message(b"P", b"s\0" + sql.encode() + b"\0\0\0")
        + message(b"B", b"\0s\0" + bytes(6))
        + message(b"E", b"\0" + bytes(4))
        + message(b"S", b"")
    )


class FakePostgres:
    """Lets everybody in, and answers each statement with its own text as the tag."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.bytes_in = 0
        self.gone = asyncio.Event()  # a client has left, one way or another
        self.fails = False
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except LOST:
            self.gone.set()
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(4), "big")
        await reader.readexactly(size - 4)
        writer.write(message(b"R", bytes(4)) + message(b"Z", b"I"))
        sql = ""
        while True:
            kind = await reader.readexactly(1)
            size = int.from_bytes(await reader.readexactly(4), "big")
            body = await reader.readexactly(size - 4)
            self.bytes_in += size + 1
            if kind == b"Q":
                sql = body[:-1].decode()
            elif kind == b"P":
                sql = body[2:].split(b"\0")[0].decode()
            if kind in (b"Q", b"S"):
                self.done.append(sql)
                answer = message(b"E", b"\0") if self.fails else message(b"C", sql.encode() + b"\0")
                writer.write(answer + message(b"Z", b"I"))


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def start(self, application: str) -> None:
        """Asks for encryption first, as clients do."""

        self.writer.write(struct.pack("!ii", 8, 80_877_103))
        assert await self.reader.readexactly(1) == b"N"
        body = struct.pack("!i", 3 << 16) + f"application_name\0{application}\0\0".encode()
        self.writer.write(struct.pack("!i", len(body) + 4) + body)
        await self.answer()

    async def answer(self) -> str:
        """The tag of the next answer, "error", or "" for one without a tag."""

        tag = ""
        while True:
            kind = await self.reader.readexactly(1)
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            body = await self.reader.readexactly(size - 4)
            if kind == b"C":
                tag = body[:-1].decode()
            elif kind == b"E":
                tag = "error"
            elif kind == b"Z":
                return tag

    async def ask(self, sql: str, *, extended: bool = False) -> str:
        self.writer.write(prepared(sql) if extended else statement(sql))
        return await asyncio.wait_for(self.answer(), _HANG_S)


class Rig:
    def __init__(self, server: FakePostgres, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self._clients: list[Client] = []

    def arm(self, **rule: Any) -> Armed:
        return self.proxy.arm(Rule(**rule))

    async def connect(self, application: str = "one") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.proxy.listening_port))
        self._clients.append(client)
        await asyncio.wait_for(client.start(application), _HANG_S)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.writer.close()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    fake = FakePostgres()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    async with Proxy("127.0.0.1", fake.port, seed=7) as proxy:
        made = Rig(fake, proxy)
        yield made
        made.close()
    server.close()


# --- statements -----------------------------------------------------------------------------------


async def test_without_a_rule_everything_passes(rig: Rig) -> None:
    client = await rig.connect("reader")
    assert await client.ask("SELECT 1") == "SELECT 1"
    assert await client.ask("SELECT 2", extended=True) == "SELECT 2"
    assert rig.proxy.connections == [(1, "reader")]


@pytest.mark.parametrize("extended", [False, True])
async def test_a_cut_comes_after_the_servers_work_and_before_its_reply(
    rig: Rig, extended: bool
) -> None:
    lost = rig.arm(name="lost", act=Act.CUT, sql="Commit")
    client = await rig.connect()
    assert await client.ask("SELECT 1") == "SELECT 1"
    with pytest.raises(LOST):
        await client.ask("COMMIT", extended=extended)
    assert rig.server.done == ["SELECT 1", "COMMIT"]
    fired = await lost.struck()
    assert (fired.rule, fired.sql, fired.tag, fired.committed) == ("lost", "COMMIT", "COMMIT", True)
    again = await rig.connect()
    assert await again.ask("COMMIT") == "COMMIT"  # once, unless it was told otherwise


async def test_a_reply_that_says_no_is_not_a_commit(rig: Rig) -> None:
    rig.server.fails = True
    lost = rig.arm(act=Act.CUT, sql="")
    client = await rig.connect()
    with pytest.raises(LOST):
        await client.ask("COMMIT")
    assert not (await lost.struck()).committed


async def test_a_pipelined_neighbour_gets_its_own_reply(rig: Rig) -> None:
    rig.arm(act=Act.CUT, sql="second")
    client = await rig.connect()
    client.writer.write(statement("first") + statement("second"))
    assert await asyncio.wait_for(client.answer(), _HANG_S) == "first"
    with pytest.raises(LOST):
        await client.answer()


async def test_a_reset_before_the_request_leaves_the_server_out_of_it(rig: Rig) -> None:
    rig.arm(act=Act.RESET, sql="second")
    client = await rig.connect()
    client.writer.write(statement("first") + statement("second"))
    await asyncio.wait_for(rig.server.gone.wait(), _HANG_S)
    assert "second" not in rig.server.done


async def test_a_held_reply_comes_when_it_is_let_go(rig: Rig) -> None:
    held = rig.arm(act=Act.HOLD, sql="slow", way=Way.TO_CLIENT)
    client = await rig.connect()
    asking = asyncio.create_task(client.ask("slow"))
    assert (await asyncio.wait_for(held.struck(), _HANG_S)).committed
    assert not asking.done()
    held.lift()
    assert await asking == "slow"


async def test_a_held_request_can_lack_its_last_bytes(rig: Rig) -> None:
    held = rig.arm(act=Act.HOLD, sql="paused", withhold_bytes=5)
    client = await rig.connect()
    asking = asyncio.create_task(client.ask("paused", extended=True))
    await asyncio.wait_for(held.struck(), _HANG_S)
    while rig.server.bytes_in < len(prepared("paused")) - 5:
        await asyncio.sleep(0)  # until all that was let through has been read
    assert rig.server.done == []
    held.lift()
    assert await asking == "paused"


async def test_dropped_bytes_vanish_and_the_connection_stays(rig: Rig) -> None:
    gone = rig.arm(act=Act.DROP, sql="lost", way=Way.TO_CLIENT)
    client = await rig.connect()
    asking = asyncio.create_task(client.ask("lost"))
    assert (await asyncio.wait_for(gone.struck(), _HANG_S)).committed
    assert rig.server.done == ["lost"]
    neighbour = await rig.connect()
    assert await neighbour.ask("SELECT 1") == "SELECT 1"
    assert not asking.done()
    asking.cancel()


async def test_a_delay_delays(rig: Rig) -> None:
    rig.arm(act=Act.DELAY, sql="late", delay_s=0.1, way=Way.TO_CLIENT)
    client = await rig.connect()
    began_s = time.monotonic()
    assert await client.ask("late") == "late"
    assert time.monotonic() - began_s >= 0.1


# --- which one ------------------------------------------------------------------------------------


async def test_a_rule_can_name_an_application_a_connection_and_how_many_to_skip(rig: Rig) -> None:
    by_name = rig.arm(act=Act.CUT, sql="x", application="writer")
    by_number = rig.arm(act=Act.CUT, sql="y", connection=1)
    third = rig.arm(act=Act.CUT, sql="z", skip=2)
    reader, writer = await rig.connect("reader"), await rig.connect("writer")
    assert await reader.ask("x") == "x"
    assert await writer.ask("y") == "y"
    assert [await writer.ask("z") for _ in range(2)] == ["z", "z"]
    assert not third.fired
    for client, sql in ((writer, "x"), (reader, "y"), (await rig.connect(), "z")):
        with pytest.raises(LOST):
            await client.ask(sql)
    assert [len(one.fired) for one in (by_name, by_number, third)] == [1, 1, 1]


async def test_a_probability_repeats_with_its_seed(rig: Rig) -> None:
    async def struck() -> list[bool]:
        async with Proxy("127.0.0.1", rig.server.port, seed=3) as proxy:
            armed = proxy.arm(
                Rule(act=Act.DELAY, delay_s=1e-6, sql="x", probability=0.5, times=None)
            )
            other = Rig(rig.server, proxy)
            client = await other.connect()
            found = []
            for _ in range(32):
                before = len(armed.fired)
                await client.ask("x")
                found.append(len(armed.fired) > before)
            other.close()
            return found

    first = await struck()
    assert first == await struck()
    assert 4 < sum(first) < 28


async def test_a_rule_without_a_statement_strikes_open_connections_and_later_ones(rig: Rig) -> None:
    now, other = await rig.connect("listener"), await rig.connect("other")
    gone = rig.arm(act=Act.RESET, application="listener", times=None)
    with pytest.raises(LOST):
        await now.ask("x")
    with pytest.raises(LOST):
        await rig.connect("listener")
    assert await other.ask("x") == "x"
    gone.lift()
    assert await (await rig.connect("listener")).ask("x") == "x"


async def test_a_partition_that_heals_loses_nothing(rig: Rig) -> None:
    client = await rig.connect()
    partition = rig.arm(act=Act.HOLD, times=None)
    asking = asyncio.create_task(client.ask("x"))
    later = asyncio.create_task(rig.connect())
    await asyncio.wait_for(partition.struck(2), _HANG_S)
    assert not rig.server.done
    partition.lift()
    assert await asking == "x"
    assert await (await later).ask("y") == "y"


async def test_bandwidth_is_bounded_in_its_direction(rig: Rig) -> None:
    client = await rig.connect()
    rig.proxy.set_bandwidth(Way.TO_SERVER, 1_000_000)
    began_s = time.monotonic()
    assert await client.ask("x" * 100_000) == "x" * 100_000
    assert time.monotonic() - began_s >= 0.09
    rig.proxy.set_bandwidth(Way.BOTH, None)
    assert await client.ask("x" * 100_000)


async def test_a_server_that_refuses_is_a_reset(rig: Rig) -> None:
    rig.proxy.port = 1
    with pytest.raises(LOST):
        await rig.connect()


# --- plain TCP ------------------------------------------------------------------------------------


@asynccontextmanager
async def echoing() -> AsyncIterator[tuple[Proxy, asyncio.Event]]:
    """Echoes what comes; the event says that the client's end of the conversation has ended."""

    ended = asyncio.Event()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except ConnectionError:
            pass
        ended.set()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Proxy("127.0.0.1", port, postgres=False) as proxy:
        yield proxy, ended
    server.close()


async def test_tcp_after_so_many_bytes(rig: Rig) -> None:
    async with echoing() as (proxy, _):
        cut = proxy.arm(Rule(act=Act.RESET, way=Way.TO_CLIENT, after_bytes=3))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.listening_port)
        writer.write(b"hello")
        await asyncio.wait_for(cut.struck(), _HANG_S)
        with pytest.raises(ConnectionError):
            await reader.readexactly(5)
        writer.close()


async def test_tcp_half_closed_the_answer_still_comes() -> None:
    async with echoing() as (proxy, ended):
        proxy.arm(Rule(act=Act.HALF_CLOSE, way=Way.TO_SERVER, after_bytes=5))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.listening_port)
        writer.write(b"hello, world")
        await asyncio.wait_for(ended.wait(), _HANG_S)
        assert await asyncio.wait_for(reader.read(), _HANG_S) == b"hello"
        writer.close()


async def test_rules_that_make_no_sense_are_refused() -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"act": Act.CUT},
        {"act": Act.DELAY},
        {"act": Act.RESET, "after_bytes": 1},
        {"act": Act.HOLD, "withhold_bytes": 1},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError):
            Rule(**wrong)
    with pytest.raises(ValueError):
        Proxy("127.0.0.1", 1, postgres=False).arm(Rule(act=Act.CUT, sql=""))
    assert rule_from_json({"act": "cut", "sql": "x"}) == Rule(act=Act.CUT, sql="x")
    with pytest.raises(TypeError):
        rule_from_json({"act": "cut", "sql": "x", "colour": "red"})


# --- as a process ---------------------------------------------------------------------------------


async def test_as_a_process_it_obeys_tells_and_ends_with_its_input(rig: Rig) -> None:
    command = ["-m", "tests.faults.proxy", "--upstream", f"127.0.0.1:{rig.server.port}"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=_ROOT, stdin=pipe, stdout=pipe
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def said() -> dict[str, Any]:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), _HANG_S)
        return dict(json.loads(line))

    async def told(order: object) -> dict[str, Any]:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        return await said()

    port = (await said())["port"]
    assert "error" in await told({"do": "dance"})
    rule = {"name": "lost", "act": "cut", "sql": "commit"}
    assert await told({"do": "arm", "rule": rule}) == {"done": "arm"}
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    await client.start("one")
    with pytest.raises(LOST):
        await client.ask("commit")
    fired = (await said())["fired"]
    assert (fired["rule"], fired["committed"]) == ("lost", True)
    assert await told({"do": "lift", "name": "lost"}) == {"done": "lift"}
    process.stdin.close()
    assert await asyncio.wait_for(process.wait(), _HANG_S) == 0
    client.writer.close()
