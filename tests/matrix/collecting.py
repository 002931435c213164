"""One collection of a real lake, with windows of no length: what may go, goes now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lakebus.clock import SYSTEM_CHANCE, SystemClock, new_uuid
from storage.engine.settings import EngineSettings
from storage.files.objects import ObjectStore
from storage.maintenance.collection import collect
from storage.maintenance.jobs import Job, JobContext, JobKind, JobState
from storage.maintenance.settings import MaintenanceSettings
from storage.postgres import PostgresLake

_AT_ONCE = MaintenanceSettings(safety_window_s=0.0, orphan_window_s=0.0)


async def collect_now(lake: PostgresLake, store: ObjectStore, folder: Path) -> Mapping[str, Any]:
    """The report of the job."""

    job = Job(
        job_id=new_uuid(),
        kind=JobKind.COLLECT,
        table_id=None,
        parameters={},
        dry_run=False,
        requested_by="test",
        state=JobState.RUNNING,
        attempt=1,
        created_at=SystemClock().utc_now(),
    )

    async def note(_: Mapping[str, Any]) -> None:
        return None

    context = JobContext(
        catalog=lake.catalog,
        upkeep=lake.upkeep,
        bus=lake.bus,
        store=store,
        settings=_AT_ONCE,
        engine=EngineSettings(allowed_directory=str(folder), temp_directory=str(folder)),
        temp_dir=folder,
        clock=SystemClock(),
        chance=SYSTEM_CHANCE,
        note=note,
    )
    return await collect(context, job)


def deleted_keys(report: Mapping[str, Any]) -> set[str]:
    return {one["object_key"] for one in report["deleted_files"]}
