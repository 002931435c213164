"""The validator (E6) on the bus, on the marker, and on the in-memory twin."""

from __future__ import annotations

from pathlib import Path

import pytest

from lakebus.errors import Unavailable
from lakebus.schemas import TableSchema
from storage.postgres.rewind_marker import PREFIX
from tests.integration.validation_fixtures import file, lake, table, template
from tests.integration.validation_rig import ValidatedLake, memory_lake

__all__ = ["file", "lake", "table", "template"]


# --- the bus -------------------------------------------------------------------------------


async def test_E6_finds_lost_bytes_of_waiting_entries(
    lake: ValidatedLake, table: TableSchema
) -> None:
    await lake.append(table)
    await lake.execute(
        "DELETE FROM bus_segment_0 WHERE segment_id IN (SELECT max(segment_id) FROM bus_log)"
    )
    found = await lake.findings()
    assert {code for code, _ in found} == {"payload_missing"}
    assert len(found) == 1


async def test_E6_finds_a_lost_payload_object(lake: ValidatedLake, table: TableSchema) -> None:
    await lake.append(table)
    await lake.execute(
        "UPDATE bus_log SET payload_key = 'bus/gone.segment',"
        " segment_id = -1 WHERE segment_id = (SELECT max(segment_id) FROM bus_log)"
    )
    assert {code for code, _ in await lake.findings()} == {"payload_missing"}


async def test_E6_finds_an_empty_quarantine(lake: ValidatedLake, table: TableSchema) -> None:
    await lake.execute(
        "INSERT INTO bus_quarantine (kind, history_serial, shard, position, principal_id, target,"
        " table_ids, rows, reason, attempts, by_crash, created_at)"
        " VALUES ('rejects', 1, 0, 0, 1, 't', '{1}', 1, 'bad', 1, false, now())"
    )
    assert {code for code, _ in await lake.findings()} == {"quarantine_payload_missing"}


async def test_E6_compares_the_marker(lake: ValidatedLake, table: TableSchema) -> None:
    assert lake.postgres is not None
    await lake.postgres.judge()
    await lake.execute("UPDATE lake SET publish_count = publish_count - 5")
    assert ("marker_ahead", "marker") in await lake.findings()
    await lake.execute("UPDATE lake SET publish_count = publish_count + 5")
    for key in [key async for key, _ in lake.store.list(PREFIX)]:
        await lake.store.delete(key)
    assert await lake.findings() == {("marker_behind", "marker")}


async def test_E6_a_look_whose_session_ends_is_tried_again_and_no_finding(
    lake: ValidatedLake, table: TableSchema
) -> None:
    assert lake.postgres is not None
    inspection = lake.postgres.inspection

    async def look() -> None:
        async with inspection.look() as view:
            await view.head()
            await lake.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND usename = current_user"
            )
            await view.head()

    with pytest.raises(Unavailable):
        await look()
    assert await lake.findings() == set()


# --- the in-memory twin --------------------------------------------------------------------


async def test_E6_the_twin_in_memory_is_asked_the_same(tmp_path: Path) -> None:
    lake = memory_lake(tmp_path)
    table = await lake.create()
    for _ in range(3):
        await lake.write(table)
    await lake.compact(table)
    file = await lake.write(table)
    await lake.append(table)
    assert await lake.findings() == set()
    await lake.store.delete(file.object_key)
    assert await lake.findings() == {("missing_object", f"file {file.file_id}")}
    assert lake.memory is not None
    state = lake.memory.state
    lost = state.published_ranges.pop(1)
    state.segments.clear()
    found = await lake.findings(objects=False)
    assert ("range_gap", f"shard {lost.shard}") in found
    assert {code for code, _ in found} == {"range_gap", "payload_missing"}
    lake.close()
