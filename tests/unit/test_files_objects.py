"""Object stores: what every store promises, and what only the local one can."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lakebus.errors import ConfigurationError, Corrupt, Unavailable
from storage.files import objects
from storage.files.objects import (
    LocalObjectStore,
    MemoryObjectStore,
    ObjectExists,
    ObjectStore,
    check_key,
)
from tests.bucket_server import Bucket


@pytest.fixture(params=["local", "local_named", "memory", "cloud"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    """`local_named`: a file system that has no unnamed files. `cloud`: a bucket of an S3 server."""

    if request.param == "memory":
        yield MemoryObjectStore()
        return
    if request.param == "cloud":
        bucket: Bucket = request.getfixturevalue("bucket")
        yield bucket.store()
        return
    made = LocalObjectStore(tmp_path / "lake")
    if request.param == "local_named":
        made._unnamed_files = False
    yield made
    made.close()


async def listing(store: ObjectStore, prefix: str = "") -> list[tuple[str, int]]:
    return sorted([item async for item in store.list(prefix)])


async def test_C6_what_was_put_is_read_back(store: ObjectStore) -> None:
    await store.put_new("t/1/a.parquet", b"0123456789")
    assert await store.get("t/1/a.parquet") == b"0123456789"
    assert await store.get_range("t/1/a.parquet", 2, 3) == b"234"
    assert await store.size("t/1/a.parquet") == 10
    assert await store.size("t/1/b.parquet") is None
    await store.put_new("empty", b"")
    assert await store.get("empty") == b""


async def test_C6_large_objects_are_synced_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fdatasync = os.fdatasync

    def counted(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        fdatasync(file)

    monkeypatch.setattr(objects, "_STEP_BYTES", 1000)
    monkeypatch.setattr(os, "fdatasync", counted)
    store = LocalObjectStore(tmp_path)
    data = os.urandom(2500)
    await store.put_new("large", data)
    await store.put_new("small", data[:1000])
    assert sizes == [1000, 2000, 2500]
    assert await store.get("large") == data
    store.close()


async def test_C6_a_name_is_never_used_twice(store: ObjectStore) -> None:
    await store.put_new("a/b", b"first")
    with pytest.raises(ObjectExists):
        await store.put_new("a/b", b"second")
    assert await store.get("a/b") == b"first"
    assert await listing(store) == [("a/b", 5)]


async def test_C6_of_concurrent_puts_of_one_name_one_wins(store: ObjectStore) -> None:
    results = await asyncio.gather(
        *(store.put_new("race", bytes([n]) * 1000) for n in range(16)), return_exceptions=True
    )
    assert sorted(type(r).__name__ for r in results) == ["NoneType"] + ["ObjectExists"] * 15
    winner = next(n for n, result in enumerate(results) if result is None)
    assert await store.get("race") == bytes([winner]) * 1000


async def test_delete_may_be_repeated(store: ObjectStore) -> None:
    await store.put_new("a/b", b"x")
    await store.delete("a/b")
    await store.delete("a/b")
    await store.delete("never/was/there")
    assert await store.size("a/b") is None
    assert await listing(store) == []


async def test_listing_goes_by_prefix_of_the_key(store: ObjectStore) -> None:
    for key in ("t/1/a", "t/1/b", "t/12/c", "u/d"):
        await store.put_new(key, b"xy")
    assert await listing(store, "t/1") == [("t/1/a", 2), ("t/1/b", 2), ("t/12/c", 2)]
    assert await listing(store, "t/1/") == [("t/1/a", 2), ("t/1/b", 2)]
    assert await listing(store, "nothing/here") == []
    assert len(await listing(store)) == 4


async def test_listing_is_not_cut(store: ObjectStore) -> None:
    if isinstance(store, LocalObjectStore):
        for n in range(2100):  # without a sync each: only the listing is looked at
            (store.root).mkdir(exist_ok=True)
            (store.root / f"k{n}").write_bytes(b"")
    else:
        for start in range(0, 2100, 20):
            await asyncio.gather(*(store.put_new(f"k{start + n}", b"") for n in range(20)))
    assert len(await listing(store)) == 2100


async def test_missing_and_short_objects_are_damage(store: ObjectStore) -> None:
    await store.put_new("a", b"123")
    with pytest.raises(Corrupt):
        await store.get("b")
    with pytest.raises(Corrupt):
        await store.get("a/b")
    with pytest.raises(Corrupt):
        await store.get_range("a", 2, 2)
    assert await store.get_range("a", 3, 0) == b""


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        ".",
        "a/.hidden",
        "a b",
        "a\0b",
        "a*",
        "é",
        "x" * 999,
    ],
)
async def test_keys_outside_the_store_are_refused(store: ObjectStore, key: str) -> None:
    for call in (store.put_new(key, b""), store.get(key), store.size(key), store.delete(key)):
        with pytest.raises(ValueError, match="not an object key"):
            await call


def test_ordinary_keys_are_accepted() -> None:
    key = "data/1/018f-aa=b/x_y-z.parquet"
    assert check_key(key) == key


async def test_only_the_local_store_has_paths(tmp_path: Path) -> None:
    local = LocalObjectStore(tmp_path)
    await local.put_new("a/b", b"x")
    path = local.local_path("a/b")
    assert path is not None
    assert path.read_bytes() == b"x"
    assert MemoryObjectStore().local_path("a/b") is None
    local.close()


def test_a_root_that_queries_would_read_as_a_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        LocalObjectStore(tmp_path / "a*b")


async def test_C6_file_and_directories_are_synced_before_the_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def watch(name: str, real: Callable[..., object]) -> None:
        def call(*arguments: object, **keywords: object) -> object:
            result = real(*arguments, **keywords)
            what = ""
            if name == "fsync":
                what = os.readlink(f"/proc/self/fd/{arguments[0]}").removeprefix(str(tmp_path))
                what = "file" if "(deleted)" in what or "#" in what else what
            events.append(f"{name} {what}".strip())
            return result

        monkeypatch.setattr(os, name, call)

    watch("fsync", os.fsync)
    watch("link", os.link)
    store = LocalObjectStore(tmp_path / "lake")
    await store.put_new("a/b/one", b"x")
    assert events == [
        "fsync /lake/a/b", "fsync /lake/a", "fsync /lake", "fsync", "fsync file", "link",
        "fsync /lake/a/b",
    ]  # fmt: skip
    events.clear()
    await store.put_new("a/b/two", b"x")
    assert events == ["fsync file", "link", "fsync /lake/a/b"]
    store.close()


async def test_C6_a_temporary_name_is_synced_before_it_becomes_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalObjectStore(tmp_path)
    store._unnamed_files = False
    await store.put_new("warm", b"x")
    synced: list[tuple[str, bool]] = []

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        what = "file" if name.endswith(".tmp") else "folder"
        synced.append((what, "one" in os.listdir(tmp_path)))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    await store.put_new("one", b"x")
    assert synced == [("file", False), ("folder", True)]
    with pytest.raises(ObjectExists):
        await store.put_new("one", b"y")
    assert await store.get("one") == b"x"
    assert sorted(os.listdir(tmp_path)) == ["one", "warm"]
    store.close()


@pytest.mark.parametrize("unnamed", [True, False])
@pytest.mark.parametrize("call", ["write", "fsync", "link"])
async def test_C6_a_put_that_fails_leaves_no_object_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool, call: str
) -> None:
    store = LocalObjectStore(tmp_path)
    store._unnamed_files = unnamed
    await store.put_new("warm", b"x")  # the directories are synced from here on

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(Unavailable, match="full"):
            await store.put_new("cold", b"x")
    assert os.listdir(tmp_path) == ["warm"]
    await store.put_new("cold", b"y")
    assert await store.get("cold") == b"y"
    store.close()


async def test_a_file_system_without_unnamed_files_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(objects, "_put_unnamed", unsupported)
    store = LocalObjectStore(tmp_path)
    await store.put_new("a", b"x")
    assert await store.get("a") == b"x"
    assert os.listdir(tmp_path) == ["a"]
    store.close()


async def test_other_failures_of_the_disk_are_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EIO, "disk")

    store = LocalObjectStore(tmp_path)
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(Unavailable, match="Input/output"):
        await store.size("a")
    store.close()


async def test_what_a_crash_left_is_hidden_and_removed_when_old(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    await store.put_new("t/a", b"x")
    for name, age_s in ((".old.tmp", 100_000), (".new.tmp", 10), (".other", 100_000)):
        path = tmp_path / "t" / name
        path.write_bytes(b"rest")
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
    assert await listing(store) == [("t/a", 1)]
    assert await store.remove_abandoned(older_than_s=86_400) == 1
    assert sorted(os.listdir(tmp_path / "t")) == [".new.tmp", ".other", "a"]
    store.close()


async def test_the_event_loop_runs_while_the_disk_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    syncing, released = asyncio.Event(), asyncio.Event()
    real = os.fsync

    def slow(file: int) -> None:
        loop.call_soon_threadsafe(syncing.set)
        asyncio.run_coroutine_threadsafe(released.wait(), loop).result(timeout=10)
        real(file)

    monkeypatch.setattr(os, "fsync", slow)
    store = LocalObjectStore(tmp_path)
    put = asyncio.create_task(store.put_new("a", b"x"))
    await asyncio.wait_for(syncing.wait(), timeout=10)
    assert not put.done()
    released.set()
    await put
    store.close()
