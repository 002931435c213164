"""`lakebus repair` (E6): only named findings, only what was shown, nothing invented, on record."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lakebus.clock import new_uuid
from lakebus.errors import MalformedRequest
from lakebus.schemas import TableSchema
from lakebus.snapshots import DataFile
from storage.bus.interface import Accepted, BatchState, Claim, KeyTaken, NewEntry
from storage.catalog.interface import Commit, CommitOutcome
from storage.maintenance.findings import FINDINGS
from storage.maintenance.repair import FindingName, Plan, Repairer
from tests.conformance.harness import entry_of
from tests.integration.validation_fixtures import file, lake, table, template
from tests.integration.validation_rig import ValidatedLake

__all__ = ["file", "lake", "table", "template"]


async def repairer(lake: ValidatedLake, copies: Path | None = None) -> Repairer:
    assert lake.postgres is not None
    return Repairer(
        inspection=lake.inspection,
        repairs=lake.postgres.repairs,
        catalog=lake.catalog,
        upkeep=lake.upkeep,
        store=lake.store,
        temp_dir=lake.folder,
        by="operator",
        copies=copies,
    )


async def plan(lake: ValidatedLake, finding: str, copies: Path | None = None) -> Plan:
    return await (await repairer(lake, copies)).plan(FindingName.parse(finding))


async def repair(lake: ValidatedLake, finding: str, copies: Path | None = None) -> str:
    planned = await plan(lake, finding, copies)
    assert planned.changes, planned.reason
    assert planned.apply is not None
    return await planned.apply()


async def audit(lake: ValidatedLake) -> list[tuple[str, str, str]]:
    assert lake.sql is not None
    rows = await lake.sql.fetch("SELECT principal, action, subject FROM audit ORDER BY audit_id")
    return [tuple(row) for row in rows]


async def test_E6_a_leftover_intent_is_removed(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute(
        "INSERT INTO write_intent (file_id, kind, owner, expires_at)"
        " VALUES ($1, 'data', $1, now())",
        file.file_id,
    )
    finding = f"leftover_intent:{file.file_id}"
    first = await plan(lake, finding)
    second = await plan(lake, finding)
    assert first.changes == second.changes, "a plan changes nothing"
    assert await repair(lake, finding) == "the intent was removed"
    assert await lake.findings() == set()
    assert await audit(lake) == [("operator", "repair.leftover_intent", f"file {file.file_id}")]
    assert not (await plan(lake, finding)).changes
    assert second.apply is not None
    assert "nothing was changed" in await second.apply()


async def test_E6_the_intent_of_a_file_not_published_is_left_alone(
    lake: ValidatedLake, table: TableSchema
) -> None:
    (intent,) = await lake.upkeep.register_intents(table.table_id, 1, owner=new_uuid(), ttl_s=60.0)
    assert not (await plan(lake, f"leftover_intent:{intent}")).changes
    assert lake.postgres is not None
    assert not await lake.postgres.repairs.drop_intent(intent, by="operator")


async def test_E6_a_tag_without_a_snapshot_is_dropped(lake: ValidatedLake, file: DataFile) -> None:
    await lake.execute("INSERT INTO tag VALUES ('lost', 4711, now(), 'test')")
    await lake.upkeep.create_tag("good", file.first_snapshot, created_by="test")
    assert not (await plan(lake, "tag_without_snapshot:good")).changes
    assert await repair(lake, "tag_without_snapshot:tag lost") == "the tag was dropped"
    assert [tag.name for tag in await lake.upkeep.tags()] == ["good"]
    assert await audit(lake) == [("operator", "repair.tag_without_snapshot", "tag lost")]


async def test_E6_only_a_stray_object_that_was_deleted_is_deleted_again(
    lake: ValidatedLake, table: TableSchema
) -> None:
    gone = (await lake.upkeep.live_files(table.table_id))[0]
    data = await lake.store.get(gone.object_key)
    await lake.compact(table)
    await lake.collect()
    await lake.store.put_new(gone.object_key, data)
    strange = f"tables/{table.table_id}/{new_uuid()}.parquet"
    await lake.store.put_new(strange, b"who knows")
    live = (await lake.upkeep.live_files(table.table_id))[0]

    assert await repair(lake, f"stray_object:{gone.object_key}") == "the object was deleted"
    assert await audit(lake) == [("operator", "repair.stray_object", f"object {gone.object_key}")]
    for key in (strange, live.object_key):
        planned = await plan(lake, f"stray_object:{key}")
        assert not planned.changes
        assert planned.reason
    assert await lake.findings() == {("stray_object", f"object {strange}")}


async def test_E6_a_missing_object_is_put_back_from_an_identical_copy_only(
    lake: ValidatedLake, file: DataFile, tmp_path: Path
) -> None:
    finding = f"missing_object:{file.file_id}"
    copies = tmp_path / "copies"
    (copies / "deep").mkdir(parents=True)
    copy = copies / "deep" / lake.path(file).name
    data = lake.path(file).read_bytes()
    lake.path(file).unlink()

    assert "--from" in (await plan(lake, finding)).reason
    copy.write_bytes(data[:-1] + b"?")
    refused = await plan(lake, finding, copies)
    assert not refused.changes
    assert file.sha256 in refused.reason
    copy.write_bytes(data)
    assert await repair(lake, finding, copies) == "the object was put back"
    assert await lake.findings() == set()
    assert await audit(lake) == [("operator", "repair.missing_object", f"file {file.file_id}")]
    assert not (await plan(lake, finding, copies)).changes


async def test_E6_false_statistics_are_replaced_by_those_of_the_file(
    lake: ValidatedLake, table: TableSchema, file: DataFile
) -> None:
    await lake.execute(
        "UPDATE data_file SET statistics = $2 WHERE file_id = $1",
        file.file_id,
        '{"1":[0,"1000","2000"]}',
    )
    finding = f"statistics_false:{file.file_id}"
    done = await repair(lake, finding)
    assert done.startswith("the statistics were replaced; snapshot ")
    files = await lake.upkeep.live_files(table.table_id)
    assert file.file_id not in [one.file_id for one in files], "running replicas must learn it"
    assert files[-1].statistics == file.statistics
    assert (files[-1].rows, files[-1].sha256) == (file.rows, file.sha256)
    assert await lake.findings() == set()
    before = await lake.inspection.file(file.file_id)
    assert before is not None
    assert before.file.statistics == file.statistics, "the past is told right as well"
    assert await audit(lake) == [("operator", "repair.statistics_false", f"file {file.file_id}")]
    assert not (await plan(lake, finding)).changes


async def test_E6_a_damaged_file_cannot_tell_its_statistics(
    lake: ValidatedLake, file: DataFile
) -> None:
    lake.damage(file, at=10)
    planned = await plan(lake, f"statistics_false:{file.file_id}")
    assert not planned.changes
    assert "checksum_differs" in planned.reason


# --- bytes on the bus --------------------------------------------------------------------------

KEY = "bus/00000000-0000-4000-8000-000000000001.segment"


async def group(
    lake: ValidatedLake, table: TableSchema, *ids: int
) -> tuple[list[NewEntry], list[Accepted]]:
    """One group on one shard, an entry of one row for each id."""

    entries = [entry_of(table, [one], key=f"key {one}", ordering_key="one") for one in ids]
    found = await asyncio.gather(*(lake.bus.append(entry) for entry in entries))
    assert all(isinstance(one, Accepted) for one in found)
    return entries, [one for one in found if isinstance(one, Accepted)]


async def lose(lake: ValidatedLake, lost: Accepted) -> None:
    """The object of the group of this entry, as if it had had one that is gone."""

    assert lake.sql is not None
    segment_id = await lake.sql.fetchval(
        "UPDATE bus_log SET payload_key = $1 WHERE shard = $2 AND lo <= $3 AND hi > $3"
        " RETURNING segment_id",
        KEY,
        lost.shard,
        lost.position,
    )
    await lake.execute("DELETE FROM bus_segment_0 WHERE segment_id = $1", segment_id)


async def rows(lake: ValidatedLake, table: TableSchema) -> list[int]:
    files = await lake.upkeep.live_files(table.table_id)
    return sorted([one for file in files for one in (await lake.rows_of(file))["1"].to_pylist()])


async def claimed(lake: ValidatedLake) -> Claim:
    claim = await lake.bus.claim(lake.owner)
    assert claim is not None
    return claim


async def test_B9_entries_whose_bytes_are_lost_are_given_up_and_their_shard_goes_on(
    lake: ValidatedLake,
) -> None:
    table = await lake.create()
    await group(lake, table, 1, 2)
    entries, lost = await group(lake, table, 3, 4, 5)
    _, after = await group(lake, table, 6)
    await lose(lake, lost[0])
    shard, lo = lost[0].shard, min(one.position for one in lost)
    finding = f"payload_missing:{shard}-{lo}"

    assert "there is no object" in (await plan(lake, finding)).changes[0]
    assert "nobody has tried" in await repair(lake, finding)

    held = await claimed(lake)  # of all three groups
    assert (held.lease.lo, held.lease.hi) == (lo - 2, after[0].position + 1)
    assert (await repair(lake, finding)).startswith("3 rows of 3 requests")
    late = Commit(commit_id=new_uuid(), lease=held.lease, files=(), range_bytes=0, owner=lake.owner)
    published = await lake.catalog.publish(new_uuid(), [late])
    assert published.outcomes[late.commit_id] is CommitOutcome.LEASE_LOST
    await lake.publish()
    assert await rows(lake, table) == [1, 2, 6]
    status = (await lake.bus.shard_status())[shard]
    assert (status.watermark, status.backlog_bytes) == (status.end, 0)

    for entry, one in zip(entries, lost, strict=True):
        batch = await lake.bus.batch(one.receipt.batch_id)
        assert batch is not None
        assert batch.state is BatchState.QUARANTINED
        assert "lost" in str(batch.reason)
        again = await lake.bus.append(entry)
        assert isinstance(again, KeyTaken), "A3: a retry is no second entry"
        assert again.record.receipt == one.receipt
    items = await lake.bus.quarantine_items()
    assert [(one.rows, one.payload) for one in items] == [(1, b"")] * 3
    assert await lake.findings() == {
        ("quarantine_payload_missing", f"quarantine {item.quarantine_id}") for item in items
    }
    for item in items:
        await lake.bus.drop_quarantined(item.quarantine_id)
    assert await lake.findings() == set()
    assert await audit(lake) == [("operator", "repair.payload_missing", f"entries {shard}-{lo}")]
    assert not (await plan(lake, finding)).changes


async def test_B9_only_what_of_a_lost_group_has_no_end_is_given_up(lake: ValidatedLake) -> None:
    """Its halves are tried apart (B8), so one may be published before the bytes are lost."""

    table = await lake.create()
    _, lost = await group(lake, table, 1, 2)
    whole = await claimed(lake)
    await lake.bus.nack(whole.lease, error="as one", delay_s=0.0)
    await lake.publish_claim(await claimed(lake))
    await lose(lake, lost[0])
    finding = f"payload_missing:{whole.lease.shard}-{whole.lease.lo}"
    assert (await repair(lake, finding)).startswith("1 rows of 1 requests")
    (item,) = await lake.bus.quarantine_items()
    assert (item.position, item.attempts) == (whole.lease.hi - 1, 1)
    assert len(await rows(lake, table)) == 1
    await lake.bus.drop_quarantined(item.quarantine_id)
    assert await lake.findings() == set()


async def test_E6_a_lost_payload_is_put_back_from_a_whole_copy_only(
    lake: ValidatedLake, tmp_path: Path
) -> None:
    table = await lake.create()
    _, lost = await group(lake, table, 1)
    assert lake.sql is not None
    payload = await lake.sql.fetchval("SELECT payload FROM bus_segment")
    await lose(lake, lost[0])
    finding = f"payload_missing:{lost[0].shard}-{lost[0].position}"
    copies = tmp_path / "copies"
    copies.mkdir()
    copy = copies / KEY.rpartition("/")[2]
    copy.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    await lake.store.put_new(KEY, copy.read_bytes())

    refused = await plan(lake, finding, copies)
    assert not refused.changes
    assert "Without --from this gives their rows up" in refused.reason
    copy.write_bytes(payload)
    assert await repair(lake, finding, copies) == "the object was put back"
    assert await lake.findings() == set()
    await lake.publish()
    assert await rows(lake, table) == [1]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [kind.code for kind in FINDINGS if not kind.repairable])
async def test_E6_what_needs_lost_data_has_no_repair(lake: ValidatedLake, code: str) -> None:
    planned = await plan(lake, f"{code}:anything")
    assert not planned.changes
    assert planned.apply is None
    assert planned.reason.startswith(f"There is no repair of {code}.")


@pytest.mark.parametrize("text", ["", "missing_object", "no_such:1", "missing_object:"])
def test_a_finding_is_named_by_code_and_name(text: str) -> None:
    with pytest.raises(MalformedRequest):
        FindingName.parse(text)


async def test_a_file_is_named_by_its_id(lake: ValidatedLake) -> None:
    with pytest.raises(MalformedRequest):
        await plan(lake, "missing_object:what")
