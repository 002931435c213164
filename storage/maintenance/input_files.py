"""The files that a job reads: kept in the store while it reads them, and brought to it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from lakebus.errors import OutcomeUnknown, SnapshotExpired, Unavailable
from lakebus.snapshots import DataFile
from storage.files.downloads import download_all
from storage.maintenance.jobs import JobContext
from storage.maintenance.patience import patiently
from storage.maintenance.rewriting import RewriteInput

_HEADS_TRIED: Final = 6


class FilePin:
    """Files that the newest snapshot needs now stay in the store while it is held. A floor, because
    such a pin can be renewed also after its snapshot has expired."""

    def __init__(self, context: JobContext, note: str) -> None:
        self._context, self._note = context, note
        self._pin_id = context.chance.new_uuid()
        self._floor: int | None = None

    async def hold(self) -> None:
        """Takes or renews it."""

        for _ in range(_HEADS_TRIED):
            if self._floor is None:
                self._floor = (
                    await patiently(self._context, self._context.catalog.head)
                ).snapshot_id
            try:
                await patiently(self._context, self._take)
                return
            except SnapshotExpired:
                self._floor = None  # expired between the two calls; the head itself never does
        raise Unavailable("snapshots expire faster than they can be pinned", retry_after_s=1.0)

    async def _take(self) -> None:
        context = self._context
        await context.upkeep.pin(
            self._pin_id,
            kind="job",
            floor=self._floor,
            ttl_s=context.settings.intent_ttl_s,
            note=self._note,
        )

    async def release(self) -> None:
        # It expires by itself; an error here would hide the one that ends the work.
        with suppress(Unavailable, OutcomeUnknown):
            await self._context.upkeep.release_pin(self._pin_id)


async def locate(
    context: JobContext, files: Iterable[DataFile], folder: Path
) -> tuple[RewriteInput, ...]:
    """Where the files lie on this machine, downloaded where they do not. Raises Corrupt for a
    download that is not what was recorded."""

    located: list[RewriteInput] = []
    absent: list[tuple[DataFile, Path]] = []
    for file in files:
        path = context.store.local_path(file.object_key)
        if path is None:
            path = folder / f"{file.file_id}.parquet"
            absent.append((file, path))
        located.append(RewriteInput(file, path))
    if absent:
        folder.mkdir(parents=True, exist_ok=True)
        await patiently(context, lambda: download_all(context.store, _still(absent)))
    return tuple(located)


def _still(absent: Iterable[tuple[DataFile, Path]]) -> list[tuple[DataFile, Path]]:
    """Those that an attempt before has not brought: what has its name is whole."""

    return [(file, path) for file, path in absent if not path.exists()]
