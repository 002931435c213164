"""The simulated event loop: virtual time, order, hangs, and processes that die, pause, go on."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.simulation.event_loop import Hang, SimulatedLoop


@pytest.fixture
def loop() -> SimulatedLoop:
    return SimulatedLoop(steps_max=10_000)


def test_time_jumps_to_the_next_timer(loop: SimulatedLoop) -> None:
    seen: list[tuple[str, int]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, round(loop.time())))

    async def world() -> None:
        await asyncio.gather(sleeper("b", 7200), sleeper("a", 3600))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.Event().wait()

    began_s = time.perf_counter()
    loop.run(world())
    assert seen == [("a", 3600), ("b", 7200)]
    assert round(loop.time()) == 7260
    assert time.perf_counter() - began_s < 5


def test_a_hang_names_who_waits_for_what(loop: SimulatedLoop) -> None:
    async def stuck_forever() -> None:
        await loop.create_future()

    async def world() -> None:
        other = loop.new_process("other")
        loop.spawn(other, stuck_forever(), name="the stuck one")
        await asyncio.Event().wait()

    with pytest.raises(Hang, match=r"(?s)other:\n  the stuck one: stuck_forever at .*test_simul"):
        loop.run(world())
    loop.close()


def test_a_loop_that_never_waits_is_a_hang_too(loop: SimulatedLoop) -> None:
    async def world() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Hang, match="no end after 10000 steps"):
        loop.run(world())
    loop.close()


def test_a_killed_process_does_not_even_clean_up(loop: SimulatedLoop) -> None:
    seen: list[str] = []

    async def victim() -> None:
        try:
            while True:
                seen.append("works")
                await asyncio.sleep(1)
        finally:
            seen.append("cleans up")

    async def world() -> list[str]:
        process = loop.new_process("victim")
        loop.spawn(process, victim())
        await asyncio.sleep(1.5)
        process.kill()
        await asyncio.sleep(100)
        return list(seen)

    assert loop.run(world()) == ["works", "works"]
    loop.close()


def test_a_process_dies_in_the_middle_of_its_steps(loop: SimulatedLoop) -> None:
    steps: list[int] = []
    died: list[str] = []
    loop.on_death = lambda process: died.append(process.name)

    async def victim() -> None:
        for number in range(100):
            steps.append(number)
            await asyncio.sleep(0)

    async def world() -> None:
        process = loop.new_process("victim")
        process.dies_after = 5
        loop.spawn(process, victim())
        await asyncio.sleep(1)

    loop.run(world())
    assert steps == [0, 1, 2, 3, 4]
    assert died == ["victim"]
    loop.close()


def test_a_paused_process_goes_on_with_what_became_due(loop: SimulatedLoop) -> None:
    ticks: list[int] = []

    async def clock() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(round(loop.time()))

    async def world() -> None:
        process = loop.new_process("zombie")
        loop.spawn(process, clock())
        await asyncio.sleep(2.5)
        process.paused = True
        await asyncio.sleep(10)
        loop.resume(process)
        await asyncio.sleep(2)

    loop.run(world())
    assert ticks == [1, 2, 12, 14] or ticks == [1, 2, 13, 14]
    loop.close()


def test_a_child_task_belongs_to_the_process_of_its_parent(loop: SimulatedLoop) -> None:
    async def child() -> None:
        await asyncio.sleep(1)

    async def parent() -> None:
        await asyncio.gather(child(), asyncio.create_task(child()))

    async def world() -> int:
        process = loop.new_process("family")
        await loop.spawn(process, parent())
        return len(process.tasks)

    assert loop.run(world()) == 3


def test_thread_work_happens_at_one_later_moment(loop: SimulatedLoop) -> None:
    loop.thread_s = lambda: 3.0

    async def world() -> tuple[int, int]:
        found = await asyncio.get_running_loop().run_in_executor(None, sum, [1, 2])
        return found, round(loop.time())

    assert loop.run(world()) == (3, 3)
