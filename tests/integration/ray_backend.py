"""The backend of the actors in the Ray tests: PostgreSQL and a folder, described by a JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from actors.backend import Backend
from actors.settings import RoleSettings
from lakebus.errors import StartRefused
from storage.bus.settings import BusSettings
from storage.files.objects import LocalObjectStore
from storage.postgres.lake import PostgresLake

FACTORY = "tests.integration.ray_backend:open_backend"
LEASE_TTL_S = 2.0
BUS = BusSettings(shards=2, lease_ttl_ms=int(LEASE_TTL_S * 1_000), claim_entries_max=64)
ROLES = RoleSettings(
    claim_poll_ms=50, linger_ms=10, supervisor_tick_ms=200, directory_every_s=0.2, stop_s_max=5.0
)


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
    lake = await open_lake(config)
    return Backend(
        bus=lake.bus,
        catalog=lake.catalog,
        store=LocalObjectStore(Path(config["objects"])),
        hints=lake.hints,
        stack=config["stack"],
        settings=ROLES,
        close=lake.close,
    )
