"""`python -m tests.given_store`: the promises of a store by URL, on the one that the settings name.

For what no emulator in the requirements plays: Azure, Google, or a server of one's own that speaks
S3. The settings are those of `lakebus up` (`LAKEBUS_STORE_URL` and its kin, or a file). Every test
has a prefix of its own below the given one; all of them are removed at the end. A server on the
loopback is also tried behind the proxy that makes faults. Ends with 1 when a test failed.

It is also the plugin that puts the store where the tests look for one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from tests.bucket_server import Bucket

PROMISES: Final = ("tests/unit/test_files_objects.py", "cloud")
#: Of the tests of faults, those that ask for nothing that only S3 has.
FAULTS: Final = (
    "tests/unit/test_cloud_store.py",
    "a_put or that_arrives_late or stays_open or asks_for_less or read_that_failed or an_outage or "
    "ranges_beyond or two_prefixes or is_accepted or ignores_the_condition or given_up",
)
#: A signature covers the condition, so no proxy can take it out.
_SIGNED: Final = " and not ignores_the_condition"
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost"})
_REMOVED_AT_ONCE: Final = 50


def given_bucket() -> Bucket:
    """Raises ConfigurationError."""

    # Here and below: a plugin is loaded before what the tests instrument, which must not be.
    from cluster import components
    from lakebus.errors import ConfigurationError
    from lakebus.settings import Settings
    from storage.files.cloud import CloudObjectStore
    from tests.bucket_server import Bucket

    store = components.object_store(Settings.load(environ=os.environ))
    if not isinstance(store, CloudObjectStore):
        raise ConfigurationError("store.url names no bucket: set LAKEBUS_STORE_URL")
    endpoint = urlsplit(store._settings.endpoint or "")
    here = endpoint.scheme == "http" and endpoint.hostname in _LOOPBACK
    below = "/".join(one for one in (store._place.prefix, f"tried-{uuid.uuid4().hex}") if one)
    place = replace(store._place, prefix=below)
    return Bucket((endpoint.port or 80) if here else 0, "", place, store._settings)


async def remove_all(bucket: Bucket) -> int:
    """How many objects the tests had left."""

    store = bucket.store()
    keys = [key async for key, _ in store.list()]
    for first in range(0, len(keys), _REMOVED_AT_ONCE):
        await asyncio.gather(*map(store.delete, keys[first : first + _REMOVED_AT_ONCE]))
    return len(keys)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    from tests.bucket_server import GIVEN

    config.stash[GIVEN] = given_bucket()


def pytest_terminal_summary(config: pytest.Config) -> None:
    from tests.bucket_server import GIVEN

    print(f"{asyncio.run(remove_all(config.stash[GIVEN]))} objects removed")


def main(arguments: Sequence[str]) -> int:
    from lakebus.errors import LakebusError

    argparse.ArgumentParser(prog="python -m tests.given_store", description=__doc__).parse_args(
        arguments
    )
    try:
        bucket = given_bucket()
    except LakebusError as error:
        print(error.detail, file=sys.stderr)
        return 2
    asked = [PROMISES]
    if bucket.port:
        file, chosen = FAULTS
        asked.append((file, f"({chosen}){'' if bucket.place.provider == 'gs' else _SIGNED}"))
    options = ("-v", "-p", "no:cacheprovider", "-p", "tests.given_store")
    ended = [
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, "-k", chosen, file], check=False
        ).returncode
        for file, chosen in asked
    ]
    return 1 if any(ended) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
