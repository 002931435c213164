"""Readers' pins on virtual time: what is held is protected in the database, whatever goes wrong."""

from __future__ import annotations

import asyncio
import time

import pytest

from lakebus.errors import OutcomeUnknown, SnapshotExpired, Unavailable
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.maintenance.interface import Pin
from storage.memory_lake import MemoryLake
from storage.reading.holds import Unpinned, held
from storage.reading.pins import PinKeeper, PinSettings
from tests.unit.pins_rig import SETTINGS, Effect, Rig, Trouble, away, lost


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_E3_a_usual_query_is_covered_without_a_call(rig: Rig) -> None:
    async def story() -> None:
        rig.start()
        (await rig.keeper.hold(rig.publish())).release()  # the first waits for the first pin
        for _ in range(20):
            await asyncio.sleep(1)
            head = rig.publish()
            calls = len(rig.wire.calls)
            hold = await rig.keeper.hold(head)
            assert len(rig.wire.calls) == calls
            await rig.expire_all_but_the_head()
            assert rig.sound(hold)
            hold.release()
        # The floor follows the newest snapshot, one renewal behind.
        assert rig.keeper.floor is not None
        assert rig.keeper.floor >= head - 2 * SETTINGS.renew_s - 1
        assert rig.keeper.held == 0

    rig.run(story())


def test_E3_a_snapshot_is_held_over_renewals_while_it_expires(rig: Rig) -> None:
    async def story() -> None:
        rig.publish(9)
        rig.start()
        old = await rig.keeper.hold(4)
        new = await rig.keeper.hold(10)
        assert rig.wire.calls == [(10, ()), (10, (4,))]
        for _ in range(60):
            await asyncio.sleep(10)  # five times as long as the pin lives
            rig.publish(3)
            await rig.expire_all_but_the_head()
            assert rig.sound(old)
            assert rig.sound(new)
        assert not rig.protected(5)
        old.release()
        await asyncio.sleep(3 * SETTINGS.renew_s)
        assert not rig.protected(4)
        assert rig.sound(new)
        with pytest.raises(SnapshotExpired):
            await rig.keeper.hold(4)
        new.release()
        await asyncio.sleep(3 * SETTINGS.renew_s)
        assert not rig.protected(10)

    rig.run(story())


def test_E3_an_expired_snapshot_is_refused_and_its_neighbours_in_the_call_are_not(rig: Rig) -> None:
    async def story() -> None:
        rig.publish(19)
        rig.start()
        (await rig.keeper.hold(20)).release()
        await rig.upkeep.expire_snapshots(keep_s=0, keep_count=10, limit=100)
        answers = await asyncio.gather(
            *(rig.keeper.hold(n) for n in (4, 12, 5, 13, 12)), return_exceptions=True
        )
        refused = [isinstance(answer, SnapshotExpired) for answer in answers]
        assert refused == [True, False, True, False, False]
        for answer in answers:
            assert isinstance(answer, SnapshotExpired) or rig.sound(answer)  # type: ignore[arg-type]

    rig.run(story())


def test_E3_a_tagged_snapshot_below_the_oldest_is_held_and_one_onward_from_it_is_not(
    rig: Rig,
) -> None:
    async def story() -> None:
        rig.publish(9)
        await rig.upkeep.create_tag("kept", 3, created_by="t")
        await rig.expire_all_but_the_head()
        rig.start()
        hold = await rig.keeper.hold(3)
        await rig.upkeep.drop_tag("kept")
        await asyncio.sleep(1_000)
        assert rig.sound(hold)
        with pytest.raises(SnapshotExpired):
            await rig.keeper.hold(3, onward=True)

    rig.run(story())


def test_E3_a_hold_onward_protects_every_snapshot_after_it(rig: Rig) -> None:
    async def story() -> None:
        rig.publish(19)
        rig.start()
        (await rig.keeper.hold(20)).release()
        named = await rig.keeper.hold(6)
        onward = await rig.keeper.hold(6, onward=True)
        assert rig.keeper.floor == 6
        await rig.expire_all_but_the_head()
        for _ in range(5):
            await asyncio.sleep(SETTINGS.ttl_s)
            assert rig.sound(named)
            assert rig.sound(onward)
        onward.release()
        await asyncio.sleep(3 * SETTINGS.renew_s)
        assert rig.protected(6)

    rig.run(story())


def test_E3_a_hold_made_while_a_higher_floor_is_on_its_way_must_lie_above_it(rig: Rig) -> None:
    async def story() -> None:
        rig.start()
        (await rig.keeper.hold(1)).release()
        rig.publish(5)
        rig.wire.delay_s = 1.0
        while len(rig.wire.calls) < 3 or rig.wire.calls[-1][0] == rig.wire.calls[-2][0]:
            await asyncio.sleep(0.5)
        floor = rig.wire.calls[-1][0]
        assert floor == 6
        assert rig.keeper.floor == 1  # the granted one still is lower
        calls = len(rig.wire.calls)
        above = await asyncio.wait_for(rig.keeper.hold(6), 0.001)
        below = asyncio.ensure_future(rig.keeper.hold(5))
        await asyncio.sleep(0.01)
        assert not below.done()
        await rig.expire_all_but_the_head()
        with pytest.raises(SnapshotExpired):
            await below
        assert len(rig.wire.calls) > calls
        assert rig.sound(above)

    rig.run(story())


