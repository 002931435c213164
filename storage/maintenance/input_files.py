"""The files that a job reads: kept in the store while it reads them, and brought to it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from lakebus.errors import Corrupt, OutcomeUnknown, SnapshotExpired, Unavailable
from lakebus.snapshots import DataFile
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

    located = []
    for file in files:
        path = context.store.local_path(file.object_key)
        if path is None:
            path = await _download(context, file, folder)
        located.append(RewriteInput(file, path))
    return tuple(located)


async def _download(context: JobContext, file: DataFile, folder: Path) -> Path:
    try:
        data = await patiently(context, lambda: context.store.get(file.object_key))
    except Corrupt as error:
        raise _damaged(file) from error

    def write() -> Path:
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise _damaged(file)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file.file_id}.parquet"
        path.write_bytes(data)
        return path

    return await asyncio.to_thread(write)


def _damaged(file: DataFile) -> Corrupt:
    return Corrupt(
        f"the data file {file.object_key} is not the one that the catalog recorded",
        file_id=str(file.file_id),
    )
