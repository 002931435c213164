"""One process of a small stack: `python -m tests.matrix.connection_process ROLE SETTINGS PORT`.

The real composition (`cluster.assembly`) without Ray: `door` and `reader` serve the API, the
coordinator hosts all roles. Like a supervised process it tries again until what it needs is there,
so processes may be started in any order.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvicorn

from actors.role_host import RoleHost
from cluster import assembly
from cluster.backend import open_backend
from lakebus.errors import LakebusError
from serve_app.app import create_app

_AGAIN_S = 0.1


async def serve(settings_path: str, port: int) -> None:
    async with assembly.api_dependencies(settings_path) as dependencies:
        config = uvicorn.Config(
            create_app(dependencies),
            host="127.0.0.1",
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        await uvicorn.Server(config).serve()


async def coordinate(settings_path: str) -> None:
    backend = await open_backend(settings_path)
    host = RoleHost(backend=backend, on_fatal=lambda _role, _error: os._exit(1))
    await host.start()
    await asyncio.Event().wait()


async def live(role: str, settings_path: str, port: int) -> None:
    while True:
        try:
            await (
                coordinate(settings_path) if role == "coordinator" else serve(settings_path, port)
            )
            return
        except (LakebusError, OSError):
            await asyncio.sleep(_AGAIN_S)  # the database is not there yet


if __name__ == "__main__":
    asyncio.run(live(sys.argv[1], sys.argv[2], int(sys.argv[3])))