@pytest.mark.parametrize("late", [False, True])
def test_E3_a_renewal_whose_answer_was_lost_counts_as_higher_floor_and_older_expiry(
    rig: Rig, late: bool
) -> None:
    """`late`: the lost call takes effect only after the next one has been granted."""

    async def story() -> None:
        effects: list[Effect] = []

        async def later(effect: Effect) -> Pin:
            effects.append(effect)
            raise OutcomeUnknown("the connection broke")

        rig.publish(9)
        rig.start()
        first = await rig.keeper.hold(10)
        first.release()
        rig.publish(10)
        await asyncio.sleep(SETTINGS.renew_s)
        granted = len(rig.lake.state.pins)
        rig.wire.fault = later if late else lost
        while rig.wire.calls[-1][0] != 20:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        rig.wire.fault = away
        with pytest.raises(Unavailable):  # the granted floor would cover it, the lost one does not
            await rig.keeper.hold(15)
        (await rig.keeper.hold(20)).release()
        rig.wire.fault = None
        holds = [await rig.keeper.hold(15), await rig.keeper.hold(12)]
        assert len(rig.lake.state.pins) == granted + 1  # a row that the lost call cannot reach
        for effect in effects:
            await effect()
        await rig.expire_all_but_the_head()
        for _ in range(100):
            await asyncio.sleep(SETTINGS.ttl_s / 20)
            assert all(map(rig.sound, holds))

    rig.run(story())


def test_E3_what_only_the_old_row_protects_stays_with_it_and_ends_with_it(rig: Rig) -> None:
    async def story() -> None:
        rig.publish(9)
        rig.start()
        old = await rig.keeper.hold(5)
        await rig.expire_all_but_the_head()
        rig.wire.fault = lost
        calls = len(rig.wire.calls)
        while len(rig.wire.calls) == calls:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        rig.wire.fault = None
        since_s = rig.loop.time()
        rig.publish(2)
        new = await rig.keeper.hold(12)
        while rig.sound(old):
            assert rig.sound(new)
            await asyncio.sleep(0.5)
        # A query may take 100 s.
        assert rig.loop.time() - since_s > 100
        assert rig.sound(new)
        assert rig.keeper.held == 1

    rig.run(story())


def test_E3_holds_break_before_the_pin_expires_when_the_database_is_away(rig: Rig) -> None:
    async def story() -> None:
        rig.start()
        hold = await rig.keeper.hold(rig.publish())
        stopped: list[float] = []
        hold.when_broken(lambda: stopped.append(rig.loop.time()))
        rig.wire.fault = away
        await rig.keeper.check()
        while not stopped:
            await asyncio.sleep(0.1)
        (pin,) = rig.lake.state.pins.values()
        assert pin.expires_at is not None
        left_s = (pin.expires_at - rig.lake.now()).total_seconds()
        assert SETTINGS.margin_s <= left_s + 0.2
        with pytest.raises(Unavailable):
            hold.check()
        with pytest.raises(Unavailable):
            await rig.keeper.check()
        with pytest.raises(Unavailable):
            await rig.keeper.hold(rig.lake.head.snapshot_id)
        rig.wire.fault = None  # it is back: queries are served, the broken one stays broken
        await asyncio.sleep(2 * SETTINGS.renew_s)
        await rig.keeper.check()
        assert rig.sound(await rig.keeper.hold(rig.publish()))
        assert not rig.sound(hold)

    rig.run(story())


@pytest.mark.parametrize("during_a_call", [False, True])
def test_E3_a_process_paused_for_three_ttls_finds_its_hold_broken_at_once(
    rig: Rig, during_a_call: bool
) -> None:
    async def story() -> None:
        rig.publish(9)
        rig.start()
        hold = await rig.keeper.hold(10)
        if during_a_call:
            rig.wire.delay_s = 0.5
            calls = len(rig.wire.calls)
            while len(rig.wire.calls) == calls:
                await asyncio.sleep(0.1)
        rig.process.paused = True
        await asyncio.sleep(3 * SETTINGS.ttl_s)
        rig.publish(3)
        await rig.expire_all_but_the_head()
        assert not rig.protected(10)
        assert not rig.sound(hold)  # before any task or timer of the process has run
        rig.loop.resume(rig.process)
        await asyncio.sleep(5)
        assert not rig.sound(hold)
        assert rig.sound(await rig.keeper.hold(13))

    rig.run(story())


@pytest.mark.parametrize("wrong_s", [3600.0, -3600.0])
def test_E3_a_clock_that_is_an_hour_wrong_changes_nothing(wrong_s: float) -> None:
    rig = Rig(wrong_s=wrong_s)

    async def story() -> None:
        rig.publish(9)
        rig.start()
        hold = await rig.keeper.hold(4)
        await rig.expire_all_but_the_head()
        for _ in range(50):
            await asyncio.sleep(SETTINGS.ttl_s / 10)
            rig.clock.step_s(-wrong_s / 7)
            assert rig.sound(hold)

    rig.run(story())


