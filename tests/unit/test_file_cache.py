"""Copies of files on this machine: never wrong, bounded, not taken from under who reads them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lakebus.errors import ConfigurationError, Corrupt, ResultTooLarge, Unavailable
from lakebus.snapshots import DataFile
from lakebus.telemetry import MemoryMetrics
from storage.files import downloads
from storage.files.cache import FileCache
from storage.files.downloads import download_all
from storage.files.objects import MemoryObjectStore
from tests.faults.store import FaultyStore, Operation, Script, StoreFault

ROOT = Path(__file__).parents[2]


class Store(MemoryObjectStore):
    """Counts what is read, and stands still or answers with other bytes on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.running = self.running_max = 0
        self.damage = 0
        self.open = asyncio.Event()
        self.open.set()

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        self.reads.append(key)
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.open.wait()
            data = await super().get_range(key, start, length)
        finally:
            self.running -= 1
        if self.damage:
            self.damage -= 1
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    async def file(self, size_bytes: int = 100, *, missing: bool = False) -> DataFile:
        file_id = uuid.uuid4()
        data = os.urandom(size_bytes)
        key = f"tables/1/{file_id}.parquet"
        if not missing:
            await self.put_new(key, data)
        return DataFile(file_id, 1, 1, key, 1, size_bytes, hashlib.sha256(data).hexdigest(), {})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def cache(store: Store, tmp_path: Path) -> AsyncIterator[FileCache]:
    made = FileCache.open(store, tmp_path / "cache", bytes_max=300)
    yield made
    await made.close()


def names(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"lock"}


def there(cache: FileCache, file: DataFile) -> bool:
    return Path(cache.path(file)).exists()


async def until_reading(store: Store, reads: int) -> None:
    async with asyncio.timeout(30):
        while len(store.reads) < reads:
            await asyncio.sleep(0)


async def test_files_are_brought_once_and_found_again(store: Store, cache: FileCache) -> None:
    files = [await store.file() for _ in range(3)]
    lease = await cache.lease([*files, files[0]])
    for file in files:
        copied = await asyncio.to_thread(Path(cache.path(file)).read_bytes)
        assert copied == await store.get(file.object_key)
    lease.release()
    lease.release()
    (await cache.lease(files)).release()
    assert sorted(store.reads) == sorted(file.object_key for file in files)
    assert (cache.counts.fetched, cache.counts.hits) == (3, 3)
    assert (cache.counts.bytes_kept, cache.counts.bytes_leased) == (300, 0)


