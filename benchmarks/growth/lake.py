"""A lake in PostgreSQL that grows to any size in seconds.

Tables are made by the catalog itself. Snapshots and files are made in bulk: one entry is appended,
claimed and published as always, and the rows that it left (snapshot, published range, bus log, data
file) are copied within the database, every column, with other ids, positions, times and bounds. So
they are exactly the rows that as many publications leave, whatever columns the tables have;
`tests/integration/test_growth_lake.py` compares them. Two things are not made: the payloads on the
bus, which are thrown away after publication anyway, and files in the object store, which the
catalog never reads. Then all tables are vacuumed and analysed, as autovacuum does within a minute;
on a server of its own autovacuum is off, so that it is not counted.
"""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import random
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
import pyarrow as pa

from benchmarks import data
from benchmarks.growth.counters import Meter
from cluster.migrate import upgrade
from lakebus.clock import new_uuid
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import DataFile
from storage.bus.interface import Accepted, Claim, NewEntry
from storage.bus.settings import BusSettings
from storage.catalog.interface import Commit, Head, Published
from storage.files.statistics import table_statistics
from storage.names import SCHEMA
from storage.postgres import PostgresLake
from storage.postgres.rewind import GuardSettings
from storage.rows.segment import EntryPart
from storage.rows.types import parse_type

ROWS = 10
#: Events of a file made in bulk: `FIRST_EVENT + number * EVENTS` and following.
FIRST_EVENT, EVENTS = 10**12, 1_000
#: One in so many files ended again before the head.
ENDED_EVERY = 11
#: Nothing of the lake's own reads in the background while calls are counted.
_QUIET = GuardSettings(marker_s=3_600, check_s=3_600)
_COLUMNS = """
SELECT column_name FROM information_schema.columns
 WHERE table_schema = $1 AND table_name = $2 AND is_generated = 'NEVER' ORDER BY ordinal_position"""
_TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = $1 ORDER BY tablename"