def test_E3_a_row_that_vanished_breaks_what_relied_on_it(rig: Rig) -> None:
    """As when the database's clock was set forward: our own cannot know."""

    async def story() -> None:
        rig.publish(9)
        rig.start()
        hold = await rig.keeper.hold(4)
        rig.lake.state.pins.clear()
        await rig.expire_all_but_the_head()
        await asyncio.sleep(2 * SETTINGS.renew_s)
        with pytest.raises(Unavailable):
            hold.check()
        assert rig.sound(await rig.keeper.hold(10))

    rig.run(story())


def test_E3_a_process_that_dies_leaves_a_pin_that_expires(rig: Rig) -> None:
    async def story() -> None:
        rig.publish(4)
        rig.start()
        await rig.keeper.hold(2)
        await rig.expire_all_but_the_head()
        rig.process.kill()
        await asyncio.sleep(SETTINGS.ttl_s - 1)
        assert rig.protected(2)
        await asyncio.sleep(2)
        assert not rig.protected(2)

    rig.run(story())


def test_E3_stopping_breaks_holds_and_gives_the_pin_back(rig: Rig) -> None:
    async def story() -> None:
        rig.start()
        hold = await rig.keeper.hold(rig.publish())
        await rig.keeper.stop()
        assert rig.lake.state.pins == {}
        with pytest.raises(Unavailable):
            hold.check()
        with pytest.raises(Unavailable):
            await rig.keeper.hold(rig.publish())
        with pytest.raises(Unavailable):
            await rig.keeper.check()
        await rig.keeper.stop()

    rig.run(story())


def test_E3_a_query_before_the_first_pin_waits_for_it(rig: Rig) -> None:
    async def story() -> None:
        rig.wire.delay_s = 2.0
        rig.start()
        await asyncio.sleep(0.1)
        with pytest.raises(Unavailable):
            await rig.keeper.check()
        head = rig.publish()
        waiting = [asyncio.ensure_future(rig.keeper.hold(n)) for n in (head, 1)]
        await asyncio.sleep(1)
        assert not any(one.done() for one in waiting)
        assert all(map(rig.sound, await asyncio.gather(*waiting)))
        await rig.keeper.check()

    rig.run(story())


def test_E3_a_caller_that_leaves_in_the_moment_of_the_grant_leaves_no_hold(rig: Rig) -> None:
    async def story() -> None:
        rig.publish(9)
        rig.start()
        for number in range(2, 9):
            caller = asyncio.ensure_future(rig.keeper.hold(number))
            while not caller.done():
                if rig.keeper.held:
                    caller.cancel()
                await asyncio.sleep(0)
            assert caller.cancelled()
            assert rig.keeper.held == 0

    rig.run(story())


def test_E3_guarded_work_is_stopped_when_the_hold_breaks(rig: Rig) -> None:
    async def story() -> None:
        rig.start()
        ended: list[str] = []

        async def reader() -> None:
            try:
                async with held(rig.keeper, 1):
                    await asyncio.Event().wait()
            finally:
                ended.append("reader")

        async def timed() -> None:
            async with held(rig.keeper, 1):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.Event().wait(), 1)
                raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await timed()
        task = asyncio.ensure_future(reader())
        await asyncio.sleep(60)
        rig.wire.fault = away
        with pytest.raises(Unavailable, match="lost its claim"):
            await task
        assert ended == ["reader"]
        assert rig.keeper.held == 0

    rig.run(story())


@pytest.mark.parametrize("seed", range(10))
def test_E3_whatever_goes_wrong_an_unbroken_hold_is_protected(seed: int) -> None:
    """At every moment at which a holder may go on, the database protects its snapshot."""
    rig = Rig(settings=PinSettings(renew_s=1.0, ttl_s=12.0, margin_s=2.0, call_s=1.5))
    trouble = Trouble(rig, seed)

    async def story() -> None:
        rig.publish(5)
        rig.start()
        for _ in range(6):
            rig.loop.spawn(rig.process, trouble.reader())
        for number in range(3_000):
            await trouble.step(number)
            for hold in list(trouble.holds):
                rig.sound(hold)

    rig.run(story())
    assert trouble.served > 50


async def test_E3_a_lake_without_deletes_needs_no_pins() -> None:
    async with held(Unpinned(), 5, onward=True):
        pass


async def test_holding_what_is_covered_costs_less_than_20_microseconds() -> None:
    """Against an order of magnitude: it takes 1 to 2 here."""
    lake = MemoryLake()
    keeper = PinKeeper(upkeep=MemoryUpkeep(lake), head=MemoryCatalog(lake).head)
    keeper.start()
    try:
        (await keeper.hold(1)).release()
        best_s = float("inf")
        for _ in range(20):
            began_s = time.perf_counter()
            for _ in range(100):
                hold = await keeper.hold(1)
                hold.check()
                hold.release()
            best_s = min(best_s, (time.perf_counter() - began_s) / 100)
        assert best_s < 20e-6
    finally:
        await keeper.stop()
