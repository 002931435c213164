"""Disks that fail, as `storage.files.objects.LocalObjectStore` meets them.

`watched_disk` stands between that module and `os`: it tells each step of a put as it is reached
(`DiskPoint`), and whoever is told may record it, raise an OSError, or end the process. So a put can
be cut at each step without a marker in the product, and the order of its steps can be read.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from storage.files import objects

_KINDS_OF_WRITING = os.O_WRONLY | os.O_RDWR


class DiskPoint(StrEnum):
    """The steps of a put in their order; each is told when it is done, but no further one is."""

    OPENED = "opened"
    HALF_WRITTEN = "half_written"
    WRITTEN = "written"
    FILE_SYNCED = "file_synced"
    LINKED = "linked"
    FOLDER_SYNCED = "folder_synced"


#: Told a step and the path of its object, which has no name before it is linked: its folder then.
OnPoint = Callable[[DiskPoint, Path], None]


def no_space(at: DiskPoint, *, part: str = "") -> OnPoint:
    """A disk that is full: that step, which writes or syncs, fails (where given, below `part`)."""

    if at in (DiskPoint.OPENED, DiskPoint.LINKED):
        raise ValueError(f"{at} is told after its effect, so it cannot fail for want of space")

    def on_point(point: DiskPoint, path: Path) -> None:
        if point is at and (not part or part in path.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return on_point


class _WatchedOs:
    """`os` as the object store uses it. Directories and files are told apart by how they are
    opened; only the sync of a folder that follows a link is a step of a put."""

    def __init__(self, on_point: OnPoint) -> None:
        self._on_point = on_point
        self._folders: dict[int, Path] = {}
        self._linked: dict[int, Path] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, *arguments: Any, **keywords: Any) -> int:
        handle = os.open(path, flags, *arguments, **keywords)
        if flags & _KINDS_OF_WRITING:
            self._folders[handle] = _path_of(keywords["dir_fd"])
            self._on_point(DiskPoint.OPENED, self._folders[handle])
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        half = len(data) // 2
        written = os.write(handle, data[:half]) if half else 0
        self._on_point(DiskPoint.HALF_WRITTEN, self._folders[handle])
        while written < len(data):
            written += os.write(handle, data[written:])
        self._on_point(DiskPoint.WRITTEN, self._folders[handle])
        return written

    def fsync(self, handle: int) -> None:
        os.fsync(handle)
        if (folder := self._folders.get(handle)) is not None:
            self._on_point(DiskPoint.FILE_SYNCED, folder)
        elif (path := self._linked.pop(handle, None)) is not None:
            self._on_point(DiskPoint.FOLDER_SYNCED, path)

    def link(self, source: str, name: str, **keywords: Any) -> None:
        os.link(source, name, **keywords)
        folder = keywords["dst_dir_fd"]
        self._linked[folder] = _path_of(folder) / name
        self._on_point(DiskPoint.LINKED, self._linked[folder])

    def close(self, handle: int) -> None:
        self._folders.pop(handle, None)
        self._linked.pop(handle, None)
        os.close(handle)


def _path_of(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}"))


@contextlib.contextmanager
def watched_disk(on_point: OnPoint, *, unnamed_files: bool = True) -> Iterator[None]:
    """Every local store of this process meets this disk meanwhile. `unnamed_files` False is a file
    system without O_TMPFILE."""

    watched: Any = _WatchedOs(on_point)
    if not unnamed_files:
        watched = _without_unnamed_files(watched)
    with mock.patch.object(objects, "os", watched):
        yield


def _without_unnamed_files(watched: _WatchedOs) -> Any:
    names = {name: getattr(watched, name) for name in dir(os) if not name.startswith("__")}
    del names["O_TMPFILE"]
    return SimpleNamespace(**names)
