"""What a role process, and the process of a job, run on: made from the settings file.

Apart from `cluster.assembly`, because a job's process starts with it, often for less work than it
takes to import what replicas have.
"""

from __future__ import annotations

from actors.backend import Backend
from cluster import components


async def open_backend(path: str) -> Backend:
    """One role process's view of the lake (`actors.backend.BackendFactory`)."""

    settings = components.read_settings(path)
    store = components.object_store(settings)
    lake = await components.open_lake(settings, store)

    async def close() -> None:
        await lake.close()

    return Backend(
        bus=lake.bus,
        catalog=lake.catalog,
        store=store,
        hints=lake.hints,
        stack=lake.identity.lake_id.hex,
        settings=components.role_settings(settings),
        tracing=components.tracing(settings, "roles"),
        upkeep=lake.upkeep,
        inspection=lake.inspection,
        erasing=lake.erasing,
        jobs=lake.jobs,
        engine=components.job_engine_settings(settings),
        jobs_dir=components.jobs_dir(settings),
        maintainer=components.maintainer_settings(settings),
        maintenance=components.maintenance_settings(settings),
        close=close,
    )
