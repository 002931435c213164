"""Caged engines, for predicates that callers wrote: one that a process keeps for its jobs.

Starting a cage costs about a second of CPU, more than most deletes have to do otherwise. So the
process that runs jobs, one after the other, keeps its cage warm. What may be shared: predicates are
plain conditions that change nothing and are guarded like every query, and query replicas have
callers share a cage, too. What may not: a cage reads one folder, so one whose files were brought to
the job's own folder is the job's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.maintenance.jobs import JobContext


class WarmCage:
    """A cage of this process, for one job at a time, on one event loop. `folder` is made for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engine: QueryEngine | None = None
        self._settings: EngineSettings | None = None

    async def engine(self, settings: EngineSettings) -> QueryEngine:
        """The cage, if it is up and was made alike; else a new one. Raises StartRefused."""

        settings = dataclasses.replace(settings, temp_directory=str(self._folder.absolute()))
        if self._engine is not None:
            if self._settings == settings and self._engine.status()["ready"]:
                # Folders of jobs that nobody has touched for long are cleared away.
                await asyncio.to_thread(os.utime, self._folder)
                return self._engine
            await self.stop()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = QueryEngine(settings)
        await engine.start()
        self._engine, self._settings = engine, settings
        return engine

    async def stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()


@asynccontextmanager
async def caged_engine(
    context: JobContext, *, own_files: bool = False
) -> AsyncIterator[QueryEngine]:
    """A caged engine for one statement at a time, without a spare. `own_files`: it reads files that
    the job has written below `matches`, and not the store's."""

    own = own_files or context.store.local_path("probe") is None
    allowed = Path(context.engine.allowed_directory)
    if own:
        allowed = context.temp_dir / "matches"  # where files are brought to
    allowed.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(
        context.engine,
        allowed_directory=str(allowed.absolute()),
        temp_directory=str((context.temp_dir / "cage").absolute()),
        spare=False,
        concurrent_queries=1,
        threads=max(1, context.settings.rewrite_threads),
    )
    if context.cage is not None and not own:
        yield await context.cage.engine(settings)
        return
    engine = QueryEngine(settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
