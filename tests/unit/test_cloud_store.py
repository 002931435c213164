"""A store by URL: what it promises while the network and the service fail, and what it refuses.

The promises of every store are in `test_files_objects.py`, where this one is a parameter.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import GenericError

from cluster import components, doctor, replica_components
from lakebus.errors import ConfigurationError, Corrupt, Unavailable
from lakebus.settings import Settings
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.cloud import CloudObjectStore, StoreRefuses, check_conditions
from storage.files.cloud_settings import CloudSettings, Place
from storage.files.objects import MemoryObjectStore, ObjectExists
from tests.bucket_server import ACCESS_KEY, BUCKET, SECRET_KEY, Bucket
from tests.faults.buckets import BucketFault, BucketProxy

PUT, GET, HEAD, DELETE = "PUT", "GET", "HEAD", "DELETE"
KEY = "tables/1/a.parquet"


@pytest.fixture
async def proxy(bucket: Bucket) -> AsyncIterator[BucketProxy]:
    async with BucketProxy(bucket.port) as made:
        yield made


@pytest.fixture
def store(bucket: Bucket, proxy: BucketProxy) -> CloudObjectStore:
    return bucket.behind(proxy.port).store()


# --- puts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [BucketFault.ERROR, BucketFault.THROTTLED, BucketFault.RESET])
async def test_C6_a_put_that_failed_is_repeated(
    store: CloudObjectStore, proxy: BucketProxy, fault: BucketFault
) -> None:
    proxy.on(PUT, fault, fault)
    await store.put_new(KEY, b"rows")
    assert await store.get(KEY) == b"rows"
    assert proxy.count(PUT) == 3


async def test_C6_a_put_whose_answer_was_lost_is_known_for_ours(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    proxy.on(PUT, BucketFault.LOST_ANSWER)
    await store.put_new(KEY, b"rows")
    assert await store.get(KEY) == b"rows"


async def test_C6_a_put_in_doubt_that_meets_another_object_changes_nothing(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    await store.put_new(KEY, b"first")
    proxy.on(PUT, BucketFault.RESET)
    with pytest.raises(ObjectExists):
        await store.put_new(KEY, b"other")
    assert await store.get(KEY) == b"first"


async def test_C6_a_request_that_arrives_late_overwrites_nothing(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    proxy.on(PUT, BucketFault.LATE_EFFECT)
    await store.put_new(KEY, b"rows")
    await proxy.settle()
    assert await store.get(KEY) == b"rows"


async def test_C6_an_outcome_that_stays_open_is_unavailable(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    proxy.on(PUT, BucketFault.LOST_ANSWER, *[BucketFault.RESET] * 3)
    with pytest.raises(Unavailable):
        await store.put_new(KEY, b"rows")
    assert await store.get(KEY) == b"rows"  # it may be there, and here it is


async def test_a_store_that_asks_for_less_is_told_on_with_a_time(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    proxy.always = BucketFault.THROTTLED
    for call in (store.put_new(KEY, b""), store.get(KEY), store.size(KEY), store.delete(KEY)):
        with pytest.raises(Unavailable) as raised:
            await call
        assert raised.value.retry_after_s is not None
        assert raised.value.retry_after_s > 0
    assert len(proxy.requests) == 16  # four attempts each


# --- reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [BucketFault.ERROR, BucketFault.RESET, BucketFault.CUT, BucketFault.SLOW]
)
async def test_a_read_that_failed_is_repeated(
    store: CloudObjectStore, proxy: BucketProxy, fault: BucketFault
) -> None:
    await store.put_new(KEY, b"0123456789")
    proxy.on(GET, fault)
    assert await store.get(KEY) == b"0123456789"
    proxy.on(GET, fault)
    assert await store.get_range(KEY, 3, 4) == b"3456"
    if fault is not BucketFault.CUT:
        proxy.on(HEAD, fault)
        assert await store.size(KEY) == 10
        proxy.on(GET, fault)
        assert [item async for item in store.list("tables/")] == [(KEY, 10)]
        proxy.on(DELETE, fault)
        await store.delete(KEY)
        assert await store.size(KEY) is None


async def test_an_outage_is_no_missing_object(store: CloudObjectStore, proxy: BucketProxy) -> None:
    await store.put_new(KEY, b"rows")
    proxy.always = BucketFault.ERROR
    for call in (store.get(KEY), store.get_range(KEY, 0, 1), store.size(KEY)):
        with pytest.raises(Unavailable):
            await call
    with pytest.raises(Unavailable):
        _ = [item async for item in store.list()]


async def test_ranges_beyond_the_end_are_damage(store: CloudObjectStore) -> None:
    await store.put_new(KEY, b"0123")
    for start, length in ((2, 3), (4, 1), (9, 9), (5, 0)):
        with pytest.raises(Corrupt):
            await store.get_range(KEY, start, length)
    with pytest.raises(Corrupt):
        await store.get_range("none", 0, 0)


async def test_an_end_that_the_library_sees_itself_is_damage_too(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def short(*_: Any, **__: Any) -> bytes:  # what it says of Azure's answer
        raise GenericError("Wanted range starting at 4, but object was only 4 bytes long")

    store = bucket.store()
    await store.put_new(KEY, b"0123")
    monkeypatch.setattr("storage.files.cloud.obstore.get_range_async", short)
    with pytest.raises(Corrupt, match="ends before byte 5"):
        await store.get_range(KEY, 4, 1)


async def test_a_bucket_that_is_not_there_is_no_missing_object(bucket: Bucket) -> None:
    elsewhere = CloudObjectStore(
        Place("s3", "nobody-made-this"),
        CloudSettings(
            endpoint=bucket.endpoint,
            allow_http=True,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
        ),
    )
    for call in (elsewhere.get(KEY), elsewhere.put_new(KEY, b"")):
        with pytest.raises(StoreRefuses):
            await call
    with pytest.raises(ConfigurationError, match=r"store\.url"):
        await check_conditions(elsewhere)


async def test_two_prefixes_of_a_bucket_do_not_meet(bucket: Bucket) -> None:
    one, other = bucket.store(), replace(bucket, prefix=f"{bucket.prefix}-2").store()
    await one.put_new("a/b", b"1")
    await other.put_new("a/b", b"22")
    assert [item async for item in one.list()] == [("a/b", 1)]
    assert [item async for item in other.list("a")] == [("a/b", 2)]


# --- the start -------------------------------------------------------------------------------


async def test_C6_a_store_that_refuses_to_overwrite_is_accepted(bucket: Bucket) -> None:
    store = bucket.store()
    await check_conditions(store)
    await check_conditions(MemoryObjectStore())
    assert [item async for item in store.list()] == []  # it leaves nothing behind


async def test_C6_a_store_that_ignores_the_condition_is_refused(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    proxy.always = BucketFault.UNCONDITIONAL
    with pytest.raises(ConfigurationError, match="overwrites"):
        await check_conditions(store)
    assert [item async for item in store.list()] == []


async def test_a_store_that_forbids_is_refused_and_one_that_is_down_is_waited_for(
    store: CloudObjectStore, proxy: BucketProxy
) -> None:
    proxy.always = BucketFault.FORBIDDEN
    with pytest.raises(ConfigurationError, match="credentials"):
        await check_conditions(store)
    proxy.always = BucketFault.ERROR
    with pytest.raises(Unavailable):
        await check_conditions(store)


# --- settings --------------------------------------------------------------------------------


def test_a_url_names_a_provider_a_bucket_and_a_prefix() -> None:
    assert Place.parse("s3://lake") == Place("s3", "lake")
    assert Place.parse("s3://lake/") == Place("s3", "lake")
    assert Place.parse("gs://lake/a/b/") == Place("gs", "lake", "a/b")
    assert str(Place.parse("az://lake/a")) == "az://lake/a"


@pytest.mark.parametrize(
    "url",
    [
        "lake", "http://lake", "s3://", "s3:///a", "s3://key:secret@lake/a", "s3://lake?region=x",
        "s3://lake/a//b", "s3://lake/../b", "s3://la ke", "s3://lake/" + "x" * 200, "s3://lake/a*",
    ],
)  # fmt: skip
def test_a_url_with_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"store\.url"):
        Place.parse(url)


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("s3://lake", {"endpoint": "http://127.0.0.1:1"}),
        ("s3://lake", {"endpoint": "127.0.0.1:1"}),
        ("s3://lake", {"access_key_id": "x"}),
        ("s3://lake", {"secret_access_key": "x"}),
        ("s3://lake", {"session_token": "x"}),
        ("gs://lake", {"access_key_id": "x", "secret_access_key": "y"}),
        ("gs://lake", {"credentials_file": Path("/nowhere/key.json")}),
        ("az://lake", {"access_key_id": "x", "secret_access_key": "y"}),
        ("s3://lake", {"attempts": 0}),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(url: str, given: Any) -> None:
    with pytest.raises(ConfigurationError):
        CloudObjectStore(Place.parse(url), CloudSettings(**given))


def test_clients_of_all_providers_can_be_made() -> None:
    key = "c2VjcmV0"
    for url, settings in (
        ("s3://lake/a", CloudSettings(region="eu-west-1", virtual_host_style=True)),
        ("gs://lake/a", CloudSettings()),
        ("az://lake/a", CloudSettings(account="account", secret_access_key=key)),
    ):
        made = CloudObjectStore(Place.parse(url), settings)
        assert made.local_path("a") is None


async def test_a_stack_opens_the_store_that_its_settings_name(
    bucket: Bucket, tmp_path: Path
) -> None:
    told = Settings.load(
        environ={
            "LAKEBUS_DATA_DIR": str(tmp_path),
            "LAKEBUS_STORE_URL": bucket.url,
            "LAKEBUS_STORE_ENDPOINT": bucket.endpoint,
            "LAKEBUS_STORE_ALLOW_HTTP": "true",
            "LAKEBUS_STORE_ACCESS_KEY_ID": ACCESS_KEY,
            "LAKEBUS_STORE_SECRET_ACCESS_KEY": SECRET_KEY,
        }
    )
    path = components.keep_settings(told)
    assert path.stat().st_mode & 0o077 == 0
    settings = components.read_settings(str(path))
    store = components.object_store(settings)
    await components.check_object_store(store)
    await store.put_new("a", b"x")
    assert await bucket.store().get("a") == b"x"
    assert components.object_store_words(settings) == f"{bucket.url} at {bucket.endpoint}"
    asked = await asyncio.to_thread(doctor._object_store, settings)  # it has a loop of its own
    assert asked.result == doctor.OK
    for shown in (repr(settings), str(settings.describe()), settings.model_dump_json()):
        assert SECRET_KEY not in shown
        assert ACCESS_KEY not in shown
    cache = replica_components.file_cache(settings, store, needed=lambda _: True)
    assert cache is not None
    assert cache.folder.parent == tmp_path / "cache"
    engine = replica_components.engine_settings(settings, cache)
    assert engine.allowed_directory == str(cache.folder)
    await cache.close()


def test_a_stack_without_a_url_keeps_files_in_its_folder(tmp_path: Path) -> None:
    settings = Settings.load(environ={"LAKEBUS_DATA_DIR": str(tmp_path)})
    store = components.object_store(settings)
    assert store.local_path("a") == tmp_path / "objects" / "a"
    assert replica_components.file_cache(settings, store, needed=lambda _: True) is None
    assert replica_components.engine_settings(settings).allowed_directory == str(
        tmp_path / "objects"
    )
    store.close()
    wrong = Settings.load(environ={"LAKEBUS_STORE_URL": "ftp://lake"})
    with pytest.raises(ConfigurationError, match=r"store\.url"):
        components.object_store(wrong)
    assert doctor._object_store(wrong).result == doctor.FAILURE


def test_secrets_are_in_no_repr() -> None:
    settings = CloudSettings(access_key_id="AKIA1", secret_access_key="hush", session_token="hush2")
    for secret in ("AKIA1", "hush"):
        assert secret not in repr(settings)


async def test_D10_errors_show_no_credentials_and_no_places(
    bucket: Bucket,
    store: CloudObjectStore,
    proxy: BucketProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy.always = BucketFault.FORBIDDEN
    with pytest.raises(Unavailable) as raised, caplog.at_level("WARNING"):
        await store.get(KEY)
    assert "AccessDenied" in caplog.text  # the operator is told what the store said
    for hidden in (SECRET_KEY, ACCESS_KEY, bucket.prefix, "127.0.0.1"):
        assert hidden not in str(raised.value)
    for hidden in (SECRET_KEY, ACCESS_KEY):
        assert hidden not in caplog.text
    assert proxy.count(GET) == 1  # it will not be allowed the second time


async def test_D10_credentials_do_not_reach_the_process_that_runs_sql(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "LAKEBUS_STORE_SECRET_ACCESS_KEY",
        "GOOGLE_SERVICE_ACCOUNT_KEY", "AZURE_STORAGE_ACCOUNT_KEY",
    ):  # fmt: skip
        monkeypatch.setenv(name, SECRET_KEY)
    store = bucket.store()
    await store.put_new("a", b"x")
    started: list[str] = []
    real = subprocess.Popen

    def popen(arguments: Any, *more: Any, **given: Any) -> Any:
        started.append(json.dumps([arguments, dict(given["env"])]))
        return real(arguments, *more, **given)

    monkeypatch.setattr("storage.engine.process.subprocess.Popen", popen)
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(tmp_path), temp_directory=str(tmp_path / "spill"), spare=False
        )
    )
    await engine.start()
    await engine.stop()
    assert len(started) == 1
    assert SECRET_KEY not in started[0]
    assert BUCKET not in json.loads(started[0])[1].values()


async def test_a_call_that_is_given_up_ends_its_request(bucket: Bucket, proxy: BucketProxy) -> None:
    proxy.slow_s, proxy.always = 5.0, BucketFault.SLOW
    store = bucket.behind(proxy.port).store()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await store.get(KEY)
    hurried = bucket.behind(proxy.port).store(attempts=1, request_timeout_s=0.3)
    with pytest.raises(Unavailable):
        await hurried.get(KEY)
