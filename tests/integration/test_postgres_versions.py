"""Other versions of PostgreSQL than the embedded one, where the machine has them."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from cluster import doctor
from cluster.embedded_postgres import EmbeddedPostgres
from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.errors import StartRefused
from lakebus.schemas import Column
from lakebus.settings import Settings
from storage.bus.interface import Accepted
from storage.bus.settings import BusSettings
from storage.postgres import PostgresLake
from storage.postgres.server import TRANSACTION_TIMEOUT_SINCE, judge_server, look_at_server
from tests.conformance.harness import entry_of
from tests.postgres_server import new_data_dir, programs_wanted, run_elsewhere

_INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
_FACTS = {
    "fsync": "on",
    "full_page_writes": "on",
    "server_version_num": "180006",
    "server_version": "18.6",
}


@pytest.fixture(
    scope="module",
    params=[programs_wanted(), *(path.parent for path in _INSTALLED)],
    ids=lambda place: "usual" if place is None else place.parent.name,
)
def server_dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    """The usual server, and each other version that is installed."""
    folder = new_data_dir()
    server = EmbeddedPostgres(folder, sync_init=False, bin_dir=request.param)
    try:
        run_elsewhere(server.start)
        yield server.dsn
    finally:
        run_elsewhere(server.stop)
        shutil.rmtree(folder, ignore_errors=True)


async def major_of(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(connection.get_server_version().major)
    finally:
        await connection.close()


async def test_a_lake_works_on_this_version_and_the_start_says_what_is_not_promised(
    server_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    await upgrade(server_dsn)
    with caplog.at_level(logging.WARNING, "storage.postgres.pool"):
        lake = await PostgresLake.open(server_dsn, bus_settings=BusSettings())
    try:
        warned = "cannot end the transaction of a client that is paused" in caplog.text
        assert warned == (await major_of(server_dsn) < TRANSACTION_TIMEOUT_SINCE)
        made = await lake.catalog.create_table(name="t", columns=(Column(0, "id", "bigint"),))
        assert isinstance(await lake.bus.append(entry_of(made.schema, [7])), Accepted)
        claim = await lake.bus.claim(new_uuid())
        assert claim is not None
        assert len(list(await lake.bus.read(claim))) == 1
    finally:
        await lake.close()


async def test_B11_the_doctor_warns_of_a_version_that_cannot_end_a_paused_client(
    server_dsn: str,
) -> None:
    gap = await major_of(server_dsn) < TRANSACTION_TIMEOUT_SINCE
    assert bool((await look_at_server(server_dsn)).gap) == gap
    settings = Settings.model_validate({"postgres": {"dsn": server_dsn}})
    finding = await asyncio.to_thread(doctor.external_postgres, settings)
    assert finding.result == (doctor.WARNING if gap else doctor.OK)
    assert str(await major_of(server_dsn)) in finding.detail


def test_the_doctor_says_that_an_external_server_cannot_be_reached() -> None:
    settings = Settings.model_validate({"postgres": {"dsn": "postgresql://127.0.0.1:1/none"}})
    finding = doctor.external_postgres(settings)
    assert (finding.result, finding.detail) == (
        doctor.FAILURE,
        "external, by DSN: cannot be reached",
    )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"fsync": "off"}, "fsync=on"),
        ({"full_page_writes": "off"}, "full_page_writes=on"),
        ({"server_version_num": "140012"}, "PostgreSQL 14 is too old"),
    ],
)
def test_A1_a_server_that_breaks_durability_or_is_too_old_is_refused(
    changed: dict[str, str], says: str
) -> None:
    with pytest.raises(StartRefused, match=says):
        judge_server(_FACTS | changed)


def test_B11_every_supported_version_is_judged_by_its_number() -> None:
    gaps = {n: judge_server(_FACTS | {"server_version_num": f"{n}0001"}).gap for n in range(15, 19)}
    assert [bool(gaps[n]) for n in range(15, 19)] == [True, True, False, False]
