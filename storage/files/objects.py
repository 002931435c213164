"""Object stores: immutable bytes under names that are never used twice.

What is authoritative: the catalog says which objects exist for readers; a store only keeps bytes.
`put_new` is complete and durable when it returns and never overwrites (contract C6), so an object
that a snapshot names can be read, and two writers can never mix bytes under one name. The
interface is what a bucket with conditional puts offers, plus one capability that a bucket lacks:
`local_path`, asked of the store, never guessed from its kind.

Why the local store is safe against a crash and a power cut at any point of `put_new`: the bytes go
to a file without a name (O_TMPFILE; where the file system has none, to a hidden temporary name),
are synced, and only then linked to the final name, which fails if the name exists; then the
directory is synced. Directories are never removed, and the chain from a directory up to the root
is synced the first time this process writes below it, whoever made it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from lakebus.clock import Clock, SystemClock, new_uuid
from lakebus.errors import ConfigurationError, Corrupt, Fault, Unavailable

_Result = TypeVar("_Result")

#: One path segment of a key. No leading dot: hidden names are the store's own (temporary files).
_SEGMENT = re.compile(r"[A-Za-z0-9_=+,@$-][A-Za-z0-9._=+,@$-]{0,199}")
_KEY_BYTES_MAX = 900
_PATTERN_CHARACTERS = frozenset("*?[")
_TEMPORARY_SUFFIX = ".tmp"
_LIST_BATCH = 1000
#: Objects never change, so nobody needs to write them.
_MODE = 0o444
#: A larger object is synced bit by bit. What others sync meanwhile (PostgreSQL its log, for a
#: caller that waits) comes after what is on its way to the disk: beside 76 MiB at once they waited
#: up to 51 ms, in such steps up to 13.
_STEP_BYTES = 4 * 1024 * 1024


class ObjectExists(Fault):
    """`put_new` met a name that is taken. Names are never reused, so this is a bug of the caller,
    or a repetition of a put whose outcome was unknown; nothing was changed."""


class ObjectStore(Protocol):
    """Narrow on purpose: what a local disk and a bucket both do well."""

    async def put_new(self, key: str, data: bytes) -> None:
        """Stores `data` durably under a name never used before (C6).

        Raises ObjectExists, or Unavailable: the object may then exist or not, and the caller goes
        on under another name.
        """
        ...

    async def get(self, key: str) -> bytes:
        """All bytes. Raises Corrupt when there is no such object, Unavailable."""
        ...

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`. Raises Corrupt when the object has fewer."""
        ...

    async def size(self, key: str) -> int | None:
        """Size in bytes, or None when there is no such object."""
        ...

    async def delete(self, key: str) -> None:
        """Removes the object; one that is not there is no error."""
        ...

    def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        """Every (key, size in bytes) whose key starts with `prefix`, in no promised order. Objects
        put or deleted meanwhile may be in it or not."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the object lies as a file on this machine, or None when the store has no such."""
        ...


class OpenedStore(ObjectStore, Protocol):
    """A store that this process has opened for itself."""

    def close(self) -> None:
        """Ends its threads, once nobody uses it any more."""
        ...


def check_key(key: str) -> str:
    """Returns the key when it is relative, plain and short enough; raises ValueError else.

    Keys are made by lakebus, never by users, so a bad one is a bug and not an answer.
    """

    if len(key) > _KEY_BYTES_MAX or not all(_SEGMENT.fullmatch(s) for s in key.split("/")):
        raise ValueError(
            f"{key[:80]!r} is not an object key: segments of letters, digits and ._=+,@$- with "
            "single slashes between, no leading dot or slash"
        )
    return key


