"""A PostgreSQL of a benchmark's own, for those that need no stack."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.embedded_postgres import EmbeddedPostgres


@contextmanager
def own_postgres(settings: dict[str, str] | None = None) -> Iterator[str]:
    """The DSN of a server with the settings of a stack's, fsync on, and `settings` on top. It
    belongs to whoever starts the programs, so that it is stopped however they end."""

    folder = Path(tempfile.mkdtemp(prefix="lakebus-bench-postgres-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder, sync_init=False, settings=settings)
    try:
        asyncio.run(server.start())
        yield server.dsn
    finally:
        asyncio.run(server.stop())
        shutil.rmtree(folder, ignore_errors=True)
