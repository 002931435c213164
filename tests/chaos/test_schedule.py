"""The schedule: a pure function of the seed that keeps its own rules."""

from __future__ import annotations

import pytest

from tests.chaos import schedule
from tests.chaos.kinds import BY_NAME, KINDS, Group, Need, Placement, available
from tests.chaos.schedule import Fault
from tests.chaos.victims import KNOWN

_ALL = frozenset(Need)


def planned(
    seed: int, placement: Placement = Placement.SPREAD, *, kills: bool = False
) -> list[Fault]:
    kinds = available(placement, offers=_ALL, kills=kills)
    return list(schedule.schedule(seed, kinds, seconds=300, gap_s=3.0, kills=kills))


def test_one_seed_is_one_schedule() -> None:
    assert planned(7) == planned(7)
    assert planned(7) != planned(8)


def test_it_survives_a_file() -> None:
    faults = tuple(planned(3))
    assert schedule.from_json(schedule.as_json(faults)) == faults


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("seed", range(20))
def test_faults_are_in_order_fit_the_run_and_the_placement(seed: int, placement: Placement) -> None:
    faults = planned(seed, placement)
    assert [fault.number for fault in faults] == list(range(len(faults)))
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    for fault in faults:
        low, high = fault.known.hold_s
        assert low <= fault.hold_s <= high
        assert fault.until_s <= 300
        assert placement in fault.known.placements


@pytest.mark.parametrize("seed", range(20))
def test_nothing_of_rays_side_is_struck_while_it_starts_anew(seed: int) -> None:
    faults = planned(seed)
    heavy = [fault for fault in faults if fault.known.heavy]
    for one in heavy:
        quiet_until_s = one.until_s + one.known.quiet_s
        inside = [fault for fault in faults if one.at_s < fault.at_s < quiet_until_s]
        assert not [fault.kind for fault in inside if fault.known.on_ray]
    assert sum(one.hold_s + one.known.quiet_s for one in heavy) <= 150


def test_a_run_of_some_minutes_meets_most_kinds() -> None:
    met = {fault.kind for seed in range(3) for fault in planned(seed)}
    wanted = {kind.name for kind in available(Placement.SPREAD, offers=_ALL)}
    assert len(met & wanted) > 0.9 * len(wanted)


def test_kills_come_often_and_mostly_fast() -> None:
    faults = planned(1, kills=True)
    assert len(faults) / 5 >= 18
    assert {fault.known.group for fault in faults} <= {Group.KILL, Group.STACK, Group.SESSIONS}
    cheap = [f for f in faults if f.known.victim in ("backend", "query_child", "coordinator", "")]
    assert len(cheap) > len(faults) / 2


def test_what_a_machine_does_not_offer_is_not_planned() -> None:
    names = {kind.name for kind in available(Placement.TOGETHER)}
    assert not names & {"full_objects", "full_data"}
    assert {kind.name for kind in available(Placement.TOGETHER, offers=_ALL)} >= {"full_data"}


def test_without_kinds_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no kind"):
        schedule.schedule(1, (), seconds=10, gap_s=1.0)


def test_a_deck_of_which_no_card_can_be_played_ends() -> None:
    heavy = BY_NAME["kill_gcs"]
    assert schedule.schedule(1, (heavy,), seconds=60, gap_s=1.0) == ()


def test_every_victim_is_known_and_every_name_is_one_kinds() -> None:
    victims = {kind.victim for kind in KINDS if kind.victim and kind.group is not Group.STACK}
    assert victims <= KNOWN
    assert len(BY_NAME) == len(KINDS)
