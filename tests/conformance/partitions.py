"""Partitioned tables: several files of one table in one commit, and definitions kept by version."""

from __future__ import annotations

import dataclasses
import json

from lakebus.schemas import Column, TableSchema
from storage.catalog.interface import Commit, CommitOutcome
from tests.conformance.harness import Capability, LakeHarness
from tests.conformance.worker import Worker, fake_file


async def cut_by_entry(lake: LakeHarness, table: TableSchema, worker: Worker) -> Commit:
    """A commit of a whole claim with one file, and one partition, for each entry."""

    commit = await worker.stage(await worker.claim())
    (whole,) = commit.files
    contents = sorted(lake.files.contents.pop(whole.file_id).items())
    further = await lake.upkeep.register_intents(
        table.table_id, len(contents) - 1, owner=worker.owner, ttl_s=3_600.0
    )
    files = []
    for file_id, (place, rows) in zip((whole.file_id, *further), contents, strict=True):
        lake.files.write(file_id, {place: rows})
        # A NUL can stand in a text, and in no column of PostgreSQL.
        texts = {"truncate(2, note)": f"\0é{place[1]}", "id": None}
        partition = json.dumps(texts, ensure_ascii=False)
        made = fake_file(file_id, table.table_id, table.version, rows)
        files.append(dataclasses.replace(made, partition=partition))
    return dataclasses.replace(commit, files=tuple(files))


async def test_A8_all_partitions_of_a_range_are_published_together(
    lake: LakeHarness, table: TableSchema
) -> None:
    accepted = await lake.accept_many(table, 3)
    before = (await lake.catalog.head()).snapshot_id
    worker = lake.worker()
    commit = await cut_by_entry(lake, table, worker)
    published = await worker.publish(commit)
    after = (await lake.catalog.head()).snapshot_id
    assert published.snapshot_id == after == before + 1
    delta = await lake.catalog.manifest_delta(after=before, until=after)
    assert {file.first_snapshot for file in delta.files} == {after}
    assert {f.file_id: f.partition for f in delta.files} == {
        f.file_id: f.partition for f in commit.files
    }
    found = await lake.files.rows_at(lake.catalog, after, table_id=table.table_id)
    assert found == {(entry.shard, entry.position): 1 for entry in accepted}
    assert await lake.upkeep.intents() == []


async def test_A8_C6_a_lost_intent_of_one_partition_keeps_the_others_out_too(
    lake: LakeHarness, table: TableSchema
) -> None:
    lake.needs(Capability.REMOVE_INTENT)
    await lake.accept_many(table, 3)
    before = (await lake.catalog.head()).snapshot_id
    worker = lake.worker()
    commit = await cut_by_entry(lake, table, worker)
    await lake.remove_intent(commit.files[-1].file_id)
    published = await worker.publish(commit)
    assert published.outcomes == {commit.commit_id: CommitOutcome.INTENT_LOST}
    assert (await lake.catalog.head()).snapshot_id == before
    assert await lake.upkeep.live_files(table.table_id) == []


async def test_A12_partition_sort_order_and_retention_are_kept_by_version(
    lake: LakeHarness,
) -> None:
    retention = {"rows": {"column": "ts", "for_s": 7_776_000}}
    made = await lake.catalog.create_table(
        name="laid_out",
        columns=[Column(0, "id", "integer"), Column(0, "ts", "timestamptz")],
        partition_by=("day(ts)", "bucket(16, id)"),
        sort_by=("zorder(id, ts)",),
        retention=retention,
    )
    first = made.schema
    assert first.partition_by == ("day(ts)", "bucket(16, id)")
    assert (first.sort_by, first.retention) == (("zorder(id, ts)",), retention)
    wider = dataclasses.replace(first.columns[0], type="bigint")
    wanted = dataclasses.replace(
        first, columns=(wider, first.columns[1]), partition_by=(), sort_by=("ts",), retention={}
    )
    second = (await lake.catalog.alter_table(schema=wanted, expected_version=1)).schema
    assert second == dataclasses.replace(wanted, version=2)
    for schema in (first, second):
        assert await lake.catalog.schema_version(first.table_id, schema.version) == schema
    state = await lake.catalog.table("laid_out")
    assert state is not None
    assert state.schema == second