class GrowingLake:
    def __init__(self, lake: PostgresLake, connection: Any, meter: Meter, *, seed: int) -> None:
        self.postgres, self.meter = lake, meter
        self._connection = connection
        self._rng = random.Random(seed)
        self.schemas: dict[int, TableSchema] = {}
        self._event = 0
        self.files = 0

    async def head(self) -> Head:
        return await self.postgres.catalog.head()

    # --- tables ------------------------------------------------------------------------

    async def add_table(self) -> TableSchema:
        given = cast(list[dict[str, Any]], data.COLUMNS)
        columns = tuple(
            Column(0, one["name"], one["type"], one.get("nullable", True)) for one in given
        )
        name = f"t{len(self.schemas) + 1:05d}"
        change = await self.postgres.catalog.create_table(name=name, columns=columns)
        self.schemas[change.schema.table_id] = change.schema
        return change.schema

    async def add_tables(self, until: int) -> None:
        while len(self.schemas) < until:
            await self.add_table()

    def any_table(self) -> TableSchema:
        return self._rng.choice(list(self.schemas.values()))

    # --- publications, as they always are ----------------------------------------------

    async def append(self, schema: TableSchema) -> Accepted:
        self._event += ROWS
        batch = _batch(schema, self._event, self._rng)
        entry = NewEntry(
            principal_id=1,
            target=schema.name,
            parts=(EntryPart(schema.table_id, schema.version, batch),),
            fingerprint=hashlib.sha256(b"%d" % self._event).digest(),
            idempotency_key=f"growth-{self._event}",
        )
        outcome = await self.postgres.bus.append(entry)
        assert isinstance(outcome, Accepted), outcome
        return outcome

    async def claim(self) -> Claim:
        claim = await self.postgres.bus.claim(new_uuid())
        assert claim is not None, "an entry was appended, and there is none to claim"
        return claim

    async def commit_of(self, claim: Claim) -> Commit:
        """With one file for each table of the claim, as a publisher makes it."""

        segments = await self.postgres.bus.read(claim)
        size = sum(share for segment in segments for share in segment.entry_bytes)
        files = tuple(self._file(table, file) for table, file in claim.file_ids.items())
        return Commit(new_uuid(), claim.lease, files, size, new_uuid())

    async def publish(self, commit: Commit) -> Published:
        published = await self.postgres.catalog.publish(new_uuid(), [commit])
        assert published.snapshot_id is not None, published.outcomes
        return published

    async def publish_entry(self) -> Published:
        """From the append of an entry to its publication."""

        await self.append(self.any_table())
        return await self.publish(await self.commit_of(await self.claim()))

    def _file(self, table_id: int, file_id: uuid.UUID) -> DataFile:
        schema = self.schemas[table_id]
        batch = _batch(schema, self._event, self._rng)
        columns = {int(name): batch.column(name) for name in batch.schema.names}
        return DataFile(
            file_id=file_id,
            table_id=table_id,
            schema_version=schema.version,
            object_key=f"tables/{table_id}/{file_id}.parquet",
            rows=ROWS,
            size_bytes=4_000,
            sha256=hashlib.sha256(file_id.bytes).hexdigest(),
            statistics=table_statistics(schema, columns),
        )

    # --- in bulk -----------------------------------------------------------------------

    async def fill_snapshots(self, until: int) -> None:
        """Publications of one entry each until the head is the snapshot `until`; the last is a
        real one."""

        made = until - (await self.head()).snapshot_id - 2
        if made >= 0:
            await self.publish_entry()
            async with self._connection.transaction():
                for statement in await self._snapshot_statements():
                    await self._connection.execute(statement, made)
            await self.publish_entry()
        await self.settle()

    async def _snapshot_statements(self) -> list[str]:
        """$1: how many. What moves the head comes last, because the others look at it."""

        width = "(o.hi - o.lo)"
        moved = (
            "o.watermark[:o.shard] || (o.watermark[o.shard + 1] + i * (o.hi - o.lo))"
            " || o.watermark[o.shard + 2:]"
        )
        commit_id = "md5(o.commit_id::text || i)::uuid"
        later = "o.published_at + i * interval '1 microsecond'"
        made = """
            FROM lake JOIN snapshot o0 USING (snapshot_id) JOIN published_range r0
                 USING (snapshot_id), generate_series(1, $1::bigint) i,"""
        snapshots = await self._copy(
            "snapshot",
            f"{made} LATERAL (SELECT o0.*, r0.shard, r0.lo, r0.hi, r0.commit_id) o",
            {
                "snapshot_id": "o.snapshot_id + i",
                "parent_id": "o.snapshot_id + i - 1",
                "published_at": later,
                "watermark": moved,
                "summary": f"replace(o.summary::text, o.commit_id::text, {commit_id}::text)::jsonb",
                "publication_id": "gen_random_uuid()",
            },
        )
        ranges = await self._copy(
            "published_range",
            f"{made} LATERAL (SELECT r0.*) o",
            {
                "lo": f"o.lo + i * {width}",
                "hi": f"o.hi + i * {width}",
                "snapshot_id": "o.snapshot_id + i",
                "commit_id": commit_id,
                "owner": "gen_random_uuid()",
                "published_at": later,
            },
        )
        log = await self._copy(
            "bus_log",
            f"{made} LATERAL (SELECT * FROM bus_log l WHERE l.shard = r0.shard AND l.lo = r0.lo) o",
            {
                "lo": f"o.lo + i * {width}",
                "hi": f"o.hi + i * {width}",
                "segment_id": "nextval('segment_number')",
            },
        )
        counters = [
            f"""UPDATE {table} c SET {column} = c.{column} + $1::bigint * (r.hi - r.lo)
                  FROM lake JOIN published_range r USING (snapshot_id) WHERE c.shard = r.shard"""
            for table, column in (("bus_shard", "next_append"), ("bus_claim", "next_claim"))
        ]
        head = """UPDATE lake l SET snapshot_id = s.snapshot_id, published_at = s.published_at,
                         watermark = s.watermark, publish_count = l.publish_count + $1::bigint
                    FROM snapshot s WHERE s.snapshot_id = l.snapshot_id + $1::bigint"""
        return [snapshots, ranges, log, *counters, head]

    async def fill_files(self, live: int) -> None:
        """Live files, spread over the tables and over the snapshots since the last table was made,
        and a tenth as many that have ended again."""

        first_file, self.files = self.files, max(self.files, live * ENDED_EVERY // 10)
        published = await self.publish_entry()
        since = 1 + await self._connection.fetchval("SELECT max(first_snapshot) FROM lake_table")
        statement = await self._copy(
            "data_file",
            """FROM data_file o, generate_series($1::bigint, $2::bigint - 1) n,
                 LATERAL (SELECT gen_random_uuid() AS id, n AS again,
                                 ($4::integer[])[(1 + n % cardinality($4))::integer] AS table_id,
                                 $5::bigint + (n - $1) * ($3 - $5) / ($2 - $1) AS first) m
               WHERE o.first_snapshot = $3::bigint""",
            {
                "file_id": "m.id",
                "table_id": "m.table_id",
                "object_key": "'tables/' || m.table_id || '/' || m.id || '.parquet'",
                "sha256": "encode(sha256(m.id::text::bytea), 'hex')",
                "first_snapshot": "m.first",
                "last_snapshot": f"CASE WHEN n % {ENDED_EVERY} = 10 AND m.first < $3::bigint - 1"
                " THEN m.first + 1 + ($3 - 1 - m.first) / (2 + n % 7) END",
                "statistics": _BOUNDS_SQL,
            },
        )
        await self._connection.execute(
            statement,
            first_file,
            self.files,
            published.snapshot_id,
            list(self.schemas),
            since,
        )
        await self.settle()

    async def settle(self) -> None:
        for row in await self._connection.fetch(_TABLES, SCHEMA):
            await self._connection.execute(f'VACUUM (ANALYZE) "{row[0]}"')

    async def _copy(self, table: str, source: str, changed: Mapping[str, str]) -> str:
        """INSERT … SELECT of all columns of `o`, those `changed` by other expressions."""

        names = [row[0] for row in await self._connection.fetch(_COLUMNS, SCHEMA, table)]
        assert changed.keys() <= set(names), (table, changed.keys() - set(names))
        values = ", ".join(changed.get(name, f'o."{name}"') for name in names)
        columns = ", ".join(f'"{name}"' for name in names)
        return f"INSERT INTO {table} ({columns}) SELECT {values} {source}"


#: The bounds of event_id (column 1) and ts (column 4) of a file; its text begins with them in the
#: order of the columns: {"1":[0,"…","…"],"2":…
_BOUNDS_SQL = f"""
    regexp_replace(regexp_replace(o.statistics, '"1":\\[0,"\\d+","\\d+"\\]',
        format('"1":[0,"%s","%s"]', {FIRST_EVENT} + n * {EVENTS},
               {FIRST_EVENT} + n * {EVENTS} + {EVENTS - 1})),
        '"4":\\[0,"\\d+","\\d+"\\]',
        format('"4":[0,"%s","%s"]', 1767225600000000 + n * 1000000,
               1767225600000000 + n * 1000000 + 59999999))"""


def _batch(schema: TableSchema, first_event: int, rng: random.Random) -> pa.RecordBatch:
    rows = [
        row
        | {
            "ts": dt.datetime.fromisoformat(row["ts"]),
            "amount": decimal.Decimal(row["amount"]),
        }
        for row in data.rows_of(first_event, ROWS, rng)
    ]
    return pa.record_batch(
        {
            str(column.column_id): pa.array(
                [row.get(column.name) for row in rows], parse_type(column.type).arrow
            )
            for column in schema.columns
        }
    )


#: The server's, on top of a stack's own: what is counted must not depend on when it vacuums.
SERVER_SETTINGS = {"autovacuum": "off"}


@asynccontextmanager
async def growing_lake(dsn: str, *, seed: int = 5) -> AsyncIterator[GrowingLake]:
    """On an empty database. A claim takes one entry, so that each publication is of one."""

    await upgrade(dsn)
    settings = BusSettings(claim_entries_max=1)
    lake = await PostgresLake.open(dsn, bus_settings=settings, guard_settings=_QUIET)
    connection = await asyncpg.connect(dsn, server_settings={"search_path": SCHEMA})
    meter = Meter(dsn, lake.pools)
    try:
        await meter.open()
        yield GrowingLake(lake, connection, meter, seed=seed)
    finally:
        await meter.close()
        await connection.close()
        await lake.close()
