"""Copies of immutable files on local disk, so that queries of a remote store read paths.

What is authoritative: the catalog and the store. A copy is a convenience that may vanish with no
loss; it can be slow to come and never wrong, because its name says which bytes it has (file id,
size, SHA-256), and it has that name only after they were checked (`storage.files.downloads`).

Whose folder: each process has a numbered folder (slot) of the cache folder for itself, held by a
file lock that the kernel lets go of when the process ends. So nobody evicts what another reads, and
a process that is started anew finds the copies of its predecessor. Those are read through once,
before their first use, since a machine may have lost its power in between.

How much: the copies of a slot, whole or under way, take `bytes_max` at most. Who needs files takes
a lease on all of them at once; leased copies are not evicted. When what others hold leaves no room,
a lease waits its turn (in order of arrival, within the deadline of its query); as nobody waits
while holding, all get theirs. A query whose files alone exceed `bytes_max` is refused.

Erased rows (contract E7): a copy that no snapshot needs any more by `needed` is removed when
`sweep` is called, or when its last lease ends; `sweep` looks into the slots of ended processes too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lakebus.errors import ConfigurationError, ResultTooLarge, Unavailable
from lakebus.snapshots import DataFile
from lakebus.telemetry import NO_METRICS, Metrics
from storage.files.cache_counts import CacheCounts
from storage.files.downloads import AT_ONCE, disk_failure, download, sha256_of
from storage.files.objects import ObjectStore

_log = logging.getLogger(__name__)

_LOCK: Final = "lock"
_SLOTS_MAX: Final = 1024
_NAME = re.compile(r"([0-9a-f]{32})-(\d{1,15})-[0-9a-f]{16}\.parquet")
_PATTERN_CHARACTERS: Final = frozenset("*?[")
_MODE: Final = 0o700


@dataclass(slots=True, eq=False)
class _Copy:
    """`task`: fetches or looks through it. `checked`: it is there, and is what its name says."""

    name: str
    file_id: uuid.UUID
    size_bytes: int
    checked: bool = False
    found: bool = False
    pins: int = 0
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class FileLease:
    """The files are where `FileCache.path` says until `release`, which may be repeated."""

    _cache: FileCache
    _copies: list[_Copy] = field(default_factory=list)

    def release(self) -> None:
        copies, self._copies = self._copies, []
        self._cache._unpin(copies)


class FileCache:
    """The copies of one process. Made by `open`; belongs to one event loop."""

    def __init__(
        self,
        store: ObjectStore,
        slot: _Slot,
        *,
        bytes_max: int,
        fetches_at_once: int = AT_ONCE,
        needed: Callable[[uuid.UUID], bool] = lambda _: True,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._store = store
        self._slot = slot
        self._bytes_max = bytes_max
        self.needed = needed
        self._gate = asyncio.Semaphore(fetches_at_once)
        self._waiting: deque[tuple[Sequence[DataFile], asyncio.Future[FileLease]]] = deque()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self.counts = CacheCounts(metrics=metrics)
        for copy in slot.found():
            self._copies[copy.name] = copy
            self.counts.bytes_kept += copy.size_bytes
        self._make_room(0)

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        folder: Path,
        *,
        bytes_max: int,
        fetches_at_once: int = AT_ONCE,
        needed: Callable[[uuid.UUID], bool] = lambda _: True,
        metrics: Metrics = NO_METRICS,
    ) -> FileCache:
        """Takes the first slot that nobody has. Raises ConfigurationError."""

        return cls(
            store,
            _Slot.take(folder.absolute()),
            bytes_max=bytes_max,
            fetches_at_once=fetches_at_once,
            needed=needed,
            metrics=metrics,
        )

    @property
    def folder(self) -> Path:
        """Everything that is ever read lies directly in it."""

        return self._slot.folder

    def path(self, file: DataFile) -> str:
        """Where the copy lies while it is leased."""

        return f"{self._slot.folder}/{_name_of(file)}"

    async def lease(self, files: Iterable[DataFile]) -> FileLease:
        """Returns when all files are there. Raises ResultTooLarge, Corrupt, Unavailable."""

        wanted = list({file.file_id: file for file in files}.values())
        lease = self._at_once(wanted)
        if lease is not None:
            return lease
        size_bytes = sum(file.size_bytes for file in wanted)
        if size_bytes > self._bytes_max:
            raise ResultTooLarge(
                f"the query reads {size_bytes} bytes of files, and this server keeps copies of "
                f"{self._bytes_max} bytes at most; narrow it by a partition or sort column, or have"
                " an operator raise store.cache_max_bytes",
                limit_bytes=self._bytes_max,
            )
        lease = await self._admitted(wanted)
        try:
            await self._bring(lease, wanted)
        except BaseException:
            lease.release()
            raise
        return lease

    def sweep(self) -> None:
        """Removes the copies that no snapshot needs; of leased ones when their lease ends."""

        for copy in [c for c in self._copies.values() if not c.pins]:
            if not self.needed(copy.file_id):
                self._drop(copy)
        self._slot.sweep_others(self.needed)

    async def close(self) -> None:
        """Ends what is under way and gives up the slot; the copies stay for the next process."""

        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(Unavailable("this server is stopping; ask another one"))
        self._waiting.clear()
        tasks = [copy.task for copy in self._copies.values() if copy.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._copies.clear()  # what leases still hold is not ours to remove any more
        self._slot.give_back()

    # --- leases -------------------------------------------------------------------------------

    def _at_once(self, wanted: Sequence[DataFile]) -> FileLease | None:
        """The usual way: all are there, nothing is waited for."""

        copies = []
        for file in wanted:
            copy = self._copies.get(_name_of(file))
            if copy is None or not copy.checked:
                return None
            copies.append(copy)
        self._pin(copies)
        self.counts.hits += len(copies)
        return FileLease(self, copies)

    async def _admitted(self, wanted: Sequence[DataFile]) -> FileLease:
        """Room for all of them at once, in order of arrival."""

        if not self._waiting and self._fits(wanted):
            return self._reserve(wanted)
        waiter: asyncio.Future[FileLease] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, waiter))
        try:
            return await waiter
        except asyncio.CancelledError:
            # Admitted in the very moment in which the caller left.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()
            self._waiting = deque(one for one in self._waiting if one[1] is not waiter)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            wanted, waiter = self._waiting[0]
            if waiter.done():
                self._waiting.popleft()
            elif self._fits(wanted):
                self._waiting.popleft()
                waiter.set_result(self._reserve(wanted))
            else:
                return

    def _fits(self, wanted: Sequence[DataFile]) -> bool:
        more_bytes = 0
        for file in wanted:
            copy = self._copies.get(_name_of(file))
            if copy is None or not copy.pins:
                more_bytes += file.size_bytes
        return self.counts.bytes_leased + more_bytes <= self._bytes_max

    def _reserve(self, wanted: Sequence[DataFile]) -> FileLease:
        known: list[_Copy] = []
        absent: list[_Copy] = []
        for file in wanted:
            copy = self._copies.get(_name_of(file))
            if copy is not None:
                known.append(copy)
            else:
                absent.append(_Copy(_name_of(file), file.file_id, file.size_bytes))
        self._pin(known)
        self._make_room(sum(copy.size_bytes for copy in absent))
        for copy in absent:
            self._copies[copy.name] = copy
            self.counts.bytes_kept += copy.size_bytes
        self._pin(absent)
        return FileLease(self, [*known, *absent])

    def _pin(self, copies: Iterable[_Copy]) -> None:
        for copy in copies:
            if not copy.pins:
                self.counts.bytes_leased += copy.size_bytes
            copy.pins += 1
            self._copies.move_to_end(copy.name)

    def _unpin(self, copies: Sequence[_Copy]) -> None:
        freed = False
        for copy in copies:
            copy.pins -= 1
            if copy.pins:
                continue
            freed = True
            if self._copies.get(copy.name) is not copy:  # its fetch failed; it counts no more
                continue
            self.counts.bytes_leased -= copy.size_bytes
            if not copy.checked and copy.found:
                _give_up(copy)
            elif not copy.checked or not self.needed(copy.file_id):
                self._drop(copy)
        if freed:
            self._admit()
        self.counts.tell()

    def _make_room(self, more_bytes: int) -> None:
        while self.counts.bytes_kept + more_bytes > self._bytes_max:
            copy = next((c for c in self._copies.values() if not c.pins), None)
            if copy is None:
                return
            self.counts.evicted += 1
            self._drop(copy)

    def _drop(self, copy: _Copy) -> None:
        """Takes a copy out, and from the disk; whoever has it open reads on."""

        if self._copies.get(copy.name) is not copy:
            return
        del self._copies[copy.name]
        self.counts.bytes_kept -= copy.size_bytes
        if copy.pins:
            self.counts.bytes_leased -= copy.size_bytes
        _give_up(copy)
        if copy.checked or copy.found:
            self._slot.remove(copy.name)

    # --- bringing -----------------------------------------------------------------------------

    async def _bring(self, lease: FileLease, wanted: Sequence[DataFile]) -> None:
        by_name = {_name_of(file): file for file in wanted}
        tasks = []
        for copy in lease._copies:
            if copy.checked:
                self.counts.hits += 1
                continue
            if copy.task is None:
                copy.task = asyncio.ensure_future(self._fetch(copy, by_name[copy.name]))
                copy.task.add_done_callback(_seen)
            tasks.append(copy.task)
        if not tasks:
            return
        # Not a gather: other leases may wait for the same tasks, so leaving must not cancel them.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            if task.cancelled():
                raise Unavailable("this server is stopping; ask another one")
            error = task.exception()
            if error is not None:
                raise error

    async def _fetch(self, copy: _Copy, file: DataFile) -> None:
        path = self._slot.folder / copy.name
        own = asyncio.current_task()
        try:
            async with self._gate:
                if copy.found and not await self._is_whole(path, file):
                    copy.found = False
                if not copy.found:
                    await download(self._store, file, path)
                    self.counts.fetched += 1
                    self.counts.bytes_fetched += copy.size_bytes
        except BaseException:
            if copy.task is own:  # else it was given up already
                copy.task = None
                self._drop(copy)
            raise
        copy.checked, copy.task = True, None

    async def _is_whole(self, path: Path, file: DataFile) -> bool:
        """Of a copy that an earlier process left."""

        try:
            return await asyncio.to_thread(sha256_of, path) == file.sha256
        except FileNotFoundError:
            return False
        except OSError as error:
            raise disk_failure(error) from error


def _give_up(copy: _Copy) -> None:
    """Ends what brings it, or looks through it."""

    task, copy.task = copy.task, None
    if task is not None:
        task.cancel()


def _seen(task: asyncio.Task[None]) -> None:
    """A failure that everybody who waited for it has left is no surprise."""

    if not task.cancelled():
        task.exception()


def _name_of(file: DataFile) -> str:
    return f"{file.file_id.hex}-{file.size_bytes}-{file.sha256[:16]}.parquet"


@dataclass(frozen=True, slots=True)
class _Slot:
    """A folder that belongs to this process while it holds the lock in it."""

    root: Path
    folder: Path
    lock: int

    @classmethod
    def take(cls, root: Path) -> _Slot:
        if not _PATTERN_CHARACTERS.isdisjoint(str(root)):
            raise ConfigurationError(
                f"the folder {root} (store.cache_dir) has one of * ? [ in its name, which queries "
                "would read as a pattern; choose another"
            )
        try:
            root.mkdir(mode=_MODE, parents=True, exist_ok=True)
            for number in range(_SLOTS_MAX):
                folder = root / str(number)
                folder.mkdir(mode=_MODE, exist_ok=True)
                lock = _lock_of(folder)
                if lock is not None:
                    return cls(root, folder, lock)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise ConfigurationError(
                f"the folder {root} (store.cache_dir) cannot be used: {why}"
            ) from error
        raise ConfigurationError(f"the folder {root} (store.cache_dir) is used by too many servers")

    def found(self) -> list[_Copy]:
        """What an earlier process left, the oldest first. What is not whole is removed."""

        kept: list[tuple[float, _Copy]] = []
        for entry in list(os.scandir(self.folder)):
            if entry.name == _LOCK:
                continue
            match = _NAME.fullmatch(entry.name)
            info = entry.stat(follow_symlinks=False)
            if match is None or info.st_size != int(match[2]) or not entry.is_file():
                _remove(Path(entry.path))
                continue
            copy = _Copy(entry.name, uuid.UUID(match[1]), info.st_size, found=True)
            kept.append((info.st_mtime, copy))
        return [copy for _, copy in sorted(kept, key=lambda one: one[0])]

    def remove(self, name: str) -> None:
        _remove(self.folder / name)

    def sweep_others(self, needed: Callable[[uuid.UUID], bool]) -> None:
        """In slots whose process has ended; the others sweep for themselves."""

        for folder in self.root.iterdir():
            if folder == self.folder or not folder.name.isdigit():
                continue
            with _locked(folder) as ours:
                for path in folder.iterdir() if ours else ():
                    match = _NAME.fullmatch(path.name)
                    if path.name != _LOCK and (match is None or not needed(uuid.UUID(match[1]))):
                        _remove(path)

    def give_back(self) -> None:
        os.close(self.lock)


def _lock_of(folder: Path) -> int | None:
    """The lock of a folder, or None while another process (or cache) has it."""

    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    lock = _lock_of(folder)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _remove(path: Path) -> None:
    """Best effort: a copy that stays is found, and judged again, at the next start."""

    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a copy of a data file cannot be removed: %s", error)
