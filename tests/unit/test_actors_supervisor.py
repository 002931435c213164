"""The supervisor's tick: crew, begun drops, purge, backlog."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from actors.supervisor import NoCrew, RoleState, Supervisor
from lakebus.errors import TableNotFound, Unavailable
from storage.bus.interface import IngestBus, PurgeReport
from storage.catalog.interface import DropTicket
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import Overlay, Rig, with_settings


class Crew:
    """What a test says lives, and a record of what was done about it."""

    def __init__(self) -> None:
        self.states: dict[str, RoleState] = {}
        self.strangers: list[str] = []
        self.done: list[tuple[str, str]] = []
        self.away = False

    async def look(self) -> Sequence[RoleState]:
        if self.away:
            raise Unavailable("Ray does not answer")
        return list(self.states.values())

    async def create(self, role: str) -> None:
        self.done.append(("create", role))
        self.states[role] = RoleState(role, exists=True, age_s=0.0)

    async def replace(self, role: str) -> None:
        self.done.append(("replace", role))
        self.states[role] = RoleState(role, exists=True, age_s=0.0)

    async def end_strangers(self) -> Sequence[str]:
        ended, self.strangers = self.strangers, []
        return ended


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def rig(clock: ManualClock) -> Rig:
    return Rig(clock=clock, roles=with_settings(Rig().settings, tick_age_s_max=5.0))


def supervisor(rig: Rig, crew: object = None, bus: IngestBus | None = None) -> Supervisor:
    return Supervisor(
        bus=bus or rig.bus,
        catalog=rig.catalog,
        crew=crew or NoCrew(),  # type: ignore[arg-type]
        settings=rig.settings,
        clock=rig.clock,
        metrics=rig.metrics,
        on_fatal=rig.deaths,
    )


async def test_missing_roles_are_created_and_stale_ones_replaced(rig: Rig) -> None:
    crew = Crew()
    crew.states = {
        "core": RoleState("core", exists=True, age_s=0.5),
        "publisher": RoleState("publisher", exists=False),
        "coordinator-0": RoleState("coordinator-0", exists=True, age_s=6.0),
    }
    report = await supervisor(rig, crew).run_once()
    assert (report.created, report.replaced) == (["publisher"], ["coordinator-0"])
    assert crew.done == [("create", "publisher"), ("replace", "coordinator-0")]
    again = await supervisor(rig, crew).run_once()
    assert (again.created, again.replaced) == ([], [])


async def test_a_silent_role_gets_the_time_of_a_restart(rig: Rig, clock: ManualClock) -> None:
    crew = Crew()
    crew.states = {"core": RoleState("core", exists=True, age_s=None)}
    each = supervisor(rig, crew)
    assert (await each.run_once()).replaced == []
    clock.advance_s(4.0)
    assert (await each.run_once()).replaced == []
    clock.advance_s(2.0)
    assert (await each.run_once()).replaced == ["core"]


async def test_roles_of_an_older_code_version_are_ended(rig: Rig) -> None:
    crew = Crew()
    crew.strangers = ["core@old"]
    assert (await supervisor(rig, crew).run_once()).ended == ["core@old"]


async def test_A12_a_begun_drop_is_finished_once_its_entries_are_terminal(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]))
    await rig.catalog.begin_drop(name="events")
    each = supervisor(rig)
    assert (await each.run_once()).drops_finished == []
    publisher = rig.publisher()
    publisher.start()
    coordinator = rig.coordinator(publisher=publisher)
    await coordinator.run_once()
    assert (await each.run_once()).drops_finished == ["events"]
    assert await rig.catalog.table("events") is None
    with pytest.raises(TableNotFound):
        await rig.catalog.begin_drop(name="events")
    assert (await each.run_once()).drops_finished == []
    await coordinator.stop()
    await publisher.stop()


async def test_B10_purging_is_periodic_and_reports_what_it_gave_up(
    rig: Rig, clock: ManualClock
) -> None:
    purged: list[int] = []

    async def purge() -> PurgeReport:
        purged.append(1)
        return PurgeReport(segments_truncated=2, gave_up_on_lock=True)

    each = supervisor(rig, bus=Overlay(rig.bus, purge=purge))
    await each.run_once()
    await each.run_once()
    assert len(purged) == 1
    clock.advance_s(rig.settings.purge_every_s)
    await each.run_once()
    assert len(purged) == 2
    assert rig.metrics.value("lakebus_purged_segments_total") == 4
    assert rig.metrics.value("lakebus_purge_refused_total") == 2


async def test_the_backlog_is_measured(rig: Rig) -> None:
    events = await rig.create()
    accepted = await rig.append((events, [1, 2]))
    await supervisor(rig).run_once()
    shard = str(accepted.shard)
    assert rig.metrics.value("lakebus_backlog_entries", shard=shard) == 1
    assert rig.metrics.value("lakebus_backlog_bytes", shard=shard) > 0
    assert rig.metrics.value("lakebus_bus_end_position", shard=shard) == accepted.position + 1
    assert rig.metrics.value("lakebus_watermark_position", shard=shard) == accepted.position


async def test_one_step_that_has_to_wait_does_not_hold_up_the_others(rig: Rig) -> None:
    crew = Crew()
    crew.away = True
    report = await supervisor(rig, crew).run_once()
    assert report.failed == ["crew"]
    assert report.purge is not None


async def test_two_supervisors_finish_one_drop_once(rig: Rig) -> None:
    await rig.create()
    ticket: DropTicket = await rig.catalog.begin_drop(name="events")
    first, second = supervisor(rig), supervisor(rig)
    await first.run_once()
    assert await rig.catalog.finish_drop(ticket) == (await rig.catalog.head()).snapshot_id
    before = (await rig.catalog.head()).snapshot_id
    await second.run_once()
    assert (await rig.catalog.head()).snapshot_id == before
