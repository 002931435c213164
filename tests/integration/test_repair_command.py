"""`lakebus repair` at the prompt: it lists, shows, asks, and tells by its exit code."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner, Result

from cluster.cli import cli
from lakebus.snapshots import DataFile
from tests.integration.validation_fixtures import file, lake, table, template
from tests.integration.validation_rig import LAKE_SETTINGS, ValidatedLake

__all__ = ["file", "lake", "table", "template"]


@pytest.fixture
async def leftover(lake: ValidatedLake, file: DataFile) -> str:
    await lake.execute(
        "INSERT INTO write_intent (file_id, kind, owner, expires_at)"
        " VALUES ($1, 'data', $1, now())",
        file.file_id,
    )
    return f"leftover_intent:{file.file_id}"


async def command(lake: ValidatedLake, *arguments: str, answer: str = "") -> Result:
    """In a thread, because the command has an event loop of its own."""
    environ = {
        "LAKEBUS_POSTGRES_DSN": lake.dsn,
        "LAKEBUS_BUS_SHARDS": str(LAKE_SETTINGS.shards),
        "LAKEBUS_STORE_URL": f"file://{lake.folder / 'objects'}",
        "LAKEBUS_DATA_DIR": str(lake.folder),
    }
    runner = CliRunner(env=environ)
    return await asyncio.to_thread(
        runner.invoke, cli, ["repair", *arguments], input=answer, standalone_mode=False
    )


async def test_E6_it_shows_and_asks_before_it_changes_anything(
    lake: ValidatedLake, leftover: str
) -> None:
    refused = await command(lake, leftover, answer="n\n")
    assert refused.exception is None, refused.output
    assert "would remove the write intent" in refused.output
    assert refused.return_value == 1
    assert {code for code, _ in await lake.findings()} == {"leftover_intent"}

    shown = await command(lake, leftover, "--json")
    assert json.loads(shown.stdout)["plans"][0]["finding"] == leftover
    assert shown.return_value == 1
    assert {code for code, _ in await lake.findings()} == {"leftover_intent"}

    agreed = await command(lake, leftover, answer="y\n")
    assert "the intent was removed" in agreed.output
    assert agreed.return_value == 0
    assert await lake.findings() == set()


async def test_E6_without_a_name_it_lists_and_changes_nothing(
    lake: ValidatedLake, leftover: str
) -> None:
    empty = await command(lake)
    assert "found nothing" in empty.output
    report = await lake.validate(files=0)
    await lake.execute(
        "INSERT INTO job (job_id, kind, parameters, dry_run, requested_by, state, attempt, epoch,"
        " not_before, created_at, report) VALUES (gen_random_uuid(), 'validate', '{}', false,"
        " 'test', 'done', 1, 1, now(), now(), $1::jsonb)",
        json.dumps(report),
    )
    listed = await command(lake, "--yes")
    assert f"{leftover}  can be repaired" in listed.output
    assert listed.return_value == 0
    assert {code for code, _ in await lake.findings()} == {"leftover_intent"}


async def test_E6_with_yes_it_does_not_ask(lake: ValidatedLake, leftover: str) -> None:
    done = await command(lake, leftover, "range_gap:0", "--yes", "--json")
    told = json.loads(done.stdout)
    assert told["done"] == {leftover: "the intent was removed"}
    assert "There is no repair of range_gap" in told["plans"][1]["reason"]
    assert done.return_value == 1
