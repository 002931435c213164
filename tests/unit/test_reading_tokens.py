"""Tokens: mapped across histories (D5), merged (D6), judged with as few questions as possible."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakebus.errors import (
    Quarantined,
    TokenHistoryLost,
    TokenUnknown,
    Unavailable,
    VisibilityTimeout,
)
from lakebus.tokens import TokenCodec, VisibilityToken, merge_all
from storage.catalog.interface import HistoryFork, LakeIdentity
from storage.reading.barrier import Barrier
from storage.reading.history import map_token
from storage.reading.resolve import SnapshotChoice
from storage.reading.watcher import HeadWatcher
from tests.conformance.harness import SUITE_SETTINGS, entry_of
from tests.conformance.memory import MemoryHarness
from tests.conformance.reader import reading
from tests.unit.reading_rig import HISTORY, HeadCatalog, head_of

_HANG_S = 10.0
A, B, C, LOST = (uuid.UUID(int=n) for n in (10, 11, 12, 13))
PATH = (
    HistoryFork(A, None, 0, {}),
    HistoryFork(B, A, 100, {0: 10, 1: 20}),
    HistoryFork(C, B, 90, {0: 8, 1: 30}),  # a backup of an earlier point of B was restored
)
SHARDS = (0, 1)


def mapped(token: VisibilityToken) -> VisibilityToken:
    return map_token(token, path=PATH, shards=SHARDS)


# --- mapping --------------------------------------------------------------------------------------


def test_D5_a_token_below_every_fork_keeps_its_words() -> None:
    own = frozenset({(0, 7)})
    assert mapped(VisibilityToken(A, 90, {0: 8, 1: 20}, own)) == VisibilityToken(
        C, 90, {0: 8, 1: 20}, own
    )
    assert mapped(VisibilityToken(B, 90, {1: 30})) == VisibilityToken(C, 90, {1: 30})
    assert mapped(VisibilityToken(C, 5_000, {0: 99})) == VisibilityToken(C, 5_000, {0: 99})


@pytest.mark.parametrize(
    "token",
    [
        VisibilityToken(A, 91),
        VisibilityToken(A, 0, {0: 9}),  # below the first fork, above the second
        VisibilityToken(A, 0, {1: 21}),
        VisibilityToken(A, 0, {2: 1}),
        VisibilityToken(B, 0, {1: 31}),
        VisibilityToken(B, 91),
        VisibilityToken(LOST),
    ],
)
def test_D5_a_token_above_a_fork_or_of_a_lost_line_is_lost(token: VisibilityToken) -> None:
    with pytest.raises(TokenHistoryLost):
        mapped(token)


def test_G2_a_shard_that_a_planned_change_removed_becomes_the_floor_of_the_fork() -> None:
    path = (HistoryFork(A, None, 0, {}), HistoryFork(B, A, 100, {0: 10, 1: 20}))
    token = map_token(VisibilityToken(A, 7, {0: 10, 1: 20}), path=path, shards=(0,))
    assert token == VisibilityToken(B, 100, {0: 10})
    kept = map_token(VisibilityToken(A, 7, {0: 10}), path=path, shards=(0,))
    assert kept == VisibilityToken(B, 7, {0: 10})


_tokens = st.builds(
    VisibilityToken,
    st.sampled_from([A, B, C]),
    st.integers(0, 110),
    st.dictionaries(st.integers(0, 2), st.integers(0, 35), max_size=3),
    st.frozensets(st.tuples(st.integers(0, 2), st.integers(0, 35)), max_size=3),
)


@given(st.lists(_tokens, min_size=1, max_size=5), st.randoms())
def test_D6_mapping_then_merging_is_one_demand_in_any_order(
    tokens: list[VisibilityToken], chance: object
) -> None:
    honoured = []
    for token in tokens:
        try:
            honoured.append(mapped(token))
        except TokenHistoryLost:
            continue
    shuffled = honoured * 2
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    merged, again = merge_all(honoured), merge_all(shuffled)
    assert merged == again
    if merged is not None:
        for snapshot_id in range(80, 111, 10):
            for at in range(0, 36, 5):
                mark = dict.fromkeys(range(3), at)
                assert merged.covered_by(snapshot_id, mark) == all(
                    t.covered_by(snapshot_id, mark) for t in honoured
                )


# --- the barrier ----------------------------------------------------------------------------------


class CountingBus:
    """The two questions a barrier asks a bus."""

    def __init__(self) -> None:
        self.end_reads = 0
        self.known_ends: dict[int, int] = {}
        self.asked: list[tuple[tuple[int, int], ...]] = []
        self.bad: set[tuple[int, int]] = set()
        self.fail = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def ends(self) -> Mapping[int, int]:
        self.end_reads += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fail:
            raise Unavailable("gone")
        return dict(self.known_ends)

    async def quarantined_of(self, entries: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
        self.asked.append(tuple(entries))
        await asyncio.sleep(0)
        found = [entry for entry in entries if entry in self.bad]
        return (f"b1-{found[0][0]}-{found[0][1]}", "poison") if found else None


class IdentityCatalog(HeadCatalog):
    def __init__(self) -> None:
        super().__init__(head_of(5, {0: 10, 1: 10}))
        self.path: tuple[HistoryFork, ...] = (HistoryFork(HISTORY, None, 0, {}),)
        self.identities = 0

    async def identity(self) -> LakeIdentity:
        self.identities += 1
        await asyncio.sleep(0)
        return LakeIdentity(uuid.UUID(int=9), b"s" * 32, self.path)


class Rig:
    def __init__(self) -> None:
        self.bus, self.catalog = CountingBus(), IdentityCatalog()
        self.watcher = HeadWatcher(self.catalog, poll_s=0.01)  # type: ignore[arg-type]
        self.barrier = Barrier(
            catalog=self.catalog,  # type: ignore[arg-type]
            bus=self.bus,  # type: ignore[arg-type]
            watcher=self.watcher,
            codec=TokenCodec(b"s" * 32),
        )

    async def wait(self, *tokens: VisibilityToken, within_s: float = _HANG_S) -> int:
        covered = await self.barrier.wait_for(tokens, deadline_s=time.monotonic() + within_s)
        return covered.head.snapshot_id


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    made.watcher.start()
    yield made
    await made.watcher.stop()
    await made.barrier.close()


def mine(shard: int, position: int) -> VisibilityToken:
    return VisibilityToken(HISTORY, 0, {shard: position + 1}, frozenset({(shard, position)}))


async def test_P17_a_covered_token_costs_one_head_read_and_its_check_once(rig: Rig) -> None:
    for _ in range(5):
        assert await rig.wait(mine(0, 4)) == 5
    assert (rig.catalog.reads, rig.bus.end_reads, len(rig.bus.asked)) == (5, 0, 1)
    await rig.wait(VisibilityToken(HISTORY, 5, {0: 10, 1: 3}))
    assert (rig.bus.end_reads, len(rig.bus.asked), rig.catalog.identities) == (0, 1, 0)


async def test_checks_of_many_callers_are_one_question(rig: Rig) -> None:
    await rig.watcher.fresh_head()
    await asyncio.gather(*(rig.wait(mine(n % 2, n // 2)) for n in range(20)))
    assert len(rig.bus.asked) <= 2
    assert {e for asked in rig.bus.asked for e in asked} == {(n % 2, n // 2) for n in range(20)}


async def test_D4_one_quarantined_entry_among_many_callers_is_only_its_owners(rig: Rig) -> None:
    rig.bus.bad = {(0, 3)}
    await rig.watcher.fresh_head()
    outcomes = await asyncio.gather(
        *(rig.wait(mine(0, n)) for n in range(10)), return_exceptions=True
    )
    for n, outcome in enumerate(outcomes):
        assert isinstance(outcome, Quarantined) is (n == 3), (n, outcome)
    rig.bus.bad = set()  # replayed
    assert await rig.wait(mine(0, 3)) == 5


async def test_D5_known_ends_never_refuse_and_save_the_question(rig: Rig) -> None:
    rig.bus.known_ends = {0: 20, 1: 10}
    for wanted, reads in ((15, 1), (20, 1), (18, 1)):
        with pytest.raises(VisibilityTimeout):
            await rig.wait(VisibilityToken(HISTORY, 0, {0: wanted}), within_s=0.03)
        assert rig.bus.end_reads == reads
    with pytest.raises(TokenUnknown):
        await rig.wait(VisibilityToken(HISTORY, 0, {0: 21}))
    rig.bus.known_ends = {0: 21, 1: 10}
    with pytest.raises(VisibilityTimeout):
        await rig.wait(VisibilityToken(HISTORY, 0, {0: 21}), within_s=0.03)
    assert rig.bus.end_reads == 3


async def test_D4_a_bus_out_of_reach_leaves_coverage_and_the_deadline(rig: Rig) -> None:
    rig.bus.fail = True
    with pytest.raises(VisibilityTimeout):
        await rig.wait(VisibilityToken(HISTORY, 0, {0: 11}), within_s=0.03)
    waiting = asyncio.create_task(rig.wait(VisibilityToken(HISTORY, 0, {0: 11})))
    while not rig.watcher.waiting:
        await asyncio.sleep(0)
    rig.catalog.row = head_of(6, {0: 11, 1: 10})
    assert await asyncio.wait_for(waiting, _HANG_S) == 6


async def test_D4_the_verdict_is_asked_after_the_coverage_was_seen(rig: Rig) -> None:
    """The publish that covers the entry is the one that quarantines it."""

    rig.bus.known_ends = {0: 11, 1: 10}
    waiting = asyncio.create_task(rig.wait(mine(0, 10)))
    while not rig.watcher.waiting:
        await asyncio.sleep(0)
    assert rig.bus.asked == []
    rig.catalog.row, rig.bus.bad = head_of(6, {0: 11, 1: 10}), {(0, 10)}
    with pytest.raises(Quarantined):
        await asyncio.wait_for(waiting, _HANG_S)


async def test_D5_a_new_history_is_noticed_while_waiting(rig: Rig) -> None:
    rig.bus.known_ends = {0: 99, 1: 99}
    lost = asyncio.create_task(rig.wait(VisibilityToken(HISTORY, 0, {0: 50})))
    kept = asyncio.create_task(rig.wait(VisibilityToken(HISTORY, 0, {0: 12})))
    while rig.watcher.waiting < 2:
        await asyncio.sleep(0)
    rig.catalog.path = (*rig.catalog.path, HistoryFork(B, HISTORY, 5, {0: 12, 1: 12}))
    rig.catalog.row = head_of(1_000, {0: 1_000, 1: 1_000}, history=B)
    with pytest.raises(TokenHistoryLost):
        await asyncio.wait_for(lost, _HANG_S)
    assert await asyncio.wait_for(kept, _HANG_S) == 1_000
    with pytest.raises(TokenHistoryLost):
        await rig.wait(VisibilityToken(HISTORY, 6))
    assert await rig.wait(VisibilityToken(HISTORY, 5), VisibilityToken(B, 1_000)) == 1_000


async def test_D5_a_new_history_is_noticed_between_the_questions(rig: Rig) -> None:
    rig.bus.known_ends = {0: 99, 1: 99}
    rig.bus.gate.clear()
    lost = asyncio.create_task(rig.wait(VisibilityToken(HISTORY, 0, {0: 50})))
    while not rig.bus.end_reads:
        await asyncio.sleep(0)
    rig.catalog.path = (*rig.catalog.path, HistoryFork(B, HISTORY, 5, {0: 12, 1: 12}))
    rig.catalog.row = head_of(1_000, {0: 1_000, 1: 1_000}, history=B)
    await rig.watcher.fresh_head()
    rig.bus.gate.set()
    with pytest.raises(TokenHistoryLost):
        await asyncio.wait_for(lost, _HANG_S)


async def test_F3_a_replica_that_lives_through_a_restore_sees_the_new_line_only() -> None:
    lake = MemoryHarness(SUITE_SETTINGS, live=True)
    table = await lake.create()
    kept = await lake.accept(entry_of(table, [1], ordering_key="one"))
    await lake.drain()
    backup = await lake.take_backup()
    async with reading(lake) as reader:
        lost = await lake.accept(entry_of(table, [2], ordering_key="one"))
        await lake.drain()
        assert len((await reader.read()).rows) == 2
        await lake.restore(backup)
        read = await reader.read(tokens=[kept.receipt.visibility_token])
        assert set(read.rows) == {("t", (kept.shard, kept.position))}
        with pytest.raises(TokenHistoryLost):
            await reader.read(tokens=[lost.receipt.visibility_token])
        again = await lake.accept(entry_of(table, [3], ordering_key="one"))
        await lake.drain()
        read = await reader.read(tokens=[again.receipt.visibility_token])
        assert ("t", (again.shard, again.position)) in read.rows
        assert ("t", (lost.shard, lost.position)) not in read.rows
        old = await reader.read(SnapshotChoice(snapshot_id=backup.head_id))
        assert set(old.rows) == {("t", (kept.shard, kept.position))}
