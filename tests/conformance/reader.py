"""One replica's read path over a backend: everything but SQL.

What a query would return is told from the stand-in files that the snapshot names, so the suite
needs no engine: the rows of every (table, shard, position).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from lakebus.tokens import TokenCodec, VisibilityToken
from storage.reading.barrier import AnyToken, Barrier
from storage.reading.manifest import Manifest, SnapshotView
from storage.reading.resolve import LATEST, Resolved, Resolver, SnapshotChoice
from storage.reading.watcher import HeadWatcher
from tests.conformance.harness import LakeHarness, LakeView
from tests.conformance.worker import Place, StagedFiles

#: (table name, (shard, position)) → rows
Rows = dict[tuple[str, Place], int]


@dataclass(frozen=True, slots=True)
class Read:
    """What one read saw."""

    resolved: Resolved
    view: SnapshotView
    rows: Rows

    @property
    def snapshot_id(self) -> int:
        return self.resolved.snapshot_id

    @property
    def token(self) -> VisibilityToken:
        return self.resolved.token


class Reader:
    """Use inside `reading`. Without a listener, so that nothing but polling wakes it."""

    def __init__(self, view: LakeView, files: StagedFiles, codec: TokenCodec) -> None:
        self.files = files
        self.codec = codec
        self.watcher = HeadWatcher(view.catalog, poll_s=0.02)
        self.barrier = Barrier(
            catalog=view.catalog, bus=view.bus, watcher=self.watcher, codec=codec
        )
        self.resolver = Resolver(catalog=view.catalog, barrier=self.barrier)
        self.manifest = Manifest(view.catalog)

    async def read(
        self,
        choice: SnapshotChoice = LATEST,
        *,
        tokens: Sequence[AnyToken] = (),
        within_s: float = 10.0,
        staleness_s: float = 0.0,
    ) -> Read:
        resolved = await self.resolver.resolve(
            choice,
            tokens=tokens,
            deadline_s=time.monotonic() + within_s,
            staleness_s=staleness_s,
        )
        view = await self.manifest.at(resolved.snapshot_id, resolved.head)
        rows: Rows = {}
        for name, schema in view.schemas().items():
            for file in view.files(schema.table_id).files:
                for place, count in self.files.contents[file.file_id].items():
                    assert (name, place) not in rows, f"{place} was published twice"
                    rows[name, place] = count
        return Read(resolved, view, rows)


@asynccontextmanager
async def reading(lake: LakeHarness, view: LakeView | None = None) -> AsyncIterator[Reader]:
    identity = await lake.catalog.identity()
    reader = Reader(
        view or LakeView(lake.bus, lake.catalog, lake.jobs, lake.upkeep),
        lake.files,
        TokenCodec(identity.token_secret),
    )
    reader.watcher.start()
    try:
        yield reader
    finally:
        await reader.watcher.stop()
        await reader.barrier.close()
        await reader.manifest.close()
