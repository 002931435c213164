"""What a delete that loses to compaction again and again asks for, and for how long."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from storage.maintenance.jobs import JobContext
from storage.maintenance.priority import PRIORITY_TTL_S, Priority, tables_taken
from storage.memory_clock import ManualClock
from tests.unit.compaction_rig import Lake, filled, memory_lake

_JOB = uuid.UUID(int=7)


@pytest.fixture
def lake(tmp_path: Path) -> tuple[Lake, ManualClock]:
    made, memory = memory_lake(tmp_path)
    assert isinstance(memory.clock, ManualClock)
    return made, memory.clock


def asking(context: JobContext) -> Priority:
    return Priority(context, table_id=3, job_id=_JOB)


async def test_E2_a_delete_that_died_keeps_compaction_away_for_a_moment_only(
    lake: tuple[Lake, ManualClock],
) -> None:
    made, clock = lake
    context = made.context(clock=clock)
    first = asking(context)
    await first.take()
    for _ in range(5):  # renewed for as long as it runs
        clock.advance_s(PRIORITY_TTL_S / 2)
        await asyncio.sleep(0.001)
        assert await tables_taken(made.upkeep) == {3}
    assert first._renewing is not None
    first._renewing.cancel()  # as if its process had been killed
    clock.advance_s(PRIORITY_TTL_S + 1)
    assert await tables_taken(made.upkeep) == frozenset()


async def test_E2_the_next_attempt_takes_over_and_ends_it(lake: tuple[Lake, ManualClock]) -> None:
    made, clock = lake
    context = made.context(clock=clock)
    died, after = asking(context), asking(context)
    await died.take()
    assert died._renewing is not None
    died._renewing.cancel()
    await after.end()  # it did not have to ask
    await after.take()
    (pin,) = await made.upkeep.pins()
    assert (pin.floor, pin.snapshot_ids) == (None, ())  # it protects nothing
    await after.end()
    assert await made.upkeep.pins() == []


async def test_E2_compaction_leaves_the_table_alone_meanwhile(
    lake: tuple[Lake, ManualClock],
) -> None:
    made, clock = lake
    table = await filled(made)
    priority = Priority(made.context(clock=clock), table_id=table.table_id, job_id=_JOB)
    await priority.take()
    report = await made.compact()
    assert (report["swaps"], [one["table"] for one in report["skipped"]]) == (0, [table.name])
    await priority.end()
    assert (await made.compact())["swaps"] == 1
