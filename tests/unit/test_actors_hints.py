"""Wake-up hints over loopback datagrams."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from actors.hints import COORDINATOR_ROLE, HintReceiver, HintSender
from actors.wake import Wake
from lakebus.clock import SystemClock
from lakebus.errors import Unavailable
from tests.unit.actors_rig import Overlay, Rig, with_settings


@pytest.fixture
def rig() -> Rig:
    return Rig(clock=SystemClock())


def receiver(rig: Rig, wake: Wake, *, stack: str = "rig", instance: str = "one") -> HintReceiver:
    return HintReceiver(
        stack=stack,
        instance=instance,
        host="127.0.0.1",
        directory=rig.hints,
        heard=wake.set,
        settings=rig.settings,
        clock=rig.clock,
        metrics=rig.metrics,
        on_fatal=rig.deaths,
    )


def sender(rig: Rig, directory: object = None) -> HintSender:
    return HintSender(
        stack="rig",
        directory=directory or rig.hints,  # type: ignore[arg-type]
        settings=rig.settings,
        clock=rig.clock,
        metrics=rig.metrics,
        on_fatal=rig.deaths,
    )


@pytest.fixture
async def heard(rig: Rig) -> AsyncIterator[Wake]:
    wake = Wake()
    each = receiver(rig, wake)
    await each.start()
    await each.run_once()
    yield wake
    await each.stop()


async def test_a_hint_wakes_the_receiver(rig: Rig, heard: Wake) -> None:
    each = sender(rig)
    assert len((await each.run_once()).addresses) == 1
    each.hint()
    assert await heard.wait(5.0)
    await each.stop()


async def test_hints_are_rate_limited_and_the_last_of_a_burst_arrives(
    rig: Rig, heard: Wake
) -> None:
    rig.settings = with_settings(rig.settings, hint_every_ms=20)
    each = sender(rig)
    await each.run_once()
    for _ in range(1_000):
        each.hint()
    assert await heard.wait(5.0)
    assert await heard.wait(5.0)
    assert rig.metrics.value("lakebus_hints_sent_total") == 2
    await each.stop()


async def test_foreign_datagrams_wake_nobody(rig: Rig, heard: Wake) -> None:
    (address,) = await rig.hints.receivers(COORDINATOR_ROLE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint:
        endpoint.sendto(b"lbh1:another stack", address)
        endpoint.sendto(b"", address)
        endpoint.sendto(b"x" * 60_000, address)
        endpoint.sendto(b"lbh1:rig", address)
    assert await heard.wait(5.0)
    assert rig.metrics.value("lakebus_hints_received_total") == 1


async def test_a_dead_receiver_does_not_hide_a_living_one(rig: Rig, heard: Wake) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint:
        endpoint.bind(("127.0.0.1", 0))
        port = endpoint.getsockname()[1]
    await rig.hints.announce(COORDINATOR_ROLE, "dead", "127.0.0.1", port)
    rig.settings = with_settings(rig.settings, hint_every_ms=0)
    each = sender(rig)
    await each.run_once()
    for _ in range(3):
        each.hint()
        assert await heard.wait(5.0)
    await each.stop()


async def test_without_receivers_a_hint_is_nothing(rig: Rig) -> None:
    each = sender(rig)
    await each.run_once()
    each.hint()
    assert rig.metrics.value("lakebus_hints_sent_total") == 0
    await each.stop()


async def test_a_directory_that_is_away_leaves_the_known_addresses(rig: Rig, heard: Wake) -> None:
    away = False

    async def receivers(role: str) -> object:
        if away:
            raise Unavailable("no database")
        return await rig.hints.receivers(role)

    each = sender(rig, Overlay(rig.hints, receivers=receivers))
    await each.run_once()
    away = True
    with pytest.raises(Unavailable):
        await each.run_once()
    each.hint()
    assert await heard.wait(5.0)
    await each.stop()


async def test_start_and_stop_repeat(rig: Rig) -> None:
    wake = Wake()
    each = receiver(rig, wake)
    for _ in range(3):
        await each.start()
        assert each.address is not None
        await each.stop()
        assert each.address is None
    loops = sender(rig)
    for _ in range(3):
        await loops.start()
        await loops.stop()


async def test_wake_is_remembered_and_joined() -> None:
    wake = Wake()
    assert not await wake.wait(0.0)
    wake.set()
    wake.set()
    assert await wake.wait(5.0)
    assert not await wake.wait(0.001)
    task = asyncio.create_task(wake.wait(5.0))
    await asyncio.sleep(0)
    wake.set()
    assert await task
