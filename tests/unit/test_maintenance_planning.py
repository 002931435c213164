"""What compaction merges, as a pure function: bounds of files and of write amplification, proved by
hours of simulated writes; layout, partitions, order, limits."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.maintenance.planning import (
    COLD_SNAPSHOTS,
    PlanReason,
    RewritePlan,
    is_current,
    memory_estimate_bytes,
    plan_rewrites,
    small_files_bound,
)
from storage.maintenance.settings import MaintenanceSettings

KIB, MIB = 1024, 1024 * 1024
SETTINGS = MaintenanceSettings()
PLAIN = TableSchema(1, "t", 1, (Column(1, "id", "bigint"), Column(2, "ts", "timestamp")))
BY_DAY = replace(PLAIN, partition_by=("day(ts)",))


def a_file(
    size_bytes: int,
    snapshot: int = 1,
    *,
    partition: str | None = None,
    layout: str = "",
    least: int | None = None,
    number: int | None = None,
) -> DataFile:
    file_id = uuid.UUID(int=number if number is not None else random.getrandbits(128))
    bounds = {} if least is None else {1: ColumnStatistics(0, str(least), str(least + 10))}
    return DataFile(
        file_id=file_id,
        table_id=1,
        schema_version=1,
        object_key=f"tables/1/{file_id}.parquet",
        rows=max(1, size_bytes // 100),
        size_bytes=size_bytes,
        sha256="",
        statistics=bounds,
        first_snapshot=snapshot,
        partition=partition,
        layout=layout,
    )


def day(value: object) -> str:
    return json.dumps({"day(ts)": value}, separators=(",", ":"))


# --- the simulation --------------------------------------------------------------------------


class World:
    """A table under a writer and compaction. `passes` is how often the bytes of a file were
    rewritten, at most; `shrinks`: how much smaller merged rows are."""

    def __init__(
        self,
        schema: TableSchema,
        chance: random.Random,
        shrinks: float = 1.0,
        settings: MaintenanceSettings = SETTINGS,
    ) -> None:
        self.schema, self.chance = schema, chance
        self.shrinks, self.settings = shrinks, settings
        self.files: dict[uuid.UUID, DataFile] = {}
        self.passes: dict[uuid.UUID, int] = {}
        self.snapshot = 0
        self.written = self.rewritten = 0
        self.merges: Counter[PlanReason] = Counter()

    def write(self, size_bytes: int, partition: str | None = None) -> None:
        self.snapshot += 1
        self.written += size_bytes
        self._add(size_bytes, partition, 0)

    def _add(self, size_bytes: int, partition: str | None, passes: int) -> None:
        number = self.chance.getrandbits(128)
        file = a_file(size_bytes, self.snapshot, partition=partition, number=number)
        self.files[file.file_id] = file
        self.passes[file.file_id] = passes

    def compact(self) -> None:
        for _ in range(20):
            plans = plan_rewrites(self.schema, self.files.values(), self.settings)
            if not plans:
                return
            for plan in plans:
                self._run(plan)
        raise AssertionError("compaction does not come to rest")

    def _run(self, plan: RewritePlan) -> None:
        self.snapshot += 1
        self.merges[plan.reason] += 1
        passes = 1 + max(self.passes.pop(file.file_id) for file in plan.inputs)
        for file in plan.inputs:
            del self.files[file.file_id]
        self.rewritten += plan.input_bytes
        left = max(1, int(plan.input_bytes * self.shrinks))
        while left > 0:
            size = min(left, self.settings.target_file_bytes)
            self._add(size, plan.partition, passes)
            left -= size

    def small(self) -> int:
        return sum(f.size_bytes < self.settings.small_file_bytes for f in self.files.values())

    @property
    def amplification(self) -> float:
        return self.rewritten / self.written


def _log_uniform(chance: random.Random, least: int, most: int) -> int:
    return int(math.exp(chance.uniform(math.log(least), math.log(most))))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shrinks", [1.0, 0.6])
def test_hours_of_small_writes_keep_few_files_at_logarithmic_cost(
    seed: int, shrinks: float
) -> None:
    """Three hours of a file a second, compaction every ten seconds."""

    chance = random.Random(seed)
    world = World(PLAIN, chance, shrinks)
    least, most = 8 * KIB, 1 * MIB
    tails: list[int] = []
    for second in range(3 * 3600):
        world.write(_log_uniform(chance, least, most))
        if second % 10 == 9:
            world.compact()
            tails.append(world.small())
    assert max(tails) <= SETTINGS.small_files_max
    assert sum(tails) / len(tails) <= 20  # a query lists about so many: architecture, 9
    tiers = math.log(SETTINGS.target_file_bytes / least, SETTINGS.tier_factor)
    assert world.amplification <= tiers + 1
    assert max(world.passes.values()) <= 2 * (tiers + 1)
    finished = [f for f in world.files.values() if f.size_bytes >= SETTINGS.target_file_bytes // 4]
    assert len(finished) >= world.written * shrinks // (3 * SETTINGS.target_file_bytes)
    assert len(world.files) <= len(finished) + SETTINGS.small_files_max


def test_a_burst_of_tiny_files_is_merged_in_one_pass() -> None:
    """What waited for compaction is not taken through every tier."""

    world = World(PLAIN, random.Random(1))
    for _ in range(5_000):
        world.write(20 * KIB)
    world.compact()
    assert len(world.files) <= 10
    assert world.amplification <= 1.2


@pytest.mark.parametrize(("partitions", "seed"), [(4, 1), (12, 2), (40, 3)])
def test_many_partitions_stay_within_their_bound(partitions: int, seed: int) -> None:
    """Where more partitions are written to than small files may be, merges grow finer; the cost
    stays logarithmic, to the base two."""

    chance = random.Random(seed)
    world = World(BY_DAY, chance)
    bound = small_files_bound(SETTINGS, partitions=partitions)
    least = 16 * KIB
    for second in range(3600):
        world.write(_log_uniform(chance, least, 256 * KIB), day(str(second % partitions)))
        if second % 10 == 9:
            world.compact()
            assert world.small() <= bound
    assert world.amplification <= math.log2(SETTINGS.small_file_bytes / least) + 2


def test_partitions_that_nobody_writes_to_end_as_one_small_file_each() -> None:
    """Two hundred days: what a day left behind does not stay in many pieces."""

    chance = random.Random(5)
    world = World(BY_DAY, chance)
    for number in range(200):
        for piece in range(30):
            world.write(_log_uniform(chance, 16 * KIB, 128 * KIB), day(str(number)))
            world.snapshot += COLD_SNAPSHOTS // 100  # other tables publish too
            if piece % 5 == 4:
                world.compact()
    assert world.merges[PlanReason.COLD] > 0
    by_day = Counter(file.partition for file in world.files.values())
    cold = [by_day[day(str(number))] for number in range(180)]
    assert max(cold) == 1
    assert world.small() <= 200 + SETTINGS.small_files_max
    assert world.amplification <= math.log2(SETTINGS.small_file_bytes / (16 * KIB)) + 2


def test_settings_at_their_edges_come_to_rest() -> None:
    for settings in (
        replace(SETTINGS, inputs_min=2, tier_factor=2, inputs_max=2),
        replace(SETTINGS, input_bytes_max=1 * MIB, target_file_bytes=16 * MIB),
        replace(SETTINGS, small_files_max=1, inputs_min=3, tier_factor=10),
        replace(SETTINGS, target_file_bytes=64 * KIB, small_file_bytes=4 * KIB),
    ):
        chance = random.Random(7)
        world = World(PLAIN, chance, settings=settings)
        for number in range(500):
            world.write(_log_uniform(chance, 500, 200 * KIB))
            if number % 7 == 0:
                world.compact()


# --- what is due -----------------------------------------------------------------------------


def test_the_smallest_tier_is_due_at_inputs_min_files() -> None:
    seven = [a_file(100 * KIB, n) for n in range(7)]
    assert plan_rewrites(PLAIN, seven, SETTINGS) == []
    [plan] = plan_rewrites(PLAIN, [*seven, a_file(100 * KIB, 9)], SETTINGS)
    assert len(plan.inputs) == 8
    assert plan.reason is PlanReason.TIER


def test_sizes_far_apart_are_not_merged() -> None:
    files = [a_file(10 * KIB * 20**n, n) for n in range(4) for _ in range(4)]
    assert plan_rewrites(PLAIN, files, SETTINGS) == []


def test_finished_files_are_left_alone() -> None:
    files = [a_file(32 * MIB + n, n) for n in range(50)]
    assert plan_rewrites(PLAIN, files, SETTINGS) == []


def test_larger_files_can_be_left_for_later() -> None:
    larger = [a_file(20 * MIB, n) for n in range(8)]
    assert len(plan_rewrites(PLAIN, larger, SETTINGS)) == 1
    assert plan_rewrites(PLAIN, larger, SETTINGS, small_only=True) == []
    small = [a_file(100 * KIB, 10 + n) for n in range(100)]
    [plan] = plan_rewrites(PLAIN, [*larger, *small], SETTINGS, small_only=True)
    assert _inputs([plan]) == {file.file_id for file in small}


@pytest.mark.parametrize("busy", [False, True])
def test_under_a_load_that_keeps_on_a_row_is_written_about_once(busy: bool) -> None:
    """Ten files of half a megabyte a second. Merged each ten seconds they make files that are
    merged again; by as many as a busy table may have, whole ones."""

    world = World(PLAIN, random.Random(4))
    for number in range(10_000):
        world.write(_log_uniform(world.chance, 300 * KIB, 700 * KIB))
        if number % (129 if busy else 30) == 0:
            world.compact()
    assert (world.amplification < 1.1) is busy


def test_a_table_without_files_has_nothing_due() -> None:
    assert plan_rewrites(PLAIN, [], SETTINGS) == []
    assert plan_rewrites(PLAIN, [], SETTINGS, full_until=9) == []


def test_limits_of_one_rewrite_hold_and_neighbours_stay_together() -> None:
    settings = replace(SETTINGS, inputs_max=10, input_bytes_max=900 * KIB)
    files = [a_file(100 * KIB, n) for n in range(50)]
    plans = plan_rewrites(PLAIN, files, settings)
    assert sum(len(plan.inputs) for plan in plans) >= 45
    for plan in plans:
        assert len(plan.inputs) <= 10
        assert plan.input_bytes <= 900 * KIB
        ages = [file.first_snapshot for file in plan.inputs]
        assert ages == list(range(ages[0], ages[0] + len(ages)))


def test_files_are_neighbours_by_the_sort_column_where_its_bounds_are_known() -> None:
    schema = replace(PLAIN, sort_by=("id",))
    settings = replace(SETTINGS, inputs_max=8)
    values = random.Random(3).sample(range(16), 16)
    files = [a_file(100 * KIB, n, least=value * 100) for n, value in enumerate(values)]
    plans = plan_rewrites(schema, files, settings)
    taken = [[int(f.statistics[1].minimum or "") // 100 for f in plan.inputs] for plan in plans]
    assert sorted(taken) == [list(range(8)), list(range(8, 16))]
    unknown = [replace(files[0], statistics={}), *files[1:]]
    by_age = [
        [f.first_snapshot for f in p.inputs] for p in plan_rewrites(schema, unknown, settings)
    ]
    assert sorted(by_age) == [list(range(8)), list(range(8, 16))]


def test_the_same_files_give_the_same_plan_in_any_order() -> None:
    chance = random.Random(11)
    files = [
        a_file(_log_uniform(chance, KIB, 80 * MIB), n // 3, partition=day(str(n % 5)), number=n)
        for n in range(400)
    ]
    wanted = plan_rewrites(BY_DAY, files, SETTINGS)
    assert wanted
    for _ in range(5):
        chance.shuffle(files)
        assert plan_rewrites(BY_DAY, files, SETTINGS) == wanted


def test_no_file_is_in_two_plans_and_small_files_come_first() -> None:
    chance = random.Random(12)
    files = [
        a_file(_log_uniform(chance, KIB, 60 * MIB), n, partition=day(str(n % 9)))
        for n in range(900)
    ]
    plans = plan_rewrites(BY_DAY, files, SETTINGS)
    taken = [file.file_id for plan in plans for file in plan.inputs]
    assert len(taken) == len(set(taken))
    means = [plan.input_bytes / len(plan.inputs) for plan in plans]
    assert means == sorted(means)


def test_memory_is_told_and_bounded() -> None:
    small, large = memory_estimate_bytes(1 * MIB, SETTINGS), memory_estimate_bytes(2**40, SETTINGS)
    assert small < 160 * MIB
    assert large <= SETTINGS.rewrite_memory_bytes + 128 * MIB
    [plan] = plan_rewrites(PLAIN, [a_file(MIB, n) for n in range(8)], SETTINGS)
    assert plan.memory_bytes == memory_estimate_bytes(8 * MIB, SETTINGS)
    assert plan.summary()["memory_bytes"] == plan.memory_bytes


# --- partitions, layout, full ----------------------------------------------------------------


def test_partitions_are_never_merged_with_each_other() -> None:
    files = [a_file(100 * KIB, n, partition=day(str(n % 3))) for n in range(30)]
    plans = plan_rewrites(BY_DAY, files, SETTINGS)
    assert len(plans) == 3
    for plan in plans:
        assert {file.partition for file in plan.inputs} == {plan.partition}


def test_mixed_files_are_split_when_their_tier_is_due() -> None:
    mixed = [a_file(100 * KIB, n) for n in range(8)]
    older = [a_file(100 * KIB, 9, partition='{"day(old)":"1"}')]
    [plan] = plan_rewrites(BY_DAY, [*mixed, *older], SETTINGS)
    assert plan.partition is None
    assert plan.split
    assert len(plan.inputs) == 9


def test_a_mixed_merge_is_not_cut_into_crumbs() -> None:
    there = [a_file(100 * MIB, n, partition=day(str(n))) for n in range(200)]
    [few] = plan_rewrites(BY_DAY, [*there, *(a_file(100 * KIB, n) for n in range(8))], SETTINGS)
    assert not few.split
    [much] = plan_rewrites(BY_DAY, [*there, *(a_file(10 * MIB, n) for n in range(8))], SETTINGS)
    assert much.split


def test_files_of_a_spec_that_is_gone_are_one_group() -> None:
    files = [a_file(100 * KIB, n, partition=day(str(n))) for n in range(8)]
    [plan] = plan_rewrites(PLAIN, files, SETTINGS)
    assert plan.partition is None
    assert len(plan.inputs) == 8


def test_another_layout_alone_makes_nothing_due_but_a_full_rewrite_does() -> None:
    schema = replace(PLAIN, sort_by=("id",))
    stale = [a_file(100 * MIB, n) for n in range(3)]
    fresh = [a_file(100 * MIB, n, layout="id") for n in range(3)]
    assert plan_rewrites(schema, [*stale, *fresh], SETTINGS) == []
    plans = plan_rewrites(schema, [*stale, *fresh], SETTINGS, full_until=10)
    assert _inputs(plans) == {file.file_id for file in stale}
    assert all(plan.reason is PlanReason.FULL for plan in plans)


def test_a_full_rewrite_takes_old_specs_mixed_files_and_all_tails_once() -> None:
    good = a_file(100 * MIB, 1, partition=day("1"))
    lone = a_file(1 * MIB, 1, partition=day("2"))
    tail = [a_file(1 * MIB, 2, partition=day("1")), a_file(2 * MIB, 3, partition=day("1"))]
    mixed = [a_file(100 * MIB, 4), a_file(90 * MIB, 4, partition='{"day(x)":"1"}')]
    files = [good, lone, *tail, *mixed]
    plans = plan_rewrites(BY_DAY, files, SETTINGS, full_until=4)
    assert _inputs(plans) == {file.file_id for file in (*tail, *mixed)}
    assert all(plan.split for plan in plans)
    made = [a_file(3 * MIB, 5, partition=day("1")), a_file(95 * MIB, 5, partition=day("9"))]
    assert plan_rewrites(BY_DAY, [good, lone, *made], SETTINGS, full_until=4) == []


def test_is_current_compares_keys_in_their_order() -> None:
    schema = replace(PLAIN, partition_by=("day(ts)", "id"), sort_by=("ts", "id"))
    right = a_file(1, partition='{"day(ts)":"1","id":null}', layout="ts,id")
    assert is_current(schema, right)
    assert not is_current(schema, replace(right, partition='{"id":null,"day(ts)":"1"}'))
    assert not is_current(schema, replace(right, partition=None))
    assert not is_current(schema, replace(right, layout=""))


def _inputs(plans: Sequence[RewritePlan]) -> set[uuid.UUID]:
    return {file.file_id for plan in plans for file in plan.inputs}
