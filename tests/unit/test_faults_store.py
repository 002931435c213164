"""The faulty object store and disk keep to what a store may do, so what they uncover is real."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import NoReturn

import pytest

from lakebus.errors import Corrupt, Unavailable
from storage.files.objects import LocalObjectStore, MemoryObjectStore, ObjectExists
from tests.faults.clocks import HOUR_S, WRONG_CLOCKS, SuspendedClock
from tests.faults.disks import DiskPoint, no_space, watched_disk
from tests.faults.store import (
    ALLOWED,
    FaultyStore,
    Operation,
    Script,
    Seeded,
    StoreFault,
)

HELD = (StoreFault.HELD_BEFORE, StoreFault.HELD_AFTER)


class Died(BaseException):
    """Stands in for the end of the process."""


def no_more() -> NoReturn:
    raise Died


def faulty(script: Script, under: LocalObjectStore | None = None) -> FaultyStore:
    return FaultyStore(under or MemoryObjectStore(), script, slow_s=0.001, end_process=no_more)


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_the_faults_a_read_gives_the_bytes_of_the_put_or_an_error(seed: int) -> None:
    """After a put that returned, the object is there; after one that failed, it is there whole or
    not at all, and stays there once it was seen."""
    chance = random.Random(seed)
    rates: dict[StoreFault, float] = {
        f: 0.08 for f in StoreFault if f not in (StoreFault.TORN, *HELD)
    }
    memory = MemoryObjectStore()
    store = FaultyStore(memory, Seeded(seed, rates), slow_s=0.0005)
    sent: dict[str, bytes] = {}
    there: set[str] = set()
    for number in range(60):
        key = f"a/{number}"
        sent[key] = chance.randbytes(8)
        try:
            await store.put_new(key, sent[key])
            there.add(key)
        except Unavailable:
            pass
        asked = chance.choice(list(sent))
        try:
            assert await store.get(asked) == sent[asked]
            there.add(asked)
        except Unavailable:
            pass
        except Corrupt:
            assert asked not in there
    await store.settle()
    assert {call.fault for call in store.calls} >= {None, StoreFault.ERROR}
    found = {key async for key, _ in memory.list()}
    assert there <= found <= set(sent)
    for key in found:
        assert await memory.get(key) == sent[key]


async def test_one_seed_draws_the_same_faults() -> None:
    def drawn(seed: int) -> list[StoreFault | None]:
        plan = Seeded(seed, {StoreFault.ERROR: 0.3, StoreFault.LOST_ANSWER: 0.3})
        return [plan(Operation.PUT, "k") for _ in range(50)]

    assert drawn(1) == drawn(1) != drawn(2)
    get = Seeded(1, {StoreFault.LOST_ANSWER: 1.0})
    assert get(Operation.GET, "k") is None  # a lost read is no more than an error
    with pytest.raises(ValueError):
        Seeded(1, {StoreFault.ERROR: 0.8, StoreFault.SLOW: 0.3})


@pytest.mark.parametrize("fault", sorted(set(StoreFault) - ALLOWED[Operation.GET]))
def test_a_script_cannot_ask_for_what_no_store_may_do(fault: StoreFault) -> None:
    with pytest.raises(ValueError, match="no store may"):
        Script().on(Operation.GET, fault)


async def test_a_script_is_followed_by_operation_and_prefix() -> None:
    script = Script().on(Operation.PUT, None, StoreFault.ERROR, prefix="b/")
    store = faulty(script.on(Operation.GET, StoreFault.THROTTLED))
    for key in ("a/1", "b/1", "a/2"):
        await store.put_new(key, b"x")
    with pytest.raises(Unavailable):
        await store.put_new("b/2", b"x")
    assert await store.size("b/2") is None
    with pytest.raises(Unavailable) as refused:
        await store.get("a/1")
    assert refused.value.retry_after_s is not None
    assert await store.get("a/1") == b"x"
    assert store.faults(Operation.PUT) == [None, None, None, StoreFault.ERROR]


async def test_an_answer_is_lost_after_its_effect_and_a_late_effect_comes_after() -> None:
    script = Script().on(Operation.PUT, StoreFault.LOST_ANSWER, None, StoreFault.LATE_EFFECT)
    store = faulty(script)
    with pytest.raises(Unavailable):
        await store.put_new("lost", b"x")
    assert await store.get("lost") == b"x"
    with pytest.raises(ObjectExists):
        await store.put_new("lost", b"x")
    with pytest.raises(Unavailable):
        await store.put_new("late", b"x")
    assert await store.size("late") is None
    await store.settle()
    assert await store.get("late") == b"x"


@pytest.mark.parametrize("fault", HELD)
async def test_a_held_put_goes_on_when_it_is_let_go(fault: StoreFault) -> None:
    store = faulty(Script().on(Operation.PUT, fault))
    put = asyncio.create_task(store.put_new("k", b"x"))
    await store.reached()
    assert await store.size("k") == (1 if fault is StoreFault.HELD_AFTER else None)
    assert not put.done()
    store.let_go()
    await put
    assert await store.get("k") == b"x"


async def test_a_torn_put_leaves_half_of_the_bytes_under_a_hidden_name(tmp_path: Path) -> None:
    local = LocalObjectStore(tmp_path)
    store = faulty(Script().on(Operation.PUT, StoreFault.TORN), local)
    with pytest.raises(Died):
        await store.put_new("a/k", b"12345678")
    (torn,) = (tmp_path / "a").iterdir()
    assert (torn.name[0], torn.read_bytes()) == (".", b"1234")
    assert [key async for key, _ in store.list()] == []
    with pytest.raises(Corrupt):
        await store.get("a/k")
    assert await local.remove_abandoned(-60.0) == 1


@pytest.mark.parametrize("unnamed_files", [True, False])
async def test_a_watched_disk_tells_the_steps_of_each_put(
    tmp_path: Path, unnamed_files: bool
) -> None:
    steps: list[DiskPoint] = []
    paths: list[Path] = []

    def on_point(point: DiskPoint, path: Path) -> None:
        steps.append(point)
        paths.append(path)

    with watched_disk(on_point, unnamed_files=unnamed_files):
        store = LocalObjectStore(tmp_path)
        for key in ("a/1", "a/2"):
            await store.put_new(key, b"0123456789")
    await store.put_new("a/3", b"unseen")
    assert steps == [*DiskPoint, *DiskPoint]
    folder = tmp_path / "a"
    first, second = ([folder] * 4 + [folder / name] * 2 for name in ("1", "2"))
    assert paths == first + second
    assert await store.get("a/2") == b"0123456789"


async def test_a_full_disk_is_unavailable_and_takes_the_next_put_when_there_is_space(
    tmp_path: Path,
) -> None:
    store = LocalObjectStore(tmp_path)
    with watched_disk(no_space(DiskPoint.HALF_WRITTEN, part="b")):
        await store.put_new("a/k", b"12345678")
        with pytest.raises(Unavailable, match="full"):
            await store.put_new("b/k", b"12345678")
    await store.put_new("b/k", b"12345678")
    with pytest.raises(ValueError, match="after its effect"):
        no_space(DiskPoint.LINKED)


def test_wrong_clocks_are_wrong_and_monotonic_ones_never_go_back_by_themselves() -> None:
    true = SuspendedClock()
    for make in WRONG_CLOCKS.values():
        clock = make()
        first, second = clock.utc_now(), clock.utc_now()
        off_s = [abs((seen - true.utc_now()).total_seconds()) for seen in (first, second)]
        assert max(off_s) > HOUR_S - 60
        assert clock.monotonic_s() <= clock.monotonic_s()
    before_s = true.monotonic_s()
    true.suspend_s(HOUR_S)
    assert true.monotonic_s() < before_s
