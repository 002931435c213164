"""Turns: who is admitted in which order, counted; and what a flood does to others, in time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from lakebus.errors import RateLimited, Unavailable
from storage.memory_clock import ManualClock
from storage.turns import OURSELVES, Party, Turns

FLOOD, VICTIM, THIRD = Party(1), Party(2), Party(3)
FAR_S = 1e9


def made(places: int = 2, **more: object) -> tuple[Turns, ManualClock]:
    clock = ManualClock()
    given = {"waiting_max": 100, **more}
    return Turns("queries", places=places, clock=clock, **given), clock  # type: ignore[arg-type]


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Line:
    """Requests for turns, and the order in which they were admitted."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.admitted: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, party: Party) -> None:
        async def take() -> None:
            await self.turns.take(party, FAR_S)
            self.admitted.append(name)

        self.tasks[name] = asyncio.create_task(take())
        await settled()

    async def give(self, party: Party) -> None:
        self.turns.give(party)
        await settled()

    async def leave(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait((self.tasks[name],))


async def test_who_is_alone_takes_all_places() -> None:
    turns, _ = made(places=3)
    line = Line(turns)
    for number in range(5):
        await line.ask(f"a{number}", FLOOD)
    assert line.admitted == ["a0", "a1", "a2"]
    assert (turns.held, turns.waiting) == (3, 2)
    for _ in range(3):
        await line.give(FLOOD)
    assert line.admitted == ["a0", "a1", "a2", "a3", "a4"]


async def test_places_go_round_and_in_order_within_one() -> None:
    turns, _ = made(places=1)
    line = Line(turns)
    await line.ask("a0", FLOOD)
    for number in range(1, 4):
        await line.ask(f"a{number}", FLOOD)
    await line.ask("b0", VICTIM)
    await line.ask("b1", VICTIM)
    await line.ask("c0", THIRD)
    for name in ("a0", "a1", "b0", "c0", "a2", "b1"):
        assert line.admitted[-1] == name
        await line.give({"a": FLOOD, "b": VICTIM, "c": THIRD}[name[0]])
    assert line.admitted == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


async def test_a_principal_that_is_there_has_its_share_kept() -> None:
    turns, clock = made(places=4)
    line = Line(turns)
    await line.ask("b0", VICTIM)
    for number in range(6):
        await line.ask(f"a{number}", FLOOD)
    assert line.admitted == ["b0", "a0", "a1"]
    # Between two of its requests too: the place that it left stays free for a second.
    await line.give(VICTIM)
    assert line.admitted == ["b0", "a0", "a1"]
    await line.ask("b1", VICTIM)
    assert line.admitted[-1] == "b1"
    await line.give(VICTIM)
    assert line.admitted[-1] == "b1"
    # Then it is the flood's, without waiting for the end of any turn.
    clock.advance_s(1.0)
    await settled()
    assert line.admitted[-2:] == ["a2", "a3"]
    await line.give(FLOOD)
    assert line.admitted[-1] == "a4"


async def test_more_principals_than_places_get_one_each_at_most() -> None:
    turns, _ = made(places=2)
    line = Line(turns)
    for party in (FLOOD, VICTIM, THIRD):
        for number in range(2):
            await line.ask(f"{party.principal_id}-{number}", party)
    assert line.admitted == ["1-0", "1-1"]  # it was alone
    await line.give(FLOOD)
    assert line.admitted[-1] == "2-0"
    await line.give(FLOOD)
    assert line.admitted[-1] == "3-0"


async def test_a_flood_does_not_stand_in_the_way_where_places_are_no_bound() -> None:
    turns, _ = made(places=4, alone=64)
    line = Line(turns)
    for number in range(20):
        await line.ask(f"a{number}", FLOOD)
    assert turns.held == 20
    await line.ask("b0", VICTIM)
    assert line.admitted[-1] == "b0"
    await line.ask("a20", FLOOD)
    for _ in range(18):
        await line.give(FLOOD)
    assert line.admitted[-1] == "b0"
    await line.give(FLOOD)
    assert line.admitted[-1] == "a20"


async def test_a_bound_of_ones_own_holds_while_alone() -> None:
    turns, _ = made(places=4)
    line = Line(turns)
    bound = Party(7, at_once_max=1)
    await line.ask("x0", bound)
    await line.ask("x1", bound)
    assert line.admitted == ["x0"]
    await line.give(bound)
    assert line.admitted == ["x0", "x1"]


async def test_when_the_line_is_full_who_waits_most_is_refused() -> None:
    turns, _ = made(places=1, waiting_max=3)
    line = Line(turns)
    for number in range(4):
        await line.ask(f"a{number}", FLOOD)
    with pytest.raises(RateLimited) as mine:
        await turns.take(FLOOD, FAR_S)
    assert mine.value.members == {"limit": "queries_waiting", "limit_value": 3}
    assert mine.value.retry_after_s == 1.0
    await line.ask("b0", VICTIM)
    with pytest.raises(RateLimited):
        line.tasks["a3"].result()
    await line.ask("c0", THIRD)
    with pytest.raises(RateLimited):
        line.tasks["a2"].result()
    with pytest.raises(Unavailable) as theirs:
        await turns.take(Party(4), FAR_S)
    assert theirs.value.members == {"phase": "queue"}
    assert (turns.held, turns.waiting) == (1, 3)
    await line.give(FLOOD)
    assert line.admitted[-1] == "a1"
    await line.give(FLOOD)
    await line.give(VICTIM)
    await line.give(THIRD)
    assert (turns.held, turns.waiting) == (0, 0)


async def test_a_deadline_ends_the_wait_and_leaves_nothing() -> None:
    turns = Turns("queries", places=1, waiting_max=9)
    await turns.take(FLOOD, FAR_S)
    with pytest.raises(TimeoutError):
        await turns.take(VICTIM, time.monotonic() + 0.01)
    with pytest.raises(TimeoutError):
        await turns.take(VICTIM, time.monotonic() - 1)
    assert (turns.held, turns.waiting) == (1, 0)
    turns.give(FLOOD)
    await turns.take(VICTIM, FAR_S)
    turns.give(VICTIM)
    assert turns.held == 0


async def test_who_leaves_is_passed_over_and_a_place_that_came_too_late_goes_on() -> None:
    turns, _ = made(places=1)
    line = Line(turns)
    for name in ("a0", "a1", "a2"):
        await line.ask(name, FLOOD)
    await line.ask("b0", VICTIM)
    await line.leave("a1")
    assert turns.waiting == 2
    line.tasks["a2"].cancel()  # and before it can say so, its turn comes
    turns.give(FLOOD)
    await settled()
    assert line.admitted == ["a0", "b0"]
    await line.ask("a3", FLOOD)
    turns.give(VICTIM)
    line.tasks["a3"].cancel()  # its turn has come, and nobody is there to take it
    await settled()
    assert (turns.held, turns.waiting) == (0, 0)


async def test_our_own_work_is_a_party_like_others() -> None:
    turns, _ = made(places=2)
    await turns.take(OURSELVES, FAR_S)
    turns.give(OURSELVES)
    assert turns.held == 0


# --- who takes most ----------------------------------------------------------------------------


def takes_most(turns: Turns, party: Party) -> bool:
    line = turns._lines.get(party.principal_id)
    return line is not None and turns._takes_most(line, turns._clock.monotonic_s())


async def test_who_has_had_more_than_an_equal_part_of_late_takes_most() -> None:
    turns, clock = made(places=4)
    await turns.take(FLOOD, FAR_S)
    clock.advance_s(0.5)
    assert not takes_most(turns, FLOOD)  # of nobody's part: it is alone
    await turns.take(VICTIM, FAR_S)
    assert [takes_most(turns, party) for party in (FLOOD, VICTIM, THIRD)] == [True, False, False]
    clock.advance_s(4.0)  # as much for each, of late
    assert not takes_most(turns, FLOOD)
    turns.give(VICTIM)
    clock.advance_s(0.9)
    assert takes_most(turns, FLOOD)
    clock.advance_s(0.1)  # it counts as there no more
    assert not takes_most(turns, FLOOD)


async def test_two_that_take_most_do_not_hide_each_other() -> None:
    turns, clock = made(places=6)
    for party in (FLOOD, THIRD):
        await turns.take(party, FAR_S)
    clock.advance_s(0.5)
    assert not takes_most(turns, FLOOD)
    await turns.take(VICTIM, FAR_S)
    assert takes_most(turns, FLOOD)
    assert takes_most(turns, THIRD)
    assert not takes_most(turns, VICTIM)


async def test_what_was_used_is_remembered_between_two_requests() -> None:
    turns, clock = made(places=4)
    await turns.take(VICTIM, FAR_S)
    for _ in range(50):
        await turns.take(FLOOD, FAR_S)
        clock.advance_s(0.010)
        turns.give(FLOOD)
    turns.give(VICTIM)
    await turns.take(FLOOD, FAR_S)
    assert not takes_most(turns, FLOOD)  # both had a place all the time
    turns.give(FLOOD)


async def test_a_paced_principal_goes_on_when_its_time_comes() -> None:
    turns, clock = made(places=2)
    line = Line(turns)
    await line.ask("b0", VICTIM)
    await line.give(VICTIM)
    await line.ask("a0", FLOOD)
    for number in range(1, 9):
        await line.ask(f"a{number}", FLOOD)
    for _ in range(4):
        clock.advance_s(0.010)
        await line.give(FLOOD)
        if turns.held == 0:
            break
    # A place is free, and none of its turns goes on that could end: only time passes.
    assert (turns.held, line.admitted[-1]) == (0, "a2")
    clock.advance_s(0.010)
    await settled()
    assert (turns.held, line.admitted[-1]) == (1, "a3")


# --- a flood, in simulated time --------------------------------------------------------------


async def p99_ms(
    turns: Turns, clock: ManualClock, *, flood: int, victims: int = 1, turn_s: float = 0.010
) -> tuple[int, Counter[str]]:
    """The victim's waits beside so many clients of another principal, in 3 s."""

    waits: list[int] = []
    served: Counter[str] = Counter()

    async def client(party: Party, pause_s: float, turn_s: float) -> None:
        while True:
            asked_s = clock.monotonic_s()
            await turns.take(party, FAR_S)
            if party is VICTIM:
                waits.append(round((clock.monotonic_s() - asked_s) * 1000))
            await clock.sleep_s(turn_s)
            served["victim" if party is VICTIM else "flood"] += 1
            turns.give(party)
            await clock.sleep_s(pause_s)

    clients = [client(VICTIM, 0.050, 0.010) for _ in range(victims)]
    clients += [client(FLOOD, 0.0, turn_s) for _ in range(flood)]
    tasks = [asyncio.create_task(one) for one in clients]
    for _ in range(3_000):
        clock.advance_s(0.001)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return (sorted(waits)[len(waits) * 99 // 100] if waits else 0), served


async def test_a_flood_does_not_move_anothers_p99() -> None:
    alone_ms, alone = await p99_ms(*made(places=4), flood=0)
    beside_ms, beside = await p99_ms(*made(places=4), flood=40)
    # A turn of 10 ms and the wait for it: at most twice as long as alone.
    assert alone_ms == 0
    assert 10 + beside_ms <= 2 * 10
    assert beside["victim"] >= alone["victim"] * 0.9
    # And the flood has half of the pace of its share, which is half of the places.
    share = 2 * 3.0 / 0.010
    assert share * 0.4 <= beside["flood"] <= share * 0.6


async def test_who_is_alone_is_not_paced() -> None:
    _, served = await p99_ms(*made(places=4), flood=40, victims=0)
    assert served["flood"] >= 4 * 3.0 / 0.010 * 0.8


async def test_long_turns_have_all_of_their_share() -> None:
    _, served = await p99_ms(*made(places=4), flood=40, turn_s=0.100)
    assert served["flood"] >= 2 * 3.0 / 0.100 * 0.8
