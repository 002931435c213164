"""The validator finds a lake sound after an erasure: counts of snapshots stay provable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from storage.bus.settings import BusSettings
from storage.catalog.memory_inspection import MemoryInspection
from storage.maintenance.jobs import JobKind, JobRequest
from storage.maintenance.validation import validate
from tests.conformance.erasures import erase_rig
from tests.conformance.memory import MemoryHarness


async def test_E7_a_lake_with_erased_rows_passes_the_validator(tmp_path: Path) -> None:
    lake = MemoryHarness(BusSettings(shards=3, claim_entries_max=1), live=True)
    async with erase_rig(lake, tmp_path) as rig:
        await lake.create()
        await rig.publish(1, 2)
        await rig.publish(1)
        await rig.compact()
        await rig.erase("id = 1")
        await lake.jobs.submit(JobRequest(JobKind.VALIDATE, "someone"))
        claim = await rig.claim(JobKind.VALIDATE)
        assert claim is not None
        context = dataclasses.replace(rig.context(claim), inspection=MemoryInspection(lake.lake))
        report = await validate(context, claim.job)
        kinds = {one["kind"] for one in report["findings"]}
        # The rig's own way to put files is not the product's.
        assert not kinds & {"count_differs", "missing_object", "statistics_differ"}, report
        assert kinds <= {"stray_object"}, report
