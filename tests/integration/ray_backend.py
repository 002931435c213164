"""The backend of the actors in the Ray tests: PostgreSQL and a folder, described by a JSON file."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.backend import Backend
from actors.settings import MaintainerSettings, RoleSettings
from lakebus.errors import StartRefused
from storage.bus.settings import BusSettings
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.maintenance import registry
from storage.maintenance.jobs import Job, JobContext, JobKind
from storage.postgres.lake import PostgresLake

FACTORY = "tests.integration.ray_backend:open_backend"
LEASE_TTL_S = 2.0
BUS = BusSettings(shards=2, lease_ttl_ms=int(LEASE_TTL_S * 1_000), claim_entries_max=64)
ROLES = RoleSettings(
    claim_poll_ms=50, linger_ms=10, supervisor_tick_ms=200, directory_every_s=0.2, stop_s_max=5.0
)
#: Only what a test asks for runs.
MAINTAINER = MaintainerSettings(enabled=False, tick_ms=100, backoff_s=0.2)


def write_config(folder: Path, **values: Any) -> Path:
    path = folder / "backend.json"
    path.write_text(json.dumps(values))
    os.chmod(path, 0o600)
    return path


async def open_lake(config: dict[str, Any]) -> PostgresLake:
    store = LocalObjectStore(Path(config["objects"]))
    return await PostgresLake.open(config["dsn"], bus_settings=BUS, object_store=store)


async def open_backend(path: str) -> Backend:
    config = json.loads(Path(path).read_text())
    if "refuse" in config:
        raise StartRefused(config["refuse"])
    if "validation" in config:
        # In this process only: every process that opens this backend runs nothing but the test.
        place = registry.BodyPlace(config["validation"])
        registry._PLACES = {**registry._PLACES, JobKind.VALIDATE: place}
    lake = await open_lake(config)
    folder = Path(path).parent
    return Backend(
        bus=lake.bus,
        catalog=lake.catalog,
        store=LocalObjectStore(Path(config["objects"])),
        hints=lake.hints,
        stack=config["stack"],
        settings=ROLES,
        jobs=lake.jobs,
        upkeep=lake.upkeep,
        engine=EngineSettings(allowed_directory=config["objects"], temp_directory=str(folder)),
        jobs_dir=folder / "jobs",
        maintainer=replace(MAINTAINER, lease_ttl_s=config.get("job_lease_s", 60.0)),
        close=lake.close,
    )


async def hang_at_first(context: JobContext, job: Job) -> Mapping[str, Any]:
    """The body of a job: its first attempt says where it runs, and hangs."""

    where = {"pid": os.getpid(), "niceness": os.nice(0), "folder": str(context.temp_dir)}
    await context.note(where)
    if job.attempt == 1:
        await asyncio.Event().wait()
    return where
