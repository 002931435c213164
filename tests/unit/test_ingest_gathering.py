"""Requests that come often wait a little for each other; nobody waits who is alone, nobody long.

In virtual time: what the loop does takes none, an append takes `APPEND_S`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import Unavailable
from storage.ingesting import gathering
from storage.ingesting import together as grouping
from storage.ingesting.gathering import ENOUGH, WAIT_S_MAX, Crowd
from storage.ingesting.together import GroupDecoder
from storage.rows.decode import JSON
from storage.rows.decode_together import decode_together
from tests.simulation.event_loop import SimulatedLoop
from tests.unit.http_rig import server
from tests.unit.test_ingesting_service import ScriptedBus, request, service
from tests.unit.test_rows_together import EVENTS, ONE, ROWS_MAX, table

Send = Callable[[], Coroutine[Any, Any, None]]
APPEND_S = 0.003
#: From an answer until a client that waited for it has sent its next request.
BACK_S = 0.001
#: The simulated loop takes a microsecond for a turn.
TURNS_S = 0.0002


class Door:
    """A decoder before a bus with one append at a time, and what came of its requests."""

    def __init__(self) -> None:
        self.decoder = GroupDecoder(rows_max=ROWS_MAX)
        self.waits_s: list[float] = []
        self.answers_s: list[float] = []
        self.decoded: list[int] = []
        self.appended: list[int] = []
        self._appending = 0
        self._queue: list[asyncio.Future[None]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def request(self, schema: Any = EVENTS, body: bytes = ONE) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with self.decoder.crowd(schema.table_id):
            rows = await self.decoder.decode(
                schema, JSON, body, principal_id=1, at_once=not self._appending
            )
            self.waits_s.append(loop.time() - began_s)
            assert rows is not None
            self._appending += 1
            try:
                await self._append()
            finally:
                self._appending -= 1
        self.answers_s.append(loop.time() - began_s)

    async def _append(self) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._queue.append(done)
        if self._flushing is None:
            self._flushing = loop.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        while self._queue:
            group, self._queue = self._queue, []
            self.appended.append(len(group))
            await asyncio.sleep(APPEND_S)
            for done in group:
                if not done.done():
                    done.set_result(None)
        self._flushing = None


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    made = Door()

    def counted(schema: Any, bodies: Any, *, rows_max: int) -> Any:
        made.decoded.append(len(bodies))
        return decode_together(schema, bodies, rows_max=rows_max)

    monkeypatch.setattr(grouping, "decode_together", counted)
    return made


def run(work: Coroutine[Any, Any, None]) -> float:
    """Its seconds of virtual time."""

    loop = SimulatedLoop(steps_max=1_000_000)
    loop.run(work)
    seconds = loop.time()
    loop.close()
    return seconds


async def client(send: Send, requests: int, back_s: float = 0.0) -> None:
    for _ in range(requests):
        await send()
        await asyncio.sleep(back_s)


async def open_loop(send: Send, rate: float, requests: int) -> None:
    sent = []
    for _ in range(requests):
        sent.append(asyncio.get_running_loop().create_task(send()))
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*sent)


def test_a_client_that_is_alone_waits_for_nobody(door: Door) -> None:
    took_s = run(client(door.request, 200))
    assert took_s == pytest.approx(200 * APPEND_S, rel=0.01)
    assert max(door.waits_s) == 0.0


@pytest.mark.parametrize("rate", [400, 600, 1000])
def test_requests_that_come_often_are_gathered(door: Door, rate: int) -> None:
    run(open_loop(door.request, rate, 600))
    lately = door.decoded[len(door.decoded) // 5 :]
    assert statistics.mean(lately) >= rate * WAIT_S_MAX * 0.7
    assert len(door.appended) <= len(door.decoded)
    assert max(door.waits_s) <= WAIT_S_MAX + TURNS_S
    # No answer takes longer than a wait, the append before and the own one.
    assert max(door.answers_s) <= WAIT_S_MAX + 2 * APPEND_S + TURNS_S


def test_requests_that_come_seldom_wait_for_nobody(door: Door) -> None:
    run(open_loop(door.request, 100, 200))
    assert max(door.waits_s) == 0.0


def closed_loop(door: Door, clients: int) -> Coroutine[Any, Any, None]:
    async def late(number: int) -> None:
        await asyncio.sleep(number * APPEND_S / clients)
        await client(door.request, 30, BACK_S)

    async def world() -> None:
        await asyncio.gather(*(late(number) for number in range(clients)))

    return world()


@pytest.mark.parametrize("clients", [2, 8, 12, 4 * ENOUGH])
def test_clients_that_wait_for_their_answers_are_not_held_up(
    door: Door, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s, sizes = run(closed_loop(door, clients)), door.decoded[len(door.decoded) // 5 :]
    median_s = statistics.median(door.answers_s)
    assert statistics.mean(sizes) >= 0.8 * min(clients, ENOUGH)
    monkeypatch.setattr(gathering, "_OFTEN", 1_000_000)
    door.answers_s.clear()
    # A wait or two at the beginning aside, while nobody knows how many there are.
    assert took_s <= 1.02 * run(closed_loop(door, clients)) + 2 * WAIT_S_MAX
    assert median_s <= 1.02 * statistics.median(door.answers_s)


def test_waits_in_vain_become_rare(door: Door) -> None:
    """One client writes all the time; another now and then, so that there might be company."""

    async def world() -> None:
        often = asyncio.get_running_loop().create_task(client(door.request, 400))
        await client(door.request, 20, 0.06)
        await often

    run(world())
    waited = sum(wait_s > TURNS_S for wait_s in door.waits_s)
    assert waited <= len(door.waits_s) * 0.1


def test_after_a_pause_nobody_waits(door: Door) -> None:
    async def world() -> None:
        await open_loop(door.request, 600, 300)
        assert max(door.waits_s) > 0
        door.waits_s.clear()
        for _ in range(5):
            await asyncio.sleep(0.06)
            await door.request()

    run(world())
    assert max(door.waits_s) == 0.0


def test_tables_do_not_wait_for_each_other(door: Door) -> None:
    other = table(("id", "bigint"), table_id=8)
    waits_s: list[float] = []

    async def alone() -> None:
        began_s = asyncio.get_running_loop().time()
        await door.request(other)
        waits_s.append(asyncio.get_running_loop().time() - began_s)

    async def world() -> None:
        busy = asyncio.get_running_loop().create_task(open_loop(door.request, 600, 200))
        await client(alone, 50)
        await busy

    run(world())
    assert max(waits_s) <= 2 * APPEND_S + TURNS_S


@asynccontextmanager
async def gathering_table(door: Door, expected: int) -> AsyncIterator[Crowd]:
    """Inside, `expected` requests are waited for."""

    crowd = door.decoder.crowd(EVENTS.table_id)
    for _ in range(6):
        for _ in range(expected):
            crowd.__enter__()
        for _ in range(expected):
            crowd.__exit__()
    yield crowd


async def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize(("expected", "here"), [(3, 3), (3 * ENOUGH, ENOUGH)])
def test_when_all_are_here_nobody_waits_any_longer(door: Door, expected: int, here: int) -> None:
    async def world() -> None:
        async with gathering_table(door, expected):
            sent = [await start(door.request()) for _ in range(here)]
            await asyncio.gather(*sent)

    assert run(world()) == pytest.approx(APPEND_S, abs=TURNS_S)
    assert door.decoded == [here]


def test_no_more_bytes_are_waited_for_than_are_decoded_at_once(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "GROUP_BYTES_MAX", 2 * len(ONE))

    async def world() -> None:
        async with gathering_table(door, 8):
            sent = [await start(door.request()) for _ in range(2)]
            await asyncio.gather(*sent)

    assert run(world()) == pytest.approx(APPEND_S, abs=TURNS_S)
    assert door.decoded == [2]


def test_who_leaves_while_it_waits_holds_nobody_up(door: Door) -> None:
    async def world() -> None:
        async with gathering_table(door, 8) as crowd:
            leaving, staying = await start(door.request()), await start(door.request())
            await asyncio.sleep(WAIT_S_MAX / 2)
            leaving.cancel()
            await staying
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert crowd.under_way == 0

    assert run(world()) == pytest.approx(WAIT_S_MAX + APPEND_S, abs=TURNS_S)
    assert door.decoded == [1]


def test_when_all_have_left_the_next_one_is_as_any(door: Door) -> None:
    async def world() -> None:
        async with gathering_table(door, 8):
            leaving = await start(door.request())
            leaving.cancel()
            await asyncio.sleep(2 * WAIT_S_MAX)
            await door.request()

    run(world())
    assert door.decoded == [1]
    assert max(door.waits_s) <= WAIT_S_MAX + TURNS_S


def test_what_is_kept_of_tables_is_bounded(door: Door) -> None:
    async def world() -> None:
        with door.decoder.crowd(0):
            kept = door.decoder.crowd(0)
            for number in range(3 * grouping._TABLES_MAX):
                with door.decoder.crowd(number):
                    assert len(door.decoder._tables) <= grouping._TABLES_MAX
            assert door.decoder.crowd(0) is kept

    run(world())


def test_one_vain_wait_spares_the_next_two_spare_two() -> None:
    async def world() -> None:
        crowd = Crowd()
        for _ in range(6):
            with crowd, crowd:
                pass
        pattern = []
        for _ in range(20):
            gathers = crowd.should_gather()
            pattern.append(gathers)
            if gathers:
                crowd.waited(0)
        assert "".join("w" if one else "." for one in pattern) == "w.w..w....w........w"
        for _ in range(16):
            assert not crowd.should_gather()
        assert crowd.should_gather()
        crowd.waited(1)
        assert crowd.should_gather()

    run(world())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 0.008),  # since the one before
            st.sampled_from([7, 8]),  # table
            st.one_of(st.none(), st.floats(0, 0.01)),  # leaves after
        ),
        min_size=1,
        max_size=80,
    )
)
def test_nobody_waits_longer_than_the_bound_whatever_comes(
    arrivals: list[tuple[float, int, float | None]],
) -> None:
    door = Door()
    tables = {7: EVENTS, 8: table(("id", "bigint"), table_id=8)}

    async def one(table_id: int, leaves_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        sending = loop.create_task(door.request(tables[table_id]))
        if leaves_s is not None:
            loop.call_later(leaves_s, sending.cancel)
        await asyncio.wait([sending])
        assert leaves_s is not None or not sending.cancelled()
        if not sending.cancelled():
            sending.result()

    async def world() -> None:
        loop = asyncio.get_running_loop()
        sent = []
        for gap_s, table_id, leaves_s in arrivals:
            await asyncio.sleep(gap_s)
            sent.append(loop.create_task(one(table_id, leaves_s)))
        await asyncio.gather(*sent)
        for table_id in tables:
            assert door.decoder.crowd(table_id).under_way == 0
        staying = sum(leaves_s is None for _, _, leaves_s in arrivals)
        assert len(door.answers_s) >= staying

    run(world())
    assert max(door.waits_s, default=0.0) <= WAIT_S_MAX + TURNS_S


# --- through the service ----------------------------------------------------------------------


async def test_a_request_that_has_failed_is_no_longer_under_way() -> None:
    async with server() as lake:
        await lake.create()
        bus = ScriptedBus(lake.lake, [lambda: Unavailable("not now")])
        door = service(lake, bus)
        with pytest.raises(Unavailable):
            await door.accept(request(ONE))
        await door.accept(request(ONE))
        (kept,) = door._group._tables.values()
        assert kept.crowd.under_way == 0


async def test_A9_what_was_gathered_is_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_OFTEN", 0)
    async with server() as lake:
        await lake.create()
        for _ in range(3):
            bodies: list[object] = [[{"id": 1}], [{"id": "one"}], [{"id": 2}]]
            answers = await asyncio.gather(*(lake.send(body) for body in bodies))
            assert [answer.status_code for answer in answers] == [202, 422, 202]


async def test_A6_who_has_no_time_left_after_the_wait_has_stored_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouping, "WAIT_S_MAX", 0.02)
    async with server() as lake:
        await lake.create()
        bus = ScriptedBus(lake.lake, [])
        door = service(lake, bus)
        for _ in range(2):  # the first one looks the table up
            await door.accept(request(ONE))
        seen = len(bus.seen)
        (kept,) = door._group._tables.values()
        for _ in range(6):
            with kept.crowd, kept.crowd:
                pass
        with pytest.raises(Unavailable) as refused:
            await door.accept(request(ONE, deadline_s=time.monotonic() + 0.01))
        assert refused.value.members["phase"] == "decode"
        assert (len(bus.seen), kept.crowd.under_way) == (seen, 0)
