"""Linger, rounds of claims, back-off, and the loop that is crash-only."""

from __future__ import annotations

import asyncio

import pytest

from actors.loop import RoleLoop
from actors.pacing import Backoff, ClaimPace, Linger
from actors.settings import RoleSettings
from lakebus.clock import SystemClock
from lakebus.errors import ConfigurationError, Unavailable
from lakebus.telemetry import MemoryMetrics
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import ROLE_SETTINGS, Deaths, with_settings


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_a_lone_writer_sees_no_linger(clock: ManualClock) -> None:
    linger = Linger(linger_s=0.03, entries_min=5, clock=clock)
    for _ in range(20):
        assert linger.delay_s() == 0.0
        linger.begin(1)
        clock.advance_s(0.012)


def test_many_writers_see_the_linger_and_the_first_after_idle_does_not(
    clock: ManualClock,
) -> None:
    linger = Linger(linger_s=0.03, entries_min=5, clock=clock)
    assert linger.delay_s() == 0.0
    linger.begin(8)
    clock.advance_s(0.01)
    assert linger.delay_s() == pytest.approx(0.02)
    clock.advance_s(0.03)
    assert linger.delay_s() == 0.0


def test_a_round_claims_each_shard_once_before_it_lingers(clock: ManualClock) -> None:
    linger = Linger(linger_s=0.03, entries_min=5, clock=clock)
    pace = ClaimPace(shards=3, linger=linger, entries_large=100, bytes_large=1_000)
    for shard in range(3):
        assert pace.delay_s() == 0.0
        pace.claimed(shard, 4)
        clock.advance_s(0.001)
    assert pace.delay_s() == pytest.approx(0.027)
    clock.advance_s(0.03)
    assert pace.delay_s() == 0.0


def test_an_empty_claim_ends_the_round(clock: ManualClock) -> None:
    linger = Linger(linger_s=0.03, entries_min=5, clock=clock)
    pace = ClaimPace(shards=3, linger=linger, entries_large=100, bytes_large=1_000)
    pace.claimed(0, 8)
    assert pace.delay_s() == 0.0
    pace.nothing_claimed()
    assert pace.delay_s() == pytest.approx(0.03)


def test_a_backlog_is_not_made_to_wait(clock: ManualClock) -> None:
    linger = Linger(linger_s=0.03, entries_min=5, clock=clock)
    pace = ClaimPace(shards=1, linger=linger, entries_large=100, bytes_large=1_000)
    pace.claimed(0, 100)
    assert pace.delay_s() == 0.0
    pace.claimed(0, 50)
    assert pace.delay_s() > 0.0
    pace.note_bytes(1_000)
    assert pace.delay_s() == 0.0


def test_backoff_doubles_to_its_most_and_forgets_on_success(clock: ManualClock) -> None:
    backoff = Backoff(first_s=0.1, most_s=1.0, clock=clock)
    waits = [backoff.fail() for _ in range(8)]
    for n, wait_s in enumerate(waits):
        whole = min(1.0, 0.1 * 2**n)
        assert whole / 2 <= wait_s <= whole
    assert backoff.delay_s() == waits[-1]
    clock.advance_s(2.0)
    assert backoff.delay_s() == 0.0
    assert backoff.failing_for_s() == 2.0
    backoff.succeed()
    assert (backoff.failures, backoff.failing_for_s()) == (0, 0.0)


def make_loop(turn: object, deaths: Deaths, settings: RoleSettings = ROLE_SETTINGS) -> RoleLoop:
    return RoleLoop(
        role="test",
        turn=turn,  # type: ignore[arg-type]
        settings=settings,
        clock=SystemClock(),
        metrics=MemoryMetrics(),
        on_fatal=deaths,
    )


async def test_a_loop_that_keeps_failing_ends_the_process() -> None:
    died = asyncio.Event()
    calls = 0

    class Died(Deaths):
        def __call__(self, role: str, error: BaseException) -> None:
            super().__call__(role, error)
            died.set()

    async def turn() -> float:
        nonlocal calls
        calls += 1
        raise RuntimeError("broken")

    deaths = Died()
    loop = make_loop(turn, deaths)
    loop.start()
    await asyncio.wait_for(died.wait(), 5)
    await loop.stop()
    assert deaths.seen[0][0] == "test"
    assert calls >= ROLE_SETTINGS.failures_max


async def test_absence_of_the_backend_is_waited_out() -> None:
    calls = 0
    recovered = asyncio.Event()

    async def turn() -> float:
        nonlocal calls
        calls += 1
        if calls <= 3 * ROLE_SETTINGS.failures_max:
            raise Unavailable("away")
        recovered.set()
        return 60.0

    deaths = Deaths()
    loop = make_loop(turn, deaths)
    loop.start()
    await asyncio.wait_for(recovered.wait(), 5)
    status = loop.status()
    await loop.stop()
    assert deaths.seen == []
    assert status.failures == 0


async def test_absence_that_lasts_ends_the_process() -> None:
    died = asyncio.Event()

    class Died(Deaths):
        def __call__(self, role: str, error: BaseException) -> None:
            died.set()

    async def turn() -> float:
        raise Unavailable("away")

    settings = with_settings(ROLE_SETTINGS, unavailable_s_max=0.02)
    loop = make_loop(turn, Died(), settings)
    loop.start()
    await asyncio.wait_for(died.wait(), 5)
    await loop.stop()


async def test_wake_ups_cut_waiting_short_and_starting_twice_changes_nothing() -> None:
    turned = asyncio.Queue[int]()
    count = 0

    async def turn() -> float:
        nonlocal count
        count += 1
        turned.put_nowait(count)
        return 60.0

    loop = make_loop(turn, Deaths())
    loop.start()
    loop.start()
    assert await asyncio.wait_for(turned.get(), 5) == 1
    loop.wake.set()
    assert await asyncio.wait_for(turned.get(), 5) == 2
    assert loop.status().running
    await loop.stop()
    await loop.stop()
    assert not loop.status().running


def test_settings_that_break_the_mechanism_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="claim_poll_ms"):
        RoleSettings(claim_poll_ms=0)
    assert RoleSettings(linger_ms=0).linger_ms == 0
