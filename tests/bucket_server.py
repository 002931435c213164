"""An S3 server for tests: one process a test session on the loopback, one prefix a test.

It is an emulator (ministack), which keeps objects in memory and obeys `If-None-Match`; what a test
proves on it holds for the protocol, not for any provider's service. `tests.given_store` puts
another store in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from lakebus.clock import SystemClock
from storage.files.cloud import CloudObjectStore
from storage.files.cloud_settings import CloudSettings, Place

BUCKET = "lake"
ACCESS_KEY, SECRET_KEY = "access-key-of-a-test", "secret-key-of-a-test"
_PLACE: Final = Place("s3", BUCKET)
_SETTINGS: Final = CloudSettings(
    region="us-east-1",
    allow_http=True,
    access_key_id=ACCESS_KEY,
    secret_access_key=SECRET_KEY,
)
_START_S = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Bucket:
    """A prefix of a server's bucket that nobody else uses. `port`: where it is reached on the
    loopback, which may be a proxy; 0: where the settings say."""

    port: int
    prefix: str
    place: Place = _PLACE
    settings: CloudSettings = _SETTINGS

    @property
    def url(self) -> str:
        below = "/".join(part for part in (self.place.prefix, self.prefix) if part)
        return str(replace(self.place, prefix=below))

    @property
    def endpoint(self) -> str:
        """Empty for the provider's own."""

        given = self.settings.endpoint or ""
        if not self.port:
            return given
        return f"http://127.0.0.1:{self.port}{urlsplit(given).path}"

    def behind(self, port: int) -> Bucket:
        return replace(self, port=port)

    def store(self, *, attempts: int = 4, request_timeout_s: float = 30.0) -> CloudObjectStore:
        settings = replace(
            self.settings,
            endpoint=self.endpoint or None,
            attempts=attempts,
            request_timeout_s=request_timeout_s,
        )
        return CloudObjectStore(Place.parse(self.url), settings, clock=_Hasty())


#: The bucket that takes the place of the emulator's, with an empty prefix.
GIVEN: Final[pytest.StashKey[Bucket]] = pytest.StashKey()


class _Hasty(SystemClock):
    """Pauses between attempts are tested by their number, not by waiting."""

    async def sleep_s(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))


@contextlib.contextmanager
def running_bucket_server(folder: Path) -> Iterator[int]:
    """The port of a server with the bucket in it."""

    port = _free_port()
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ministack"],
            env={
                **kept,
                "SERVICES": "s3",
                "GATEWAY_PORT": str(port),
                "BIND_HOST": "127.0.0.1",
                "HOME": str(folder),
                "TMPDIR": str(folder),
            },
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_us,
        )
    try:
        _make_bucket(port, process, folder / "log")
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running_bucket_server(tmp_path_factory.mktemp("bucket-server")) as port:
        yield port


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Bucket:
    given = request.config.stash.get(GIVEN, None)
    prefix = uuid.uuid4().hex
    if given is not None:
        return replace(given, prefix=prefix)
    return Bucket(request.getfixturevalue("bucket_server"), prefix)


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_bucket(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Also the sign that it answers."""

    request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    until_s = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError:  # not there yet
            time.sleep(0.05)
    raise RuntimeError(f"the S3 server does not answer: {log.read_text(errors='replace')[-2000:]}")
