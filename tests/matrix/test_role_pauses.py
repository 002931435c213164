"""M10 at every step of a role: whoever is paused there is succeeded, goes on, and changes nothing.

In memory, with the real coordinator, lease manager, publisher and stager. What a paused process
does when it goes on is judged by what the lake holds then: each row once, and nothing undone.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from lakebus.clock import SystemClock
from lakebus.errors import LakebusError, Unavailable
from tests.failpoints.actions import Pause
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.unit.actors_rig import Overlay, Rig, random_owner
from tests.unit.test_actors_together import host, published, running

_TTL_MS = 300
_MARKERS = sorted(
    (
        *markers_of("coordinator"),
        *markers_of("stager"),
        *markers_of("lease_manager"),
        *markers_of("publisher"),
    )
)


async def _refuse(*_: object) -> None:
    raise Unavailable("the store is away")


async def _has_failed_before(rig: Rig) -> None:
    """Lets the lone entry expire once, so that the next worker proves itself with the canary."""

    assert await rig.bus.claim(random_owner()) is not None
    await asyncio.sleep(_TTL_MS / 1000 + 0.01)


async def _work(rig: Rig, name: str, publisher: Any) -> None:
    """One range, in the circumstances in which the marker is met."""

    store = Overlay(rig.store, put_new=_refuse) if name == "lease_manager.before_release" else None
    leases = rig.lease_manager()
    coordinator = rig.coordinator(publisher=publisher, leases=leases, store=store)
    if name == "publisher.before_read_back":
        rig.lake.faults.lose_replies.add("publish")
    if name == "lease_manager.before_renew":
        claim = await leases.acquire(random_owner())
        assert claim is not None
        await leases.renew([claim.lease])
        return
    await coordinator.run_once()


@pytest.mark.parametrize("name", _MARKERS)
async def test_M10_a_role_paused_at_any_step_changes_nothing_when_it_goes_on(
    failpoints: Failpoints, name: str
) -> None:
    rig = Rig(clock=SystemClock(), shards=1, lease_ttl_ms=_TTL_MS)
    # A file more than the claim's own is made when a range has rows of two partitions.
    layout = ["truncate(2, id)"] if name == "stager.after_intents" else []
    events = await rig.create("events", *layout)
    await rig.append((events, [1, 2]))
    if "canary" in name:
        await _has_failed_before(rig)
    failpoints.arm(name, Pause())
    publisher = rig.publisher()
    publisher.start()
    working = asyncio.create_task(_work(rig, name, publisher))
    await failpoints.reached(name)
    async with running(host(rig)):
        await published(rig)
        await rig.append((events, [3]))
        await published(rig)
        before = (await rig.rows(), await rig.bus.shard_status())
        failpoints.resume(name)
        with contextlib.suppress(LakebusError):  # it may be told that it is no longer the owner
            await asyncio.wait_for(working, 20)
        assert (await rig.rows(), await rig.bus.shard_status()) == before
    await publisher.stop()
    assert await rig.ids() == {1: 1, 2: 1, 3: 1}
    assert rig.deaths.seen == []
