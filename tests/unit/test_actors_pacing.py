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


class Work:
    """Rounds of one shard, one after the other, while rows come at a steady rate. A round takes
    processor time of its own and some for each entry, and twice as long by the clock."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.spent_s = 0.0
        self.linger = Linger(
            linger_s=0.03,
            entries_min=5,
            clock=clock,
            load_s_max=0.25,
            spent_s=lambda: self.spent_s,
        )
        self.pace = ClaimPace(
            shards=1, linger=self.linger, entries_large=1_000, bytes_large=1_000_000
        )

    def round_of(self, entries: int, cost_s: float) -> None:
        self.pace.claimed(0, entries)
        self.spent_s += cost_s
        self.clock.advance_s(2 * cost_s)

    def rounds(
        self, seconds: float, *, entries_per_s: float, fixed_s: float, entry_s: float = 0.0
    ) -> list[tuple[int, float]]:
        """Entries of each round and the time from the round before to it."""
        begun, came = [], 0.0
        last_s, until_s = self.clock.monotonic_s(), self.clock.monotonic_s() + seconds
        while self.clock.monotonic_s() < until_s:
            self.clock.advance_s(self.pace.delay_s())
            since_s = self.clock.monotonic_s() - last_s
            entries = int(came + since_s * entries_per_s)
            if not entries:  # the hint of the next row wakes it
                self.pace.nothing_claimed()
                self.clock.advance_s(1 / entries_per_s)
                continue
            came += since_s * entries_per_s - entries
            last_s = self.clock.monotonic_s()
            begun.append((entries, since_s))
            self.round_of(entries, fixed_s + entries * entry_s)
        return begun


def test_alone_is_at_once_whatever_a_round_costs(clock: ManualClock) -> None:
    work = Work(clock)
    for _ in range(200):  # one writer, which waits for its rows before it writes again
        assert work.pace.delay_s() == 0.0
        work.round_of(1, 0.02)
    assert work.linger.pause_s == pytest.approx((2 + 0.75 * 0.15) * 0.02, rel=0.01)
    assert work.linger.pause_s > 0.04


def test_flooded_rounds_grow_with_what_they_cost_and_with_the_flood(clock: ManualClock) -> None:
    work = Work(clock)
    begun = work.rounds(10.0, entries_per_s=800, fixed_s=0.02)
    entries, since_s = begun[0]
    assert (entries, since_s) == (1, 1 / 800)
    assert begun[1][0] < 40  # at once, then as by the settings
    entries, since_s = begun[-1]
    assert since_s == pytest.approx((2 + 0.75 * 800 * 0.03 / 5) * 0.02, rel=0.05)
    assert entries == pytest.approx(800 * since_s, abs=2)


def test_what_grows_with_the_rows_lengthens_pauses_too_and_they_settle(
    clock: ManualClock,
) -> None:
    begun = Work(clock).rounds(10.0, entries_per_s=1_000, fixed_s=0.01, entry_s=0.00005)
    # pause = (2 + 0.75 * 6) * (0.01 + 0.00005 * 1000 * pause)
    assert begun[-1][1] == pytest.approx(0.065 / 0.675, rel=0.1)
    assert begun[-1][1] == pytest.approx(begun[-2][1], rel=0.05)


def test_no_load_makes_a_pause_longer_than_the_longest(clock: ManualClock) -> None:
    work = Work(clock)
    begun = work.rounds(20.0, entries_per_s=800, fixed_s=0.1)
    assert max(since_s for _, since_s in begun) <= 0.25 + 1e-9
    assert work.linger.pause_s == pytest.approx(0.25, rel=0.01)
    work.round_of(200, 60.0)
    work.round_of(200, 0.0)  # one that stood still counts no more than that
    assert work.linger.pause_s <= 0.25


def test_after_a_flood_the_first_is_at_once_and_cheap_rounds_bring_the_pause_back(
    clock: ManualClock,
) -> None:
    work = Work(clock)
    work.rounds(10.0, entries_per_s=800, fixed_s=0.1)
    clock.advance_s(1.0)
    assert work.pace.delay_s() == 0.0
    work.rounds(5.0, entries_per_s=400, fixed_s=0.004)
    assert work.linger.pause_s == pytest.approx(0.03)


def test_what_is_spent_while_nothing_is_begun_is_no_cost_of_the_next(clock: ManualClock) -> None:
    work = Work(clock)
    work.round_of(8, 0.001)
    work.spent_s += 5.0  # an hour of polls
    clock.advance_s(3_600.0)
    work.round_of(8, 0.001)
    assert work.linger.pause_s == pytest.approx(0.03)


def test_a_long_pause_wants_as_many_entries_a_second_as_a_short_one(clock: ManualClock) -> None:
    work = Work(clock)
    for _ in range(50):
        work.round_of(1, 0.12)
        clock.advance_s(0.1)
    clock.advance_s(0.5)
    assert work.linger.pause_s == pytest.approx(0.242, rel=0.01)
    work.pace.claimed(0, 39)
    assert (work.linger.loaded(), work.linger.delay_s()) == (False, 0.0)
    work.linger.carry(2)
    assert work.linger.loaded()
    assert work.linger.delay_s() == pytest.approx(0.242, rel=0.01)


def test_who_wants_no_linger_has_none_however_much_a_round_costs(clock: ManualClock) -> None:
    def never() -> float:
        raise AssertionError("nobody asks what was spent")

    linger = Linger(linger_s=0.0, entries_min=5, clock=clock, load_s_max=0.25, spent_s=never)
    linger.begin(500)
    linger.begin(500)
    assert (linger.pause_s, linger.delay_s()) == (0.0, 0.0)


def test_the_longest_pause_of_load_may_be_the_shortest_one(clock: ManualClock) -> None:
    work = Work(clock)
    work.linger = Linger(linger_s=0.03, entries_min=5, clock=clock, load_s_max=0.03)
    for _ in range(10):
        work.linger.begin(100)
        clock.advance_s(0.01)
    assert work.linger.pause_s == 0.03


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


def test_a_claim_after_which_nothing_is_left_ends_the_round(clock: ManualClock) -> None:
    linger = Linger(linger_s=0.03, entries_min=5, clock=clock)
    pace = ClaimPace(shards=3, linger=linger, entries_large=100, bytes_large=1_000)
    pace.claimed(0, 4)
    assert not pace.over
    pace.claimed(1, 4, more=False)
    assert pace.over
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