async def test_the_longest_unused_copy_makes_room(store: Store, cache: FileCache) -> None:
    first, second, third, fourth = [await store.file() for _ in range(4)]
    for file in (first, second, third, first, fourth):
        (await cache.lease([file])).release()
    assert [there(cache, file) for file in (first, second, third, fourth)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert cache.counts.bytes_kept == 300
    assert cache.counts.evicted == 1


async def test_what_the_cache_did_is_told_as_metrics(store: Store, tmp_path: Path) -> None:
    metrics = MemoryMetrics()
    cache = FileCache.open(store, tmp_path / "told", bytes_max=300, metrics=metrics)
    first, *others = [await store.file() for _ in range(4)]
    for files in ([first], [first], others):
        (await cache.lease(files)).release()
    told = {
        name: metrics.value(f"lakebus_file_cache_{name}")
        for name in (
            "hits_total", "fetches_total", "fetched_bytes_total", "evictions_total", "bytes"
        )
    }  # fmt: skip
    assert list(told.values()) == [1, 4, 400, 1, 300]
    await cache.close()


async def test_E3_a_leased_copy_is_not_taken_away(store: Store, cache: FileCache) -> None:
    held = [await store.file() for _ in range(2)]
    lease = await cache.lease(held)
    for _ in range(4):
        (await cache.lease([await store.file()])).release()
    assert all(there(cache, file) for file in held)
    assert cache.counts.bytes_kept <= 300
    lease.release()


async def test_who_finds_no_room_waits_until_others_are_done(
    store: Store, cache: FileCache
) -> None:
    lease = await cache.lease([await store.file() for _ in range(2)])
    wanted = [await store.file() for _ in range(2)]
    waiting = asyncio.create_task(cache.lease(wanted))
    behind = asyncio.create_task(cache.lease([await store.file()]))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(waiting)
    assert not behind.done()  # in order of arrival
    lease.release()
    (await waiting).release()
    (await behind).release()
    assert cache.counts.bytes_kept <= 300
    assert cache.counts.bytes_leased == 0


async def test_who_gives_up_waiting_lets_the_next_one_in(store: Store, cache: FileCache) -> None:
    lease = await cache.lease([await store.file() for _ in range(2)])
    wanted = [await store.file() for _ in range(3)]
    waiting = asyncio.create_task(cache.lease(wanted[:2]))
    behind = asyncio.create_task(cache.lease(wanted[2:]))
    await asyncio.sleep(0)
    waiting.cancel()
    (await asyncio.wait_for(behind, 30)).release()
    lease.release()
    assert cache.counts.bytes_leased == 0


async def test_D9_a_query_over_more_than_the_cache_is_refused(
    store: Store, cache: FileCache
) -> None:
    with pytest.raises(ResultTooLarge, match=r"store\.cache_max_bytes"):
        await cache.lease([await store.file() for _ in range(4)])
    assert (store.reads, cache.counts.bytes_kept) == ([], 0)


async def test_one_download_serves_all_who_wait_for_it(store: Store, cache: FileCache) -> None:
    file = await store.file()
    store.open.clear()
    leases = [asyncio.create_task(cache.lease([file])) for _ in range(5)]
    await until_reading(store, 1)
    leases[0].cancel()  # whose download it was
    await asyncio.sleep(0)
    store.open.set()
    for lease in leases[1:]:
        (await lease).release()
    assert store.reads == [file.object_key]


async def test_D9_a_download_that_nobody_waits_for_stops(store: Store, cache: FileCache) -> None:
    file = await store.file()
    store.open.clear()
    leases = [asyncio.create_task(cache.lease([file])) for _ in range(2)]
    await until_reading(store, 1)
    for lease in leases:
        lease.cancel()
    await asyncio.gather(*leases, return_exceptions=True)
    async with asyncio.timeout(30):
        while store.running:
            await asyncio.sleep(0)
    assert (names(cache), cache.counts.bytes_kept, cache.counts.bytes_leased) == (set(), 0, 0)
    store.open.set()
    (await cache.lease([file])).release()  # and it can be brought anew
    assert there(cache, file)


async def test_some_files_are_brought_at_a_time(store: Store, tmp_path: Path) -> None:
    cache = FileCache.open(store, tmp_path / "few", bytes_max=10_000, fetches_at_once=3)
    store.open.clear()
    files = [await store.file() for _ in range(9)]
    lease = asyncio.create_task(cache.lease(files))
    await until_reading(store, 3)
    await asyncio.sleep(0.01)
    store.open.set()
    (await lease).release()
    assert store.running_max == 3
    await cache.close()


async def test_large_files_are_brought_in_parts(
    store: Store, cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PART_BYTES", 30)
    file = await store.file(100)
    (await cache.lease([file])).release()
    assert len(store.reads) == 4
    copied = await asyncio.to_thread(Path(cache.path(file)).read_bytes)
    assert copied == await store.get(file.object_key)
    empty = await store.file(0)
    (await cache.lease([empty])).release()
    assert Path(cache.path(empty)).stat().st_size == 0


# --- damage and outages ------------------------------------------------------------------------


async def test_bytes_that_differ_are_fetched_once_more(store: Store, cache: FileCache) -> None:
    file = await store.file()
    store.damage = 1
    (await cache.lease([file])).release()
    assert len(store.reads) == 2
    copied = await asyncio.to_thread(Path(cache.path(file)).read_bytes)
    assert copied == await store.get(file.object_key)


async def test_E6_an_object_that_is_not_what_was_recorded_is_never_read(
    store: Store, cache: FileCache
) -> None:
    file, sound = await store.file(), await store.file()
    store.damage = 2
    with pytest.raises(Corrupt) as raised:
        await cache.lease([file])
    assert raised.value.members["file_id"] == str(file.file_id)
    assert len(store.reads) == 2
    assert (names(cache), cache.counts.bytes_kept, cache.counts.bytes_leased) == (set(), 0, 0)
    (await cache.lease([sound])).release()
    missing = await store.file(missing=True)
    with pytest.raises(Corrupt):
        await cache.lease([sound, missing])
    assert cache.counts.bytes_leased == 0
    assert there(cache, sound)


async def test_an_outage_is_told_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    script = Script().on(Operation.GET_RANGE, StoreFault.THROTTLED)
    cache = FileCache.open(FaultyStore(store, script), tmp_path / "c", bytes_max=300)
    file = await store.file()
    with pytest.raises(Unavailable) as raised:
        await cache.lease([file])
    assert raised.value.retry_after_s is not None
    assert (names(cache), cache.counts.bytes_leased) == (set(), 0)
    (await cache.lease([file])).release()
    await cache.close()


async def test_a_download_of_several_ends_with_the_first_failure(
    store: Store, tmp_path: Path
) -> None:
    good, missing = await store.file(), await store.file(missing=True)
    with pytest.raises(Corrupt):
        await download_all(store, [(good, tmp_path / "good"), (missing, tmp_path / "missing")])
    assert not (tmp_path / "missing").exists()
    assert [p for p in tmp_path.iterdir() if p.name.endswith(downloads.PARTIAL_SUFFIX)] == []


# --- from one process to the next ---------------------------------------------------------------


async def test_F1_a_process_finds_the_copies_of_the_one_before(
    store: Store, tmp_path: Path
) -> None:
    file, other = await store.file(), await store.file()
    first = FileCache.open(store, tmp_path, bytes_max=300)
    (await first.lease([file, other])).release()
    await first.close()
    again = FileCache.open(store, tmp_path, bytes_max=300)
    assert again.folder == first.folder
    assert again.counts.bytes_kept == 200
    (await again.lease([file, other])).release()
    assert len(store.reads) == 2
    assert (again.counts.fetched, again.counts.bytes_kept) == (0, 200)
    await again.close()


async def test_F1_what_a_crash_left_behind_is_not_believed(store: Store, tmp_path: Path) -> None:
    whole, short, other, unlucky = [await store.file() for _ in range(4)]
    first = FileCache.open(store, tmp_path, bytes_max=500)
    (await first.lease([whole, short, other, unlucky])).release()
    await first.close()
    Path(first.path(short)).write_bytes(b"x" * 99)  # a wrong length
    Path(first.path(other)).write_bytes(b"x" * 100)  # the right length, as after a power cut
    (first.folder / ".0123.partial").write_bytes(b"x")
    (first.folder / "stranger").mkdir()
    Path(first.path(unlucky)).unlink()
    store.reads.clear()
    again = FileCache.open(store, tmp_path, bytes_max=500)
    assert names(again) == {Path(again.path(file)).name for file in (whole, other)}
    (await again.lease([whole, short, other, unlucky])).release()
    assert set(store.reads) == {f.object_key for f in (short, other, unlucky)}
    for file in (whole, short, other, unlucky):
        copied = await asyncio.to_thread(Path(again.path(file)).read_bytes)
        assert copied == await store.get(file.object_key)
    assert again.counts.bytes_kept == 400
    await again.close()


async def test_a_smaller_cache_keeps_the_newest_copies(store: Store, tmp_path: Path) -> None:
    files = [await store.file() for _ in range(3)]
    first = FileCache.open(store, tmp_path, bytes_max=300)
    for age, file in enumerate(files):
        (await first.lease([file])).release()
        os.utime(first.path(file), (1000 + age, 1000 + age))
    await first.close()
    again = FileCache.open(store, tmp_path, bytes_max=150)
    assert [there(again, file) for file in files] == [False, False, True]
    await again.close()


async def test_a_copy_under_examination_stays_when_its_reader_leaves(
    store: Store, tmp_path: Path
) -> None:
    file = await store.file()
    first = FileCache.open(store, tmp_path, bytes_max=300)
    (await first.lease([file])).release()
    await first.close()
    again = FileCache.open(store, tmp_path, bytes_max=300)
    leaving = asyncio.create_task(again.lease([file]))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    (await again.lease([file])).release()
    assert len(store.reads) == 1
    assert again.counts.bytes_leased == 0
    await again.close()


async def test_processes_of_one_machine_do_not_meet(store: Store, tmp_path: Path) -> None:
    one, two = (FileCache.open(store, tmp_path, bytes_max=300) for _ in range(2))
    assert one.folder != two.folder
    file = await store.file()
    (await one.lease([file])).release()
    assert not there(two, file)
    code = (
        "import sys; from pathlib import Path; from storage.files.cache import FileCache; "
        "from storage.files.objects import MemoryObjectStore; "
        "print(FileCache.open(MemoryObjectStore(), Path(sys.argv[1]), bytes_max=300).folder)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()) not in (one.folder, two.folder)
    await one.close()
    three = FileCache.open(store, tmp_path, bytes_max=300)
    assert three.folder == one.folder
    await two.close()
    await three.close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="pattern"):
        FileCache.open(MemoryObjectStore(), tmp_path / "a*", bytes_max=1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"store\.cache_dir"):
        FileCache.open(MemoryObjectStore(), tmp_path / "file", bytes_max=1)


# --- erased rows ----------------------------------------------------------------------------------


async def test_E7_copies_that_no_snapshot_needs_are_swept_away(
    store: Store, tmp_path: Path
) -> None:
    erased, kept, read, elsewhere = [await store.file() for _ in range(4)]
    gone: set[uuid.UUID] = set()
    cache = FileCache.open(store, tmp_path, bytes_max=400, needed=lambda f: f not in gone)
    ended = FileCache.open(store, tmp_path, bytes_max=400)
    living = FileCache.open(store, tmp_path, bytes_max=400)
    for other in (ended, living):
        (await other.lease([elsewhere, kept])).release()
    await ended.close()
    (await cache.lease([erased, kept])).release()
    lease = await cache.lease([read])

    gone |= {erased.file_id, read.file_id, elsewhere.file_id}
    cache.sweep()
    assert [there(cache, file) for file in (erased, kept, read)] == [False, True, True]
    assert [there(ended, file) for file in (elsewhere, kept)] == [False, True]
    assert there(living, elsewhere)  # its own process sweeps there
    lease.release()  # who had it open has read it to its end
    assert not there(cache, read)
    assert cache.counts.bytes_kept == 100
    (await cache.lease([erased])).release()  # by a plan that was made before
    assert not there(cache, erased)
    await cache.close()
    await living.close()
