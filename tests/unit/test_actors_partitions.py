"""The write path of partitioned tables: several files a range, one commit, intents first."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from actors.coordinator import RangeEnd
from lakebus.errors import Unavailable
from lakebus.snapshots import DataFile
from storage.catalog.memory_upkeep import MemoryUpkeep
from tests.unit.actors_rig import Overlay, Rig, with_settings
from tests.unit.test_actors_coordinator import run

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
async def rig() -> Rig:
    return Rig(shards=1)


def partitions(files: Sequence[DataFile], table_id: int) -> list[str | None]:
    found = [f.partition for f in files if f.table_id == table_id]
    return [None if text is None else next(iter(json.loads(text).values())) for text in found]


async def test_A8_all_partitions_of_a_range_appear_in_one_snapshot(rig: Rig) -> None:
    events, notes = await rig.create("events", "truncate(10, id)"), await rig.create("notes")
    first = await rig.append((events, [1, 12, 2]), (notes, [3]), ordering="a")
    await rig.append((events, [13, 25]), ordering="a")

    report = await run(rig)

    assert (report.end, report.entries, report.rows, report.files) == (
        RangeEnd.PUBLISHED, 2, 6, 4,
    )  # fmt: skip
    files = await rig.files()
    assert sorted(map(str, partitions(files, events.table_id))) == ["0", "10", "20"]
    assert partitions(files, notes.table_id) == [None]
    assert {file.first_snapshot for file in files} == {report.snapshot_id}
    assert len({file.file_id for file in files}) == 4
    assert rig.lake.state.intents == {}
    rows = [row[1:] for row in await rig.rows() if row[0] == events.table_id]
    assert rows == [
        (1, 0, first.position, 0), (12, 0, first.position, 1), (2, 0, first.position, 2),
        (13, 0, first.position + 1, 0), (25, 0, first.position + 1, 1),
    ]  # fmt: skip


async def test_C6_further_intents_are_there_before_the_first_byte(rig: Rig) -> None:
    events = await rig.create("events", "id")
    await rig.append((events, [1, 2, 3]))
    seen: list[tuple[str, int]] = []

    async def put_new(key: str, data: bytes) -> Any:
        named = uuid.UUID(key.split("/")[-1].removesuffix(".parquet"))
        intent = rig.lake.state.intents[named]
        seen.append((key, len(rig.lake.state.intents)))
        assert intent.table_id == events.table_id
        return await rig.store.put_new(key, data)

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))
    assert (report.end, report.files) == (RangeEnd.PUBLISHED, 3)
    assert [count for _, count in seen] == [3, 3, 3]


async def test_B7_without_further_intents_the_range_is_released_and_not_counted(rig: Rig) -> None:
    events = await rig.create("events", "id")
    await rig.append((events, [1, 2]))

    async def register_intents(*_: object, **__: object) -> list[uuid.UUID]:
        raise Unavailable("the catalog is away")

    away = Overlay(MemoryUpkeep(rig.lake), register_intents=register_intents)
    report = await run(rig, intents=away)
    assert report.end is RangeEnd.RELEASED
    assert rig.lake.state.quarantine == {}
    (held,) = rig.lake.state.ranges.values()
    assert (held.leased, held.attempt) == (False, 0)
    assert await rig.files() == []

    report = await run(rig)
    assert (report.end, report.files) == (RangeEnd.PUBLISHED, 2)


async def test_a_range_of_one_partition_needs_no_further_intent(rig: Rig) -> None:
    events, plain = await rig.create("events", "note"), await rig.create("plain")
    await rig.append((events, [7]), (plain, [1, 2]))

    async def register_intents(*_: object, **__: object) -> list[uuid.UUID]:
        raise AssertionError("nobody asked for more")

    report = await run(rig, intents=Overlay(None, register_intents=register_intents))
    assert report.files == 2
    assert partitions(await rig.files(), events.table_id) == ["note 7"]


@pytest.mark.parametrize(("most", "files"), [(3, 1), (4, 4)])
async def test_more_partitions_than_a_range_may_have_become_one_mixed_file(
    most: int, files: int
) -> None:
    rig = Rig(shards=1)
    rig.settings = with_settings(rig.settings, partitions_per_range_max=most)
    events = await rig.create("events", "id")
    await rig.append((events, [1, 2, 3, 4]))
    report = await run(rig)
    assert (report.end, report.files, report.rows) == (RangeEnd.PUBLISHED, files, 4)
    assert (partitions(await rig.files(), events.table_id) == [None]) is (files == 1)


async def test_a_changed_spec_counts_for_new_files_only(rig: Rig) -> None:
    events = await rig.create("events", "id")
    await rig.append((events, [1]))
    await run(rig)
    changed = dataclasses.replace(events, partition_by=("truncate(100, id)",))
    done = await rig.catalog.alter_table(schema=changed, expected_version=events.version)
    await rig.append((done.schema, [2, 103]))
    await run(rig)
    texts = sorted(file.partition or "" for file in await rig.files())
    assert texts == ['{"id":"1"}', '{"truncate(100, id)":"0"}', '{"truncate(100, id)":"100"}']
    assert sorted((await rig.ids()).elements()) == [1, 2, 103]
