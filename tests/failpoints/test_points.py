"""Arming in this process: turns, signals, and what is left over."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tests.failpoints import points
from tests.failpoints.actions import Crash, Delay, Pause, Raise, Run
from tests.failpoints.points import Abandoned, Failpoints, reach, reach_sync

#: Any marker of the product will do: nothing of the product runs here.
A, B = "group_commit.before_append", "group_commit.after_append"


async def test_unarmed_nothing_happens() -> None:
    await reach(A)
    reach_sync(A)


async def test_skip_and_times_count_arrivals() -> None:
    with Failpoints() as mine:
        armed = mine.arm(A, Raise(ValueError("now")), skip=2, times=2)
        outcomes = []
        for _ in range(6):
            try:
                await reach(A)
                outcomes.append("passed")
            except ValueError:
                outcomes.append("raised")
        assert outcomes == ["passed", "passed", "raised", "raised", "passed", "passed"]
        assert (armed.hits, armed.fired) == (6, 2)


async def test_a_pause_holds_each_until_resumed() -> None:
    with Failpoints() as mine:
        armed = mine.arm(A, Pause(), times=None)
        tasks = [asyncio.create_task(reach(A)) for _ in range(2)]
        await mine.reached(A, 2)
        assert not any(task.done() for task in tasks)
        armed.resume()
        await asyncio.gather(*tasks)
        third = asyncio.create_task(reach(A))
        await mine.reached(A, 3)
        assert not third.done()
        mine.disarm(A)
        await third


async def test_a_thread_is_held_and_seen_too() -> None:
    with Failpoints() as mine:
        armed = mine.arm(A, Pause())
        thread = threading.Thread(target=reach_sync, args=(A,))
        thread.start()
        await armed.reached()
        assert thread.is_alive()
        armed.resume()
        thread.join()


async def test_the_test_runs_its_own_function() -> None:
    seen = []

    async def note() -> None:
        seen.append("async")

    with Failpoints() as mine:
        mine.arm(A, Run(note))
        await reach(A)
        mine.disarm(A)
        mine.arm(A, Run(lambda: seen.append("plain")))
        reach_sync(A)
    assert seen == ["async", "plain"]


async def test_a_delay_lets_others_go_on() -> None:
    with Failpoints() as mine:
        mine.arm(A, Delay(0.05))
        began = time.monotonic()
        held = asyncio.create_task(reach(A))
        await mine.reached(A)
        await reach(A)
        assert not held.done()
        await held
        assert time.monotonic() - began >= 0.05


async def test_armed_and_never_reached_is_a_failure() -> None:
    async def forget_one() -> None:
        with Failpoints() as mine:
            mine.arm(A, Delay(0))
            mine.arm(B, Delay(0))
            await reach(B)

    with pytest.raises(AssertionError, match=f"never reached: {A}"):
        await forget_one()
    await reach(A)  # and nothing stays armed


async def test_whoever_is_still_paused_at_the_end_does_not_go_on() -> None:
    with Failpoints() as mine:
        mine.arm(A, Pause())
        task = asyncio.create_task(reach(A))
        await mine.reached(A)
    with pytest.raises(Abandoned):
        await task


def test_names_and_crashes_are_checked_when_arming() -> None:
    with Failpoints() as mine:
        with pytest.raises(ValueError, match="holds no marker"):
            mine.arm("no.after_such", Delay(0))
        with pytest.raises(ValueError, match="process of the tests"):
            mine.arm(A, Crash())
        mine.arm(A, Delay(0))
        with pytest.raises(ValueError, match="armed already"):
            mine.arm(A, Delay(0))
        reach_sync(A)


def test_a_function_of_the_test_that_waits_does_not_fit_a_plain_function() -> None:
    async def wait() -> None: ...

    with Failpoints() as mine:
        coroutine = wait()
        mine.arm(A, Run(lambda: coroutine))
        with pytest.raises(TypeError, match="plain function"):
            reach_sync(A)
        coroutine.close()


async def test_unarmed_costs_next_to_nothing() -> None:
    assert points._folder is None
    rounds = 20_000
    began = time.perf_counter()
    for _ in range(rounds):
        await reach(A)
    assert (time.perf_counter() - began) / rounds < 20e-6
