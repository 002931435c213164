"""Copies of data files on this machine, for what reads only paths: DuckDB and Parquet readers.

A copy has its final name only when its length and SHA-256 are those that the catalog recorded, so
whoever finds the name may read it. A file is fetched in parts, so that memory is bounded by the
parts under way and not by the size of files. Bytes that differ are fetched once more, because a
transfer can be damaged; if they differ again, the object is.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from lakebus.clock import new_uuid
from lakebus.errors import Corrupt, Unavailable
from lakebus.snapshots import DataFile
from storage.files.objects import ObjectStore

PART_BYTES: Final = 8 * 1024 * 1024
AT_ONCE: Final = 8
#: Names of copies that are not whole yet.
PARTIAL_SUFFIX: Final = ".partial"
_READ_BYTES: Final = 1024 * 1024


async def download(store: ObjectStore, file: DataFile, path: Path) -> None:
    """Makes `path` a copy of the file; its folder is there. A file without a recorded SHA-256 is
    taken as it comes. Raises Corrupt (with the member `file_id`), Unavailable."""

    for again in (True, False):
        partial = path.with_name(f".{new_uuid().hex}{PARTIAL_SUFFIX}")
        try:
            digest = await _fetch(store, file, partial)
            if file.sha256 in ("", digest):
                partial.replace(path)
                return
        except OSError as error:
            raise disk_failure(error) from error
        finally:
            partial.unlink(missing_ok=True)
        if not again:
            raise damaged(file)


async def download_all(
    store: ObjectStore, wanted: Iterable[tuple[DataFile, Path]], *, at_once: int = AT_ONCE
) -> None:
    """Several at a time; the first failure ends the others. Raises what `download` raises."""

    gate = asyncio.Semaphore(at_once)

    async def one(file: DataFile, path: Path) -> None:
        async with gate:
            await download(store, file, path)

    tasks = [asyncio.ensure_future(one(file, path)) for file, path in wanted]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as opened:
        while part := opened.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def damaged(file: DataFile) -> Corrupt:
    return Corrupt(
        f"the data file {file.object_key} is not the one that the catalog recorded",
        file_id=str(file.file_id),
    )


def disk_failure(error: OSError) -> Unavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("the disk for copies of data files is full", retry_after_s=30.0)
    return Unavailable(f"a copy of a data file failed: {os.strerror(error.errno or 0)}")


async def _fetch(store: ObjectStore, file: DataFile, path: Path) -> str:
    """The SHA-256 of what was fetched."""

    digest = hashlib.sha256()

    def keep(part: bytes) -> None:
        digest.update(part)
        opened.write(part)
        opened.flush()

    with path.open("xb") as opened:
        for start in range(0, file.size_bytes, PART_BYTES):
            length = min(PART_BYTES, file.size_bytes - start)
            try:
                part = await store.get_range(file.object_key, start, length)
            except Corrupt as error:  # it is not there, or ends too soon
                raise Corrupt(error.detail, file_id=str(file.file_id)) from error
            await _to_its_end(keep, part)
    return digest.hexdigest()


async def _to_its_end(work: Callable[[bytes], None], part: bytes) -> None:
    """In a thread; who is cancelled waits for it, because the file is closed after it."""

    running = asyncio.ensure_future(asyncio.to_thread(work, part))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise
