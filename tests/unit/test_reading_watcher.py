"""The watcher and shared reads: never stale (D2), never hanging, never holding others up (D4)."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import HistoryRewound, Unavailable, VisibilityTimeout
from lakebus.tokens import VisibilityToken
from storage.catalog.interface import Head
from storage.memory_clock import ManualClock
from storage.reading.shared_read import SharedRead
from storage.reading.waiters import Waiter, WaitingRoom
from storage.reading.watcher import HeadWatcher, HistoryChanged
from tests.unit.reading_rig import HISTORY, HeadCatalog, head_of

_HANG_S = 10.0


def token(
    floor: int = 0, own: frozenset[tuple[int, int]] = frozenset(), **positions: int
) -> VisibilityToken:
    return VisibilityToken(HISTORY, floor, {int(k[1:]): v for k, v in positions.items()}, own)


def soon_s(seconds: float = _HANG_S) -> float:
    return time.monotonic() + seconds


class Bell:
    """Wake-ups rung by the test."""

    def __init__(self) -> None:
        self.rung = asyncio.Event()

    async def wake_ups(self) -> AsyncIterator[None]:
        while True:
            await self.rung.wait()
            self.rung.clear()
            yield


# --- shared reads ---------------------------------------------------------------------------------


async def test_D2_a_caller_never_gets_a_read_that_started_before_it_asked() -> None:
    catalog = HeadCatalog(head_of(1))
    reads: SharedRead[Head] = SharedRead(catalog.head, parallel=1)
    catalog.gate.clear()
    early = asyncio.create_task(reads.fresh())
    while not catalog.reads:
        await asyncio.sleep(0)
    catalog.row = head_of(2)  # committed after the read saw the row, before the next call
    late = asyncio.create_task(reads.fresh())
    await asyncio.sleep(0)
    catalog.gate.set()
    assert (await early).snapshot_id == 1
    assert (await late).snapshot_id == 2


async def test_callers_who_came_before_a_read_started_share_it() -> None:
    catalog = HeadCatalog(head_of(1))
    reads: SharedRead[Head] = SharedRead(catalog.head, parallel=2)
    await asyncio.gather(*(reads.fresh() for _ in range(100)))
    assert catalog.reads == 1
    catalog.gate.clear()
    waves = []
    for _ in range(5):
        waves += [asyncio.create_task(reads.fresh()) for _ in range(20)]
        for _ in range(5):
            await asyncio.sleep(0)
    catalog.gate.set()
    await asyncio.gather(*waves)
    assert catalog.reads == 1 + 3  # two under way, and one for everybody who came later


async def test_a_caller_that_leaves_does_not_stop_the_read_for_the_others() -> None:
    catalog = HeadCatalog(head_of(1))
    catalog.gate.clear()
    reads: SharedRead[Head] = SharedRead(catalog.head)
    one, two = asyncio.create_task(reads.fresh()), asyncio.create_task(reads.fresh())
    while not catalog.reads:
        await asyncio.sleep(0)
    one.cancel()
    catalog.gate.set()
    assert (await two).snapshot_id == 1
    with pytest.raises(asyncio.CancelledError):
        await one


async def test_a_failed_read_fails_its_callers_and_no_later_ones() -> None:
    catalog = HeadCatalog(head_of(1))
    catalog.fail = lambda: Unavailable("gone")
    reads: SharedRead[Head] = SharedRead(catalog.head)
    for outcome in await asyncio.gather(reads.fresh(), reads.fresh(), return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    catalog.fail = None
    assert (await reads.fresh()).snapshot_id == 1


async def test_a_silent_read_ends_as_unavailable() -> None:
    catalog = HeadCatalog(head_of(1))
    catalog.gate.clear()
    reads: SharedRead[Head] = SharedRead(catalog.head, read_s=0.02)
    with pytest.raises(Unavailable):
        await reads.fresh()


async def test_closing_ends_the_reads_under_way_and_refuses_new_ones() -> None:
    catalog = HeadCatalog(head_of(1))
    catalog.gate.clear()
    reads: SharedRead[Head] = SharedRead(catalog.head, parallel=1)
    calls = [asyncio.create_task(reads.fresh())]
    while not catalog.reads:
        await asyncio.sleep(0)
    calls.append(asyncio.create_task(reads.fresh()))  # boards, and never departs
    await asyncio.sleep(0)
    await reads.close()
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    with pytest.raises(Unavailable):
        await reads.fresh()


# --- the waiting room -----------------------------------------------------------------------------


_positions = st.dictionaries(st.integers(0, 3), st.integers(0, 12), max_size=3)
_tokens = st.builds(lambda f, p: VisibilityToken(HISTORY, f, p), st.integers(0, 8), _positions)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), _tokens),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("head"), st.tuples(st.integers(0, 2), _positions)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(_steps)
def test_D4_a_waiter_is_woken_exactly_when_a_head_covers_it(
    steps: list[tuple[str, object]],
) -> None:
    loop = asyncio.new_event_loop()
    try:
        _walk(loop, steps)
    finally:
        loop.close()


def _walk(loop: asyncio.AbstractEventLoop, steps: list[tuple[str, object]]) -> None:
    room, head = WaitingRoom(), head_of(1)
    waiting: list[Waiter] = []
    for kind, value in steps:
        if kind == "enter":
            assert isinstance(value, VisibilityToken)
            waiter = Waiter(value, loop.create_future())
            covered = value.covered_by(head.snapshot_id, head.watermark)
            assert room.enter(waiter, head) is not covered
            if not covered:
                waiting.append(waiter)
        elif kind == "leave" and waiting:
            assert isinstance(value, int)
            waiter = waiting.pop(value % len(waiting))
            waiter.future.cancel()
            room.leave(waiter)
        elif kind == "head":
            assert isinstance(value, tuple)
            step, positions = value
            mark = {s: max(positions.get(s, 0), head.watermark.get(s, 0)) for s in range(4)}
            head = head_of(head.snapshot_id + step, mark)
            due = [w for w in waiting if w.token.covered_by(head.snapshot_id, head.watermark)]
            assert room.advance(head) == len(due)
            assert all(w.future.result() is head for w in due)
            waiting = [w for w in waiting if w not in due]
        assert len(room) == len(waiting)
        assert not any(w.future.done() for w in waiting)


# --- the watcher ----------------------------------------------------------------------------------


async def test_D4_a_waiter_is_woken_by_polling_alone() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, poll_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    wait = asyncio.create_task(watcher.wait_until_covered(token(s0=3), deadline_s=soon_s()))
    while not watcher.waiting:
        await asyncio.sleep(0)
    catalog.row = head_of(2, {0: 3})
    assert (await asyncio.wait_for(wait, _HANG_S)).snapshot_id == 2
    await watcher.stop()


async def test_D4_a_hint_wakes_at_once_and_the_row_decides() -> None:
    bell, catalog = Bell(), HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, listen=bell.wake_ups, poll_s=3_600)  # type: ignore[arg-type]
    watcher.start()
    wait = asyncio.create_task(watcher.wait_until_covered(token(floor=3), deadline_s=soon_s()))
    while not watcher.waiting:
        await asyncio.sleep(0)
    bell.rung.set()  # a hint about nothing
    reads = catalog.reads
    while catalog.reads == reads:
        await asyncio.sleep(0)
    assert not wait.done()
    catalog.row = head_of(3)
    bell.rung.set()
    assert (await asyncio.wait_for(wait, _HANG_S)).snapshot_id == 3
    await watcher.stop()


async def until(happened: Callable[[], bool]) -> None:
    """Lets the loop go on, and fails instead of hanging."""

    async with asyncio.timeout(_HANG_S):
        while not happened():
            await asyncio.sleep(0)


async def test_wake_ups_gather_while_nobody_asks_and_are_followed_at_once_by_who_waits() -> None:
    bell, catalog, clock = Bell(), HeadCatalog(head_of(1)), ManualClock()
    seen: list[int] = []
    watcher = HeadWatcher(
        catalog,  # type: ignore[arg-type]
        listen=bell.wake_ups,
        poll_s=3_600,
        idle_s=3_600,
        clock=clock,
        on_head=lambda head: seen.append(head.snapshot_id),
    )
    watcher.start()
    bell.rung.set()
    await until(
        lambda: catalog.reads > 0
    )  # the first wake-up, after which a process knows something
    for number in range(2, 12):
        catalog.row = head_of(number)
        bell.rung.set()
        for _ in range(20):
            await asyncio.sleep(0)
    assert (catalog.reads, seen) == (1, [1])
    wait = asyncio.create_task(watcher.wait_until_covered(token(floor=12), deadline_s=soon_s()))
    await until(lambda: watcher.current == head_of(11))  # who waits ends the rest
    catalog.row = head_of(12)
    bell.rung.set()
    assert (await asyncio.wait_for(wait, _HANG_S)).snapshot_id == 12
    catalog.row = head_of(13)  # somebody asked a moment ago, so it is read ahead for the next
    bell.rung.set()
    await until(lambda: watcher.current == head_of(13))
    clock.advance_s(3_601)
    catalog.row, reads = head_of(14), catalog.reads
    bell.rung.set()
    await until(lambda: watcher.current == head_of(14))  # the rest begins with the read before it
    catalog.row = head_of(15)
    bell.rung.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert (catalog.reads - reads, seen[-1]) == (1, 14)
    assert (await watcher.fresh_head()).snapshot_id == 15
    await watcher.stop()


async def test_who_begins_to_wait_asks_nothing_that_wake_ups_tell() -> None:
    bell, catalog = Bell(), HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, listen=bell.wake_ups, poll_s=3_600)  # type: ignore[arg-type]
    watcher.start()
    head = await watcher.fresh_head()
    wait = asyncio.create_task(watcher.wait_until_covered(token(floor=2), deadline_s=soon_s()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (catalog.reads, watcher.waiting, head.snapshot_id) == (1, 1, 1)
    catalog.row = head_of(2)
    bell.rung.set()
    assert (await asyncio.wait_for(wait, _HANG_S)).snapshot_id == 2
    assert catalog.reads == 2
    await watcher.stop()


async def test_D4_a_wait_polls_though_no_wake_up_comes() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, listen=Bell().wake_ups, poll_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    await watcher.fresh_head()
    wait = asyncio.create_task(watcher.wait_until_covered(token(floor=2), deadline_s=soon_s()))
    while not watcher.waiting:
        await asyncio.sleep(0)
    catalog.row = head_of(2)
    assert (await asyncio.wait_for(wait, _HANG_S)).snapshot_id == 2
    await watcher.stop()


async def test_a_quiet_watcher_asks_nothing() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, poll_s=0.001)  # type: ignore[arg-type]
    watcher.start()
    await watcher.fresh_head()
    await asyncio.sleep(0.05)
    assert catalog.reads == 1
    await watcher.stop()


async def test_D4_waiters_outlive_a_failing_catalog_and_keep_their_deadlines() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, poll_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    await watcher.fresh_head()
    catalog.fail = lambda: Unavailable("gone")
    patient = asyncio.create_task(watcher.wait_until_covered(token(s0=1), deadline_s=soon_s()))
    hurried = asyncio.create_task(watcher.wait_until_covered(token(s0=1), deadline_s=soon_s(0.03)))
    with pytest.raises(VisibilityTimeout):
        await asyncio.wait_for(hurried, _HANG_S)
    with pytest.raises(Unavailable):
        await watcher.fresh_head()
    assert not patient.done()
    catalog.row, catalog.fail = head_of(2, {0: 1}), None
    assert (await asyncio.wait_for(patient, _HANG_S)).snapshot_id == 2
    await watcher.stop()


async def test_D4_a_bug_of_the_backend_does_not_end_later_waits() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog, poll_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    await watcher.fresh_head()
    catalog.fail = lambda: KeyError("bug")
    wait = asyncio.create_task(watcher.wait_until_covered(token(s0=1), deadline_s=soon_s()))
    reads = catalog.reads
    while catalog.reads < reads + 2:
        await asyncio.sleep(0.001)
    catalog.row, catalog.fail = head_of(2, {0: 1}), None
    assert (await asyncio.wait_for(wait, _HANG_S)).snapshot_id == 2
    await watcher.stop()


async def test_D4_the_deadline_needs_no_catalog_and_no_background_task() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog)  # type: ignore[arg-type]  # never started
    await watcher.fresh_head()
    with pytest.raises(VisibilityTimeout):
        await asyncio.wait_for(
            watcher.wait_until_covered(token(s0=1), deadline_s=soon_s(0.02)), _HANG_S
        )


async def test_stopping_ends_every_wait() -> None:
    catalog = HeadCatalog(head_of(1))
    watcher = HeadWatcher(catalog)  # type: ignore[arg-type]
    watcher.start()
    wait = asyncio.create_task(watcher.wait_until_covered(token(s0=1), deadline_s=soon_s()))
    while not watcher.waiting:
        await asyncio.sleep(0)
    await watcher.stop()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(wait, _HANG_S)


async def test_F4_a_catalog_that_went_back_in_time_is_refused() -> None:
    catalog = HeadCatalog(head_of(5))
    watcher = HeadWatcher(catalog)  # type: ignore[arg-type]
    await watcher.fresh_head()
    catalog.row = head_of(4)
    with pytest.raises(HistoryRewound):
        await watcher.fresh_head()
    assert watcher.current == head_of(5)
    catalog.row = head_of(1_000_005, history=uuid.UUID(int=2))  # the loss was accepted
    assert (await watcher.fresh_head()).snapshot_id == 1_000_005


async def test_a_new_history_ends_the_waits_of_the_old_one() -> None:
    catalog = HeadCatalog(head_of(5))
    watcher = HeadWatcher(catalog, poll_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    wait = asyncio.create_task(watcher.wait_until_covered(token(s0=9), deadline_s=soon_s()))
    while not watcher.waiting:
        await asyncio.sleep(0)
    catalog.row = head_of(100, history=uuid.UUID(int=2))
    with pytest.raises(HistoryChanged):
        await asyncio.wait_for(wait, _HANG_S)
    await watcher.stop()


async def test_answers_that_overtake_each_other_never_take_the_head_back() -> None:
    catalog = HeadCatalog(head_of(1))
    seen: list[int] = []
    watcher = HeadWatcher(catalog, on_head=lambda h: seen.append(h.snapshot_id))  # type: ignore[arg-type]
    held, opened = asyncio.Event(), asyncio.Event()
    opened.set()
    catalog.gate = held
    slow = asyncio.create_task(watcher.fresh_head())
    while not catalog.reads:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # it saw snapshot 1 and waits at the gate
    catalog.gate, catalog.row = opened, head_of(2)
    assert (await watcher.fresh_head()).snapshot_id == 2
    held.set()
    # It started before snapshot 2 was committed, so either head is right for it.
    assert (await slow).snapshot_id == 2
    assert (watcher.current, seen) == (head_of(2), [2])
    await watcher.stop()
