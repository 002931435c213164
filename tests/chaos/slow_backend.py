"""A backend whose import takes long, as ours does on a busy machine."""

from __future__ import annotations

import time

from actors.backend import Backend
from lakebus.errors import StartRefused

IMPORT_S = 4.0

time.sleep(IMPORT_S)


async def open_backend(config: str) -> Backend:
    raise StartRefused(config)