def check_prefix(prefix: str) -> str:
    """As `check_key`, for what a listing asks for: it may be empty, or end at a slash."""

    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class LocalObjectStore:
    """Objects as files below one directory.

    The work runs in a small pool of threads of its own: a sync of tens of milliseconds must not
    stop the event loop, and must not wait behind foreign work in the default pool.
    """

    def __init__(self, root: Path, *, threads: int = 8, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._root = Path(os.path.abspath(root))
        if not _PATTERN_CHARACTERS.isdisjoint(str(self._root)):
            raise ConfigurationError(
                f"the data directory {self._root} has one of * ? [ in its name, which queries "
                "would read as a pattern; choose another directory"
            )
        self._synced_directories: set[str] = set()
        self._unnamed_files = hasattr(os, "O_TMPFILE")
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="objects")

    @property
    def root(self) -> Path:
        return self._root

    async def put_new(self, key: str, data: bytes) -> None:
        check_key(key)
        await self._run(self._put_new, key, data)

    async def get(self, key: str) -> bytes:
        check_key(key)
        return await self._run(self._read, key, 0, None)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        check_key(key)
        if start < 0 or length < 0:
            raise ValueError("a range starts at 0 or later and is not negative")
        return await self._run(self._read, key, start, length)

    async def size(self, key: str) -> int | None:
        check_key(key)
        return await self._run(self._size, key)

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._run(self._delete, key)

    async def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        found = self._walk(check_prefix(prefix))
        while batch := await self._run(_take, found):
            for item in batch:
                yield item

    def local_path(self, key: str) -> Path | None:
        return self._root / check_key(key)

    async def remove_abandoned(self, older_than_s: float) -> int:
        """Removes temporary files that a crash left behind; returns how many.

        Only names that this store gives to unfinished puts are looked at, and only by the age of
        the file, so give an age that no put can take (a day). Where the file system has unnamed
        files there never are any.
        """

        return await self._run(self._remove_abandoned, older_than_s)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    async def _run(self, work: Callable[..., _Result], *arguments: object) -> _Result:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, work, *arguments)
        except OSError as error:
            raise _foreign(error) from error

    def _put_new(self, key: str, data: bytes) -> None:
        directory, _, name = str(self._root / key).rpartition("/")
        if directory not in self._synced_directories:
            self._make_directory(directory)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._write_and_link(handle, name, data)
            os.fsync(handle)
        except FileExistsError as error:
            raise ObjectExists(f"an object named {key} exists already") from error
        finally:
            os.close(handle)

    def _write_and_link(self, directory: int, name: str, data: bytes) -> None:
        if self._unnamed_files:
            try:
                _put_unnamed(directory, name, data)
                return
            except OSError as error:
                # Said by file systems without unnamed files, and where /proc is not mounted
                # (ENOENT): nothing has been linked yet, so the other way is free to try.
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
                self._unnamed_files = False
        _put_by_temporary_name(directory, name, data)

    def _make_directory(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        current = directory
        while True:
            _sync_directory(current)
            if current == str(self._root):
                break
            current = os.path.dirname(current)
        _sync_directory(os.path.dirname(current))  # the root's own name
        self._synced_directories.add(directory)

    def _read(self, key: str, start: int, length: int | None) -> bytes:
        try:
            with open(self._root / key, "rb", buffering=0) as file:
                if length is None:
                    return file.readall()
                file.seek(start)
                data = file.read(length)
                while len(data) < length and (more := file.read(length - len(data))):
                    data += more
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Corrupt(f"the object {key} is not in the store") from error
        if len(data) != length:
            raise Corrupt(f"the object {key} ends before byte {start + length}")
        return data

    def _size(self, key: str) -> int | None:
        try:
            return os.stat(self._root / key).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _delete(self, key: str) -> None:
        try:
            os.unlink(self._root / key)
        except (FileNotFoundError, NotADirectoryError):
            return

    def _walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        # Only the folder part of the prefix can narrow the walk.
        start = prefix.rpartition("/")[0]
        pending = [start]
        while pending:
            folder = pending.pop()
            try:
                entries = list(os.scandir(self._root / folder))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                key = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(key)
                elif key.startswith(prefix) and (size := self._size(key)) is not None:
                    yield key, size

    def _remove_abandoned(self, older_than_s: float) -> int:
        newest = self._clock.utc_now().timestamp() - older_than_s
        removed = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                if not (name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX)):
                    continue
                path = os.path.join(folder, name)
                try:
                    if os.stat(path).st_mtime <= newest:
                        os.unlink(path)
                        removed += 1
                except FileNotFoundError:
                    continue  # its put ended meanwhile
        return removed


class MemoryObjectStore:
    """Objects in a dict, for tests and simulations; held to the same tests as the other stores."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    async def put_new(self, key: str, data: bytes) -> None:
        if check_key(key) in self._objects:
            raise ObjectExists(f"an object named {key} exists already")
        self._objects[key] = bytes(data)

    async def get(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise Corrupt(f"the object {key} is not in the store") from None

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        if start < 0 or length < 0:
            raise ValueError("a range starts at 0 or later and is not negative")
        data = (await self.get(key))[start : start + length]
        if len(data) != length:
            raise Corrupt(f"the object {key} ends before byte {start + length}")
        return data

    async def size(self, key: str) -> int | None:
        data = self._objects.get(check_key(key))
        return None if data is None else len(data)

    async def delete(self, key: str) -> None:
        self._objects.pop(check_key(key), None)

    async def list(self, prefix: str = "") -> AsyncIterator[tuple[str, int]]:
        check_prefix(prefix)
        found = [(key, len(data)) for key, data in self._objects.items() if key.startswith(prefix)]
        for item in found:
            yield item

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None


def _take(found: Iterator[tuple[str, int]]) -> list[tuple[str, int]]:
    return list(itertools.islice(found, _LIST_BATCH))


def _foreign(error: OSError) -> Unavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("the object store is full", retry_after_s=30.0)
    return Unavailable(f"the object store failed: {os.strerror(error.errno or 0)}")


def _put_unnamed(directory: int, name: str, data: bytes) -> None:
    file = os.open(".", os.O_TMPFILE | os.O_WRONLY, _MODE, dir_fd=directory)
    try:
        _write_all(file, data)
        os.fsync(file)
        os.link(
            f"/proc/self/fd/{file}",
            name,
            src_dir_fd=directory,  # its presence makes Python follow the /proc link
            dst_dir_fd=directory,
            follow_symlinks=True,
        )
    finally:
        os.close(file)


def _put_by_temporary_name(directory: int, name: str, data: bytes) -> None:
    temporary = f".{new_uuid().hex}{_TEMPORARY_SUFFIX}"
    file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _MODE, dir_fd=directory)
    try:
        try:
            _write_all(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        os.unlink(temporary, dir_fd=directory)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    in_steps = len(rest) > _STEP_BYTES
    while rest:
        rest = rest[os.write(file, rest[:_STEP_BYTES]) :]
        if in_steps:
            os.fdatasync(file)


def _sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
