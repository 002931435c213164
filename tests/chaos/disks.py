"""The disks of a run: small file systems of their own where we may mount, plain folders where not.

Full: a file takes all that is left, and is removed again. Away: the folder of the objects and an
empty file change names, atomically, so that every open and every mkdir below it fails, and nothing
can be written beside the point.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CHUNK_BYTES = 1024 * 1024
_BALLAST = "ballast"


def may_mount() -> bool:
    return os.geteuid() == 0


class Disk:
    """A folder of the run; with `size_bytes` a file system of its own."""

    def __init__(self, folder: Path, *, size_bytes: int | None) -> None:
        self.folder = folder
        self._mounted = False
        folder.mkdir(parents=True, exist_ok=True)
        if size_bytes is not None:
            options = f"size={size_bytes},mode=0711"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
            self._mounted = True

    @property
    def own(self) -> bool:
        return self._mounted

    def fill(self) -> int:
        """Takes all that is left; returns how many bytes that was."""
        if not self._mounted:
            raise ValueError(f"{self.folder} is no file system of its own")
        taken = 0
        with open(self.folder / _BALLAST, "wb") as ballast:
            free = os.statvfs(self.folder)
            with contextlib.suppress(OSError):
                taken = max(0, free.f_bavail * free.f_frsize - _CHUNK_BYTES)
                os.posix_fallocate(ballast.fileno(), 0, taken)
            ballast.seek(0, os.SEEK_END)
            size = _CHUNK_BYTES
            while size:
                try:
                    taken += os.write(ballast.fileno(), bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
        return taken

    def free(self) -> None:
        (self.folder / _BALLAST).unlink(missing_ok=True)

    def close(self) -> None:
        if self._mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=True)
            self._mounted = False


class Objects:
    """The folder of the data files, which can be taken away and put back."""

    def __init__(self, disk: Disk) -> None:
        self.folder = disk.folder / "objects"
        self._other = disk.folder / "elsewhere"
        self.folder.mkdir(exist_ok=True)
        self._other.touch()

    @property
    def away(self) -> bool:
        return not self.folder.is_dir()

    def take_away(self) -> None:
        if not self.away:
            _exchange(self.folder, self._other)

    def put_back(self) -> None:
        if self.away:
            _exchange(self.folder, self._other)


def _exchange(one: Path, other: Path) -> None:
    """Two names change places in one step (renameat2 with RENAME_EXCHANGE)."""
    library = ctypes.CDLL(None, use_errno=True)
    done = library.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))
