"""The validator (E6): every planted defect is found, by its name and by no other; a healthy lake
has none, whatever is written, swapped and collected meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from lakebus.clock import new_uuid
from lakebus.errors import MalformedRequest
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.maintenance.interface import SwapOutcome
from tests.integration.validation_fixtures import file, lake, table, template
from tests.integration.validation_rig import ValidatedLake

__all__ = ["file", "lake", "table", "template"]


async def _ranges(lake: ValidatedLake) -> list[tuple[int, int, int, int]]:
    assert lake.sql is not None
    rows = await lake.sql.fetch(
        "SELECT shard, lo, hi, snapshot_id FROM published_range ORDER BY snapshot_id"
    )
    return [tuple(row) for row in rows]


# --- healthy -------------------------------------------------------------------------------


async def test_E6_a_healthy_lake_has_no_findings(lake: ValidatedLake, table: TableSchema) -> None:
    await lake.append(table)
    report = await lake.validate(full=True)
    assert report["findings"] == []
    assert (report["errors"], report["warnings"], report["infos"]) == (0, 0, 0)
    assert report["files"] == report["objects"] == report["sample"]["files"] == 5
    assert report["sample"]["complete"]
    assert report["payloads"] == 1
    assert report["ranges"] == 4
    assert report["snapshots"] == 1 + 1 + 4 + 1
    assert lake.metrics.value("lakebus_validations_total") == 1


async def test_E6_no_false_alarm_beside_writers_swaps_and_collection(
    lake: ValidatedLake, table: TableSchema
) -> None:
    ended = asyncio.Event()
    deleted = 0

    async def write() -> None:
        for _ in range(12):
            await lake.write(table)
        ended.set()

    async def maintain() -> None:
        nonlocal deleted
        while not ended.is_set():
            assert await lake.compact(table) is SwapOutcome.PUBLISHED
            deleted += await lake.collect()

    async def look() -> int:
        runs = 0
        while not ended.is_set() or runs < 5:
            report = await lake.validate(full=True)
            assert report["findings"] == []
            runs += 1
        return runs

    await asyncio.gather(write(), maintain(), look(), look())
    assert deleted > 5
    assert (await lake.findings()) == set()


async def test_E6_an_expired_and_a_tagged_past_are_healthy(
    lake: ValidatedLake, table: TableSchema
) -> None:
    head = await lake.catalog.head()
    await lake.upkeep.create_tag("kept", head.snapshot_id - 2, created_by="test")
    await lake.compact(table)
    assert await lake.collect() > 0
    assert await lake.findings() == set()


async def test_E6_a_new_line_of_history_is_healthy(lake: ValidatedLake, table: TableSchema) -> None:
    await lake.append(table)
    await lake.execute(
        "SELECT begin_history('[]', 'test', $1, $2, 1000000, 1000)", new_uuid(), new_uuid()
    )
    assert await lake.findings(objects=False) == set()
    await lake.publish()
    assert await lake.findings(objects=False) == set()


async def test_E6_a_sample_turns_through_all_files(lake: ValidatedLake, table: TableSchema) -> None:
    first = await lake.validate(files=2)
    assert first["sample"]["files"] == 2
    assert first["sample"]["stopped_by"] == "files"
    again = await lake.validate(files=100)
    assert again["sample"]["files"] == 5
    assert again["sample"]["complete"]
    file = (await lake.upkeep.live_files(table.table_id))[-1]
    lake.damage(file, at=10)
    found, next_id = False, first["sample"]["next"]
    for _ in range(3):
        await lake.execute(
            "INSERT INTO job (job_id, kind, parameters, dry_run, requested_by, state, attempt,"
            " epoch, not_before, created_at, report) VALUES (gen_random_uuid(), 'validate', '{}',"
            " false, 'test', 'done', 1, 1, now(), clock_timestamp(),"
            " jsonb_build_object('sample', jsonb_build_object('next', $1::text)))",
            next_id,
        )
        report = await lake.validate(files=2)
        assert report["sample"]["files"] == 2
        next_id = report["sample"]["next"]
        found = found or "checksum_differs" in report["codes"]
    assert found, "three samples of two did not read all five files"


async def test_E6_budgets_end_a_sample(lake: ValidatedLake, table: TableSchema) -> None:
    by_bytes = (await lake.validate(full=True, bytes_max=1))["sample"]
    assert (by_bytes["files"], by_bytes["stopped_by"]) == (1, "bytes")
    by_time = (await lake.validate(full=True, seconds_max=0))["sample"]
    assert (by_time["files"], by_time["stopped_by"]) == (0, "seconds")


@pytest.mark.parametrize("bad", [{"ful": True}, {"full": 1}, {"files": -1}, {"files": True}])
async def test_parameters_are_checked(lake: ValidatedLake, bad: dict[str, Any]) -> None:
    with pytest.raises(MalformedRequest):
        await lake.validate(**bad)


# --- objects -------------------------------------------------------------------------------


async def test_E6_finds_a_missing_file(lake: ValidatedLake, file: DataFile) -> None:
    lake.path(file).unlink()
    assert await lake.findings() == {("missing_object", f"file {file.file_id}")}


async def test_E6_finds_a_flipped_byte_of_data(lake: ValidatedLake, file: DataFile) -> None:
    lake.damage(file, at=10)
    assert await lake.findings() == {("checksum_differs", f"file {file.file_id}")}


async def test_E6_finds_a_flipped_byte_of_the_footer(lake: ValidatedLake, file: DataFile) -> None:
    lake.damage(file, at=-5)  # the length of the footer
    subject = f"file {file.file_id}"
    assert await lake.findings() == {("checksum_differs", subject), ("unreadable_footer", subject)}


async def test_E6_finds_a_truncated_object(lake: ValidatedLake, file: DataFile) -> None:
    lake.replace(file, lake.path(file).read_bytes()[:-7])
    assert await lake.findings() == {("size_differs", f"file {file.file_id}")}


async def test_E6_finds_swapped_objects(lake: ValidatedLake, table: TableSchema) -> None:
    one, two = await lake.write(table), await lake.write(table, rows=400)
    first, second = lake.path(one).read_bytes(), lake.path(two).read_bytes()
    lake.replace(one, second)
    lake.replace(two, first)
    assert await lake.findings() == {
        ("size_differs", f"file {one.file_id}"),
        ("size_differs", f"file {two.file_id}"),
    }


async def test_E6_finds_swapped_objects_of_one_size(
    lake: ValidatedLake, table: TableSchema
) -> None:
    by_size: dict[int, DataFile] = {}
    for _ in range(20):
        two = await lake.write(table)
        if two.size_bytes in by_size:
            break
        by_size[two.size_bytes] = two
    one = by_size[two.size_bytes]
    first, second = lake.path(one).read_bytes(), lake.path(two).read_bytes()
    assert first != second
    lake.replace(one, second)
    lake.replace(two, first)
    assert await lake.findings() == {
        ("checksum_differs", f"file {one.file_id}"),
        ("checksum_differs", f"file {two.file_id}"),
    }


async def test_E6_finds_a_stray_object(lake: ValidatedLake, table: TableSchema) -> None:
    key = f"tables/{table.table_id}/{new_uuid()}.parquet"
    await lake.store.put_new(key, b"nobody knows me")
    await lake.store.put_new("tables/readme.txt", b"nor me")
    report = await lake.validate(full=True)
    found = {(f["code"], f["severity"], f["subject"]) for f in report["findings"]}
    assert found == {
        ("stray_object", "info", f"object {key}"),
        ("stray_object", "info", "object tables/readme.txt"),
    }


async def test_E6_finds_an_object_that_was_deleted(lake: ValidatedLake, table: TableSchema) -> None:
    files = await lake.upkeep.live_files(table.table_id)
    data = lake.path(files[0]).read_bytes()
    await lake.compact(table)
    await lake.collect()
    await lake.store.put_new(files[0].object_key, data)
    report = await lake.validate(full=True)
    found = {(f["code"], f["severity"], f["subject"]) for f in report["findings"]}
    assert found == {("stray_object", "warning", f"object {files[0].object_key}")}


# --- contents ------------------------------------------------------------------------------


async def test_E6_finds_a_wrong_count(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute("UPDATE data_file SET rows = rows + 1 WHERE file_id = $1", file.file_id)
    assert await lake.findings() == {
        ("footer_rows_differ", f"file {file.file_id}"),
        ("count_differs", f"snapshot {file.first_snapshot}"),
    }


async def test_E6_finds_a_lost_file(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute("DELETE FROM data_file WHERE file_id = $1", file.file_id)
    assert await lake.findings() == {
        ("count_differs", f"snapshot {file.first_snapshot}"),
        ("stray_object", f"object {file.object_key}"),
    }


async def test_E6_finds_rows_that_the_bus_did_not_accept(
    lake: ValidatedLake, file: DataFile
) -> None:
    await lake.execute(
        "UPDATE bus_log SET row_counts[1] = row_counts[1] + 5"
        " WHERE hi = (SELECT max(hi) FROM bus_log)"
    )
    assert await lake.findings() == {("count_differs", f"snapshot {file.first_snapshot}")}


@pytest.mark.parametrize(
    "claim",
    [
        '{"1":[0,"1000000","2000000"]}',
        '{"1":[1]}',
        '{"2":[0,"note 0","note 0000"]}',
        '{"1":[0,"0","1"]}',
        '{"9":[0]}',
    ],
)
async def test_E6_finds_false_statistics(lake: ValidatedLake, file: DataFile, claim: str) -> None:
    await lake.execute(
        "UPDATE data_file SET statistics = $2 WHERE file_id = $1", file.file_id, claim
    )
    assert await lake.findings() == {("statistics_false", f"file {file.file_id}")}


async def test_E6_weaker_statistics_are_true(lake: ValidatedLake, file: DataFile) -> None:
    for claim in ("{}", '{"1":[0,"-5","1000000"]}', '{"2":[0]}', '{"2":[0,"n",null]}'):
        await lake.execute(
            "UPDATE data_file SET statistics = $2 WHERE file_id = $1", file.file_id, claim
        )
        assert await lake.findings() == set()


async def test_E6_finds_another_schema(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute(
        "UPDATE table_schema"
        " SET definition = jsonb_set(definition, '{columns,0,type}', '\"double\"')"
        " WHERE table_id = $1",
        file.table_id,
    )
    found = await lake.findings()
    assert {code for code, _ in found} == {"schema_differs"}
    assert ("schema_differs", f"file {file.file_id}") in found


async def test_E6_finds_rows_of_positions_that_were_not_published(
    lake: ValidatedLake, table: TableSchema
) -> None:
    """Rows whose positions were published only after their file."""

    early = (await lake.upkeep.live_files(table.table_id))[0]
    late = await lake.write(table)
    rows = await lake.rows_of(late)
    forged = await lake.put_file(table, rows)
    await lake.execute(
        "UPDATE data_file SET sha256 = $2, size_bytes = $3, object_key = $4, rows = $5,"
        " statistics = '{}' WHERE file_id = $1",
        early.file_id,
        forged.sha256,
        forged.size_bytes,
        forged.object_key,
        forged.rows,
    )
    found = await lake.findings()
    assert ("places_differ", f"file {early.file_id}") in found
    codes = {code for code, _ in found}
    assert codes == {"places_differ", "published_twice", "count_differs", "stray_object"}


async def test_E6_finds_rows_that_are_published_twice(
    lake: ValidatedLake, table: TableSchema
) -> None:
    file = await lake.write(table)
    rows = await lake.rows_of(file)
    doubled = await lake.put_file(table, pa.concat_tables([rows, rows]))
    await lake.execute(
        "UPDATE data_file SET sha256 = $2, size_bytes = $3, object_key = $4, rows = $5"
        " WHERE file_id = $1",
        file.file_id,
        doubled.sha256,
        doubled.size_bytes,
        doubled.object_key,
        doubled.rows,
    )
    found = await lake.findings()
    assert {code for code, _ in found} == {"published_twice", "count_differs", "stray_object"}
    assert ("published_twice", f"file {file.file_id}") in found


async def test_E6_finds_an_object_that_two_files_name(
    lake: ValidatedLake, table: TableSchema, file: DataFile
) -> None:
    twin = new_uuid()
    await lake.execute(
        "INSERT INTO data_file SELECT $2, table_id, schema_version, first_snapshot, last_snapshot,"
        " object_key, rows, size_bytes, sha256, statistics FROM data_file WHERE file_id = $1",
        file.file_id,
        twin,
    )
    found = await lake.findings()
    assert {code for code, _ in found} == {"published_twice", "count_differs"}
    assert ("published_twice", f"file {max(file.file_id, twin)}") in found


# --- the catalog ---------------------------------------------------------------------------


async def test_E6_finds_a_duplicate_range(lake: ValidatedLake, file: DataFile) -> None:
    shard, lo, hi, snapshot_id = (await _ranges(lake))[-1]
    assert hi - lo > 1
    await lake.execute(
        "INSERT INTO published_range SELECT shard, lo + 1, hi, snapshot_id, gen_random_uuid(),"
        " owner, published_at FROM published_range WHERE shard = $1 AND lo = $2",
        shard,
        lo,
    )
    assert await lake.findings() == {
        ("range_overlap", f"shard {shard}"),
        # The bus accepted those rows once, and they were made terminal twice.
        ("count_differs", f"snapshot {snapshot_id}"),
    }


async def test_E6_finds_a_range_gap(lake: ValidatedLake, table: TableSchema) -> None:
    """Together with the file whose positions are not published any more."""

    await lake.write(table)
    shard, lo, _, snapshot_id = (await _ranges(lake))[-2]
    await lake.execute("DELETE FROM published_range WHERE shard = $1 AND lo = $2", shard, lo)
    orphan = next(
        f for f in await lake.upkeep.live_files(table.table_id) if f.first_snapshot == snapshot_id
    )
    assert await lake.findings() == {
        ("range_gap", f"shard {shard}"),
        ("places_differ", f"file {orphan.file_id}"),
    }


async def test_E6_finds_a_watermark_that_is_ahead(lake: ValidatedLake, table: TableSchema) -> None:
    shard = (await _ranges(lake))[-1][0]
    await lake.execute("UPDATE lake SET watermark[$1] = watermark[$1] + 1", shard + 1)
    assert await lake.findings() == {("watermark_wrong", f"shard {shard}")}


async def test_E6_finds_a_watermark_that_went_back(lake: ValidatedLake, table: TableSchema) -> None:
    shard, lo, _, snapshot_id = (await _ranges(lake))[-1]
    await lake.execute(
        "UPDATE snapshot SET watermark[$1] = $2 WHERE snapshot_id = $3", shard + 1, lo, snapshot_id
    )
    assert await lake.findings() == {("watermark_wrong", f"shard {shard}")}


async def test_E6_finds_times_that_do_not_increase(lake: ValidatedLake, file: DataFile) -> None:
    number = file.first_snapshot - 1
    await lake.execute(
        "UPDATE snapshot SET published_at = published_at + interval '1 hour'"
        " WHERE snapshot_id = $1",
        number,
    )
    assert await lake.findings() == {("snapshot_times", f"snapshot {number + 1}")}


async def test_E6_finds_a_broken_line(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute(
        "UPDATE snapshot SET parent_id = 1 WHERE snapshot_id = $1", file.first_snapshot
    )
    assert await lake.findings() == {("snapshot_line", f"snapshot {file.first_snapshot}")}
    await lake.execute("UPDATE lake SET published_at = published_at + interval '1 second'")
    assert ("snapshot_line", "head") in await lake.findings()


async def test_E6_finds_a_dangling_reference(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute(
        "INSERT INTO condemned_file (file_id, object_key, reason, state, condemned_at)"
        " VALUES ($1, $2, 'unreferenced', 'deleting', now())",
        file.file_id,
        file.object_key,
    )
    assert await lake.findings() == {("dangling_reference", f"file {file.file_id}")}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE lake_table SET state = 'dropped', last_snapshot = 2 WHERE table_id = $1",
        "DELETE FROM lake_table WHERE table_id = $1",
    ],
)
async def test_E6_finds_files_of_a_table_that_is_gone(
    lake: ValidatedLake, file: DataFile, statement: str
) -> None:
    await lake.execute(statement, file.table_id)
    found = await lake.findings(objects=False)
    assert {code for code, _ in found} == {"dangling_reference"}
    assert ("dangling_reference", f"file {file.file_id}") in found


async def test_E6_finds_a_leftover_intent(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute(
        "INSERT INTO write_intent (file_id, kind, owner, expires_at, table_id)"
        " VALUES ($1, 'data', $1, now(), $2)",
        file.file_id,
        file.table_id,
    )
    assert await lake.findings() == {("leftover_intent", f"file {file.file_id}")}


async def test_E6_finds_a_tag_without_a_snapshot(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute("INSERT INTO tag VALUES ('lost', 4711, now(), 'test')")
    assert await lake.findings() == {("tag_without_snapshot", "tag lost")}


async def test_E6_tells_of_an_expired_pin(lake: ValidatedLake, file: DataFile) -> None:
    pin_id = new_uuid()
    await lake.upkeep.pin(pin_id, kind="reader", floor=None, snapshot_ids=(), ttl_s=60.0)
    assert await lake.findings() == set()
    await lake.execute("UPDATE pin SET expires_at = now() - interval '1 hour'")
    report = await lake.validate()
    assert (report["errors"], report["infos"]) == (0, 1)
    assert report["findings"][0]["subject"] == f"pin {pin_id}"
