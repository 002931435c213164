"""The lake that the growth benchmark makes in bulk has the rows that publications leave."""

from __future__ import annotations

import json
from typing import Any

import asyncpg

from benchmarks.growth.lake import ENDED_EVERY, growing_lake
from benchmarks.growth.point import Point
from storage.files.statistics import statistics_from_json, statistics_to_json
from storage.names import SCHEMA
from storage.reading.manifest import Manifest

#: What is other in every publication: ids, places and times; those of one kind are compared below.
_OWN = {
    "snapshot": {"snapshot_id", "parent_id", "published_at", "publication_id", "watermark"},
    "published_range": {"lo", "hi", "snapshot_id", "commit_id", "owner", "published_at"},
    "bus_log": {"lo", "hi", "segment_id", "accepted_at", "expires_at", "entry_indexes"},
    "data_file": {"file_id", "table_id", "first_snapshot", "last_snapshot", "object_key", "sha256"},
}


async def rows_of(connection: Any, table: str, order: str) -> list[dict[str, Any]]:
    return [dict(row) for row in await connection.fetch(f"SELECT * FROM {table} ORDER BY {order}")]


def shape(table: str, row: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all rows; of JSON the keys, of sizes whether they are there."""

    kept = {name: value for name, value in row.items() if name not in _OWN[table]}
    if table == "snapshot":
        summary = json.loads(kept.pop("summary"))
        (kept["outcome"],) = summary["outcomes"].values()
        kept["tables"] = next(iter(summary["tables"].values())).keys()
    if table == "data_file":
        kept["statistics"] = statistics_from_json(kept["statistics"]).keys()
    if table == "bus_log":
        kept["entry_bytes"] = len(kept["entry_bytes"])
        kept["targets"] = len(kept["targets"])
        kept["table_ids"] = len(kept["table_ids"])
    kept.pop("shard", None)
    return {
        name: value if not isinstance(value, list) else tuple(value) for name, value in kept.items()
    }


async def test_rows_made_in_bulk_are_those_of_publications(database_dsn: str) -> None:
    async with growing_lake(database_dsn) as lake:
        await lake.add_tables(3)
        for _ in range(3):
            await lake.publish_entry()
        before = (await lake.head()).snapshot_id
        await lake.fill_snapshots(40)
        await lake.fill_files(44)
        connection = await asyncpg.connect(database_dsn, server_settings={"search_path": SCHEMA})
        try:
            snapshots = await rows_of(connection, "snapshot", "snapshot_id")
            ranges = await rows_of(connection, "published_range", "snapshot_id")
            logs = await rows_of(connection, "bus_log", "shard, lo")
            files = await rows_of(connection, "data_file", "first_snapshot")
            next_append = dict(await connection.fetch("SELECT shard, next_append FROM bus_shard"))
            claimed = dict(await connection.fetch("SELECT shard, next_claim FROM bus_claim"))
        finally:
            await connection.close()

        # Snapshots: one line, in order of time, each with its range; ranges without a gap.
        assert [row["snapshot_id"] for row in snapshots] == list(range(1, len(snapshots) + 1))
        assert [row["parent_id"] for row in snapshots[1:]] == list(range(1, len(snapshots)))
        times = [row["published_at"] for row in snapshots]
        assert times == sorted(set(times))
        appends = [row for row in snapshots if row["operation"] == "append"]
        assert len(appends) == len(ranges) == len(logs) > 36
        for one, published in zip(appends, ranges, strict=True):
            assert published["snapshot_id"] == one["snapshot_id"]
            assert published["published_at"] == one["published_at"]
            assert list(json.loads(one["summary"])["outcomes"]) == [str(published["commit_id"])]
            assert one["watermark"][published["shard"]] == published["hi"]
        for shard, end in next_append.items():
            of_shard = sorted((row["lo"], row["hi"]) for row in ranges if row["shard"] == shard)
            logged = [(row["lo"], row["hi"]) for row in logs if row["shard"] == shard]
            assert of_shard == logged == [(n, n + 1) for n in range(end)]
            assert claimed[shard] == end
        for table, rows in (("snapshot", appends), ("published_range", ranges), ("bus_log", logs)):
            shapes = [shape(table, row) for row in rows]
            assert all(one == shapes[0] for one in shapes), table

        # Files: of a published one's form, with canonical statistics, inside the lake's history.
        shapes = [shape("data_file", row) for row in files]
        assert all(one == shapes[0] for one in shapes)
        head = await lake.head()
        ended = [row for row in files if row["last_snapshot"] is not None]
        assert len(ended) == len({row["file_id"] for row in ended}) == 48 // ENDED_EVERY
        assert len(files) - len(ended) >= 44
        for row in files:
            assert statistics_to_json(statistics_from_json(row["statistics"])) == row["statistics"]
            assert row["object_key"] == f"tables/{row['table_id']}/{row['file_id']}.parquet"
            assert row["first_snapshot"] > before - 3
            assert row["first_snapshot"] < (row["last_snapshot"] or head.snapshot_id + 1)

        # And life goes on: the next publications fit, are counted, and a manifest follows them.
        point = Point(lake.meter)
        await point.publications(lake)
        # Autovacuum's transactions are counted as well, where it comes by.
        assert 1.0 <= point.curves["publish, statements"][0] < 2.0
        assert point.curves["publish, rows read"][0] > 0
        assert point.curves["publish, WAL bytes"][0] > 0
        head = await lake.head()
        manifest = Manifest(lake.postgres.catalog)
        view = await manifest.at(head.snapshot_id, head)
        live = sum(len(view.files(schema.table_id).files) for schema in view.schemas().values())
        assert live == len(files) - len(ended) + 20
