"""A swap whose middle goes wrong: it happens once or not at all, and leaves nothing but intents and
a pin that expire (C5, C6, E1, E3, E4)."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from lakebus.errors import Corrupt, OutcomeUnknown, Unavailable
from storage.files.objects import MemoryObjectStore
from storage.maintenance import swapping
from storage.maintenance.compaction import compact
from storage.maintenance.interface import Swap, SwapOperation, Swapped
from storage.maintenance.jobs import JobKind
from storage.maintenance.rewrite import rewrite
from storage.maintenance.rewriting import RewriteRequest, Rewritten
from storage.maintenance.swapping import RewritePart, SwapWork, run_swap
from storage.memory_clock import ManualClock
from tests.failpoints.actions import Pause, Run
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.unit.compaction_rig import (
    Impatient,
    Lake,
    Overlay,
    at_publish,
    filled,
    job_of,
    memory_lake,
)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return memory_lake(tmp_path)[0]


async def test_C5_a_lost_reply_is_read_back_and_happens_once(tmp_path: Path) -> None:
    lake, memory = memory_lake(tmp_path)
    table = await filled(lake, 8)
    before, at = await lake.rows(table), await lake.head_id()
    memory.faults.lose_replies.add("swap")
    report = await lake.compact()
    assert report["swaps"] == 1
    assert await lake.head_id() == at + 1
    assert await lake.rows(table) == before


async def test_C5_a_swap_that_did_not_happen_is_sent_again_under_its_id(lake: Lake) -> None:
    table = await filled(lake, 8)
    sent: list[uuid.UUID] = []
    real = lake.upkeep.publish_swap

    async def flaky(swap: Swap) -> Swapped:
        sent.append(swap.publication_id)
        if len(sent) < 3:
            raise OutcomeUnknown("lost on its way")
        return await real(swap)

    clock = Impatient()
    context = lake.context(upkeep=Overlay(lake.upkeep, publish_swap=flaky), clock=clock)
    report = await compact(context, job_of(JobKind.COMPACT, {}))
    assert report["swaps"] == 1
    assert len(sent) == 3
    assert len(set(sent)) == 1
    assert len(await lake.live(table)) == 1


async def test_a_catalog_that_stays_away_ends_the_job_for_another_try(lake: Lake) -> None:
    await filled(lake, 8)

    async def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("away")

    context = lake.context(upkeep=Overlay(lake.upkeep, publish_swap=away), clock=Impatient())
    with pytest.raises(Unavailable):
        await compact(context, job_of(JobKind.COMPACT, {}))


async def test_C6_an_intent_that_was_collected_costs_the_work_and_is_planned_afresh(
    tmp_path: Path,
) -> None:
    lake, memory = memory_lake(tmp_path)
    table = await filled(lake, 8)
    before = await lake.rows(table)

    async def collect() -> None:
        memory.state.intents.clear()

    async with at_publish(collect):
        report = await lake.compact()
    assert report["swaps_lost"] == 1
    assert report["swaps"] == 1
    assert await lake.rows(table) == before


@pytest.mark.parametrize("point", markers_of("swapping"))
async def test_E4_a_crash_anywhere_leaves_intents_and_a_pin_that_expire(
    tmp_path: Path, point: str
) -> None:
    lake, memory = memory_lake(tmp_path)
    table = await filled(lake, 8)
    before, files = await lake.rows(table), await lake.live(table)
    # A process that is gone does not tidy up: what is done on the way out does not reach the lake.
    context = lake.context(upkeep=Overlay(lake.upkeep, release_pin=_nothing))
    with Failpoints() as points:
        armed = points.arm(point, Pause())
        task = asyncio.create_task(compact(context, job_of(JobKind.COMPACT, {})))
        await armed.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    published = point == "swapping.after_publish"
    assert (await lake.live(table) != files) is published
    assert await lake.rows(table) == before
    named = {file.file_id for file in await lake.live(table)} | {file.file_id for file in files}
    intents = {intent.file_id: intent for intent in await lake.upkeep.intents()}
    async for key, _ in lake.store.list("tables/"):
        file_id = uuid.UUID(Path(key).stem)
        assert file_id in named or file_id in intents
    clock = memory.clock
    assert isinstance(clock, ManualClock)
    clock.advance_s(lake.settings.intent_ttl_s + 1)
    assert all(intent.expires_at < memory.now() for intent in intents.values())
    assert await lake.upkeep.pins() == []
    report = await lake.compact()  # whoever comes next begins anew
    assert report["swaps"] == (0 if published else 1)
    assert await lake.rows(table) == before


async def test_a_damaged_input_is_left_alone_and_said_and_the_others_are_merged(
    lake: Lake,
) -> None:
    table = await filled(lake, 10)
    victim = (await lake.live(table))[3]
    path = lake.store.local_path(victim.object_key)
    assert path is not None
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    report = await lake.compact()
    assert report["files_in"] == 9
    [skipped] = report["skipped"]
    assert str(victim.file_id) in skipped["reason"]
    assert victim.file_id in {file.file_id for file in await lake.live(table)}


async def test_a_download_that_is_damaged_is_found_too(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    lake, _ = memory_lake(tmp_path, store=store)
    table = await lake.create()
    files = [await lake.write(table, [number]) for number in range(9)]

    async def get_range(key: str, start: int, length: int) -> bytes:
        data = await store.get_range(key, start, length)
        if key == files[2].object_key:
            return data[:-1] + b"?"
        return data

    damaged = lake.context(store=Overlay(store, get_range=get_range))
    report = await compact(damaged, job_of(JobKind.COMPACT, {}))
    assert report["files_in"] == 8
    assert len(report["skipped"]) == 1


async def test_damage_that_names_no_file_fails_the_job(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(lake, 8)

    def broken(request: RewriteRequest) -> Rewritten:
        raise Corrupt("something is wrong")

    monkeypatch.setattr(swapping, "rewrite", broken)
    with pytest.raises(Corrupt):
        await lake.compact()


async def test_E1_a_rewrite_that_loses_a_row_is_never_published(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = await filled(lake, 8)
    files = await lake.live(table)

    def lossy(request: RewriteRequest) -> Rewritten:
        made = rewrite(request)
        file = dataclasses.replace(made.files[0], rows=made.files[0].rows - 1)
        return dataclasses.replace(made, files=(file, *made.files[1:]))

    monkeypatch.setattr(swapping, "rewrite", lossy)
    with pytest.raises(Exception, match="does not hold the rows"):
        await lake.compact()
    assert await lake.live(table) == files


async def test_nothing_is_left_in_the_folder_of_the_job(lake: Lake) -> None:
    await filled(lake, 8)
    context = lake.context()
    await compact(context, job_of(JobKind.COMPACT, {}))
    assert os.listdir(context.temp_dir) == []


async def test_E3_a_rewrite_holds_a_pin_while_it_reads_and_none_after(lake: Lake) -> None:
    await filled(lake, 8)
    seen: list[Any] = []

    async def look() -> None:
        seen.extend(await lake.upkeep.pins())

    with Failpoints() as points:
        points.arm("swapping.after_locate", Run(look))
        await lake.compact()
    [pin] = seen
    assert pin.kind == "job"
    assert await lake.upkeep.pins() == []


async def test_whole_files_and_parts_go_in_one_swap(lake: Lake) -> None:
    table = await filled(lake, 4)
    first, second, *_ = await lake.live(table)
    at = await lake.head_id()
    work = SwapWork(
        table,
        SwapOperation.DELETE,
        parts=(RewritePart((second,)),),
        dropped=(first,),
        keep=lambda schema: "id % 2 = 0",
    )
    done = await run_swap(lake.context(), work)
    assert done.rows_removed == 15
    assert done.snapshot_id == at + 1 == await lake.head_id()
    assert len(await lake.rows(table)) == 25


async def _nothing(*_: Any) -> None:
    return None
