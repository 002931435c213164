"""The in-memory catalog: the other face of a `MemoryLake` (the first is `storage.bus.memory`).

Snapshots are range predicates over files and schemas, exactly as in the database; a publish or a
schema change is one step of the event loop.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Mapping, Sequence

from lakebus.clock import format_time
from lakebus.errors import (
    HistoryLost,
    OutcomeUnknown,
    SchemaVersionMismatch,
    SnapshotExpired,
    SnapshotNotFound,
    TableExists,
    TableNotFound,
    TimeInFuture,
    Unavailable,
)
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import Snapshot
from storage.catalog import memory_erasures, memory_publish
from storage.catalog.interface import (
    Commit,
    DropTicket,
    Head,
    LakeIdentity,
    ManifestDelta,
    Published,
    PublishedRange,
    SchemaLife,
    TableChange,
    TableState,
)
from storage.memory_lake import MemoryLake
from storage.memory_state import SchemaRow, TableRow


class MemoryCatalog:
    """See `storage.catalog.interface.Catalog`. Use from one event loop."""

    def __init__(self, lake: MemoryLake) -> None:
        self._lake = lake

    async def identity(self) -> LakeIdentity:
        await self._lake.reach()
        return self._lake.identity

    # --- snapshots --------------------------------------------------------------------------

    async def head(self) -> Head:
        await self._lake.reach()
        await memory_erasures.compare(self._lake)
        newest = self._lake.head
        return Head(
            snapshot_id=newest.snapshot_id,
            published_at=newest.published_at,
            history=newest.history,
            watermark=newest.watermark,
            closed_until=self._lake.state.closed_until,
            now=self._lake.now(),
            oldest_snapshot_id=self._lake.state.oldest_snapshot_id,
            erasures=self._lake.state.erasure_count,
            erasures_owed=memory_erasures.owed(self._lake),
        )

    async def snapshot(self, snapshot_id: int) -> Snapshot:
        await self._lake.reach()
        state = self._lake.state
        if any(lo <= snapshot_id < hi for lo, hi in state.lost_snapshots):
            raise HistoryLost(f"snapshot {snapshot_id} belonged to a line of history that was lost")
        found = state.snapshots.get(snapshot_id)
        if found is None:
            raise SnapshotNotFound(f"there is no snapshot {snapshot_id}")
        return self._readable(found)

    async def snapshot_at(self, time: dt.datetime) -> Snapshot:
        await self._lake.reach()
        state, newest = self._lake.state, self._lake.head
        if time > max(self._lake.now(), newest.published_at, state.closed_until):
            raise TimeInFuture(
                f"{format_time(time)} is later than the lake's clock and its newest snapshot"
            )
        # From here on no publish can get a time at or before the one that is answered (C4).
        state.closed_until = max(state.closed_until, time)
        if any(lo < time < hi for lo, hi in state.lost_times):
            raise HistoryLost(f"{format_time(time)} lies in a line of history that was lost")
        earlier = [s for s in state.snapshots.values() if s.published_at <= time]
        if not earlier:
            raise SnapshotNotFound(f"the lake did not exist at {format_time(time)}")
        return self._readable(max(earlier, key=lambda s: s.published_at))

    async def snapshots(self, *, limit: int, before: int | None = None) -> Sequence[Snapshot]:
        await self._lake.reach()
        state = self._lake.state
        found = [
            s
            for number, s in sorted(state.snapshots.items(), reverse=True)
            if self._lake.retained(number) and (before is None or number < before)
        ]
        return found[:limit]

    def _readable(self, snapshot: Snapshot) -> Snapshot:
        oldest = self._lake.state.oldest_snapshot_id
        if not self._lake.retained(snapshot.snapshot_id):
            raise SnapshotExpired(
                f"snapshot {snapshot.snapshot_id} has expired", oldest_snapshot_id=oldest
            )
        return snapshot

    # --- tables -----------------------------------------------------------------------------

    async def create_table(
        self,
        *,
        name: str,
        columns: Sequence[Column],
        partition_by: Sequence[str] = (),
        sort_by: Sequence[str] = (),
        retention: Mapping[str, object] | None = None,
        if_not_exists: bool = False,
        actor: str = "",
    ) -> TableChange:
        await self._lake.reach()
        existing = self._live(name)
        if existing is not None:
            if not if_not_exists:
                raise TableExists(f"there is a table {name} already")
            return TableChange(existing.current, existing.first_snapshot, created=False)
        state = self._lake.state
        table_id = max((*state.tables, state.table_id_floor), default=0) + 1
        schema = TableSchema(
            table_id=table_id,
            name=name,
            version=1,
            columns=tuple(
                dataclasses.replace(column, column_id=number)
                for number, column in enumerate(columns, start=1)
            ),
            partition_by=tuple(partition_by),
            sort_by=tuple(sort_by),
            retention=dict(retention or {}),
        )
        snapshot_id = self._change("create", table_id, {"created": name})
        self._lake.state.tables[table_id] = TableRow(
            table_id=table_id,
            name=name,
            first_snapshot=snapshot_id,
            last_column_id=len(columns),
            versions=[SchemaRow(schema, snapshot_id)],
        )
        return TableChange(schema, snapshot_id)

    async def alter_table(
        self, *, schema: TableSchema, expected_version: int, actor: str = ""
    ) -> TableChange:
        await self._lake.reach()
        table = self._lake.state.tables.get(schema.table_id)
        if table is None or not table.accepts_rows:
            raise TableNotFound(f"there is no table {schema.name}")
        version = table.current.version
        if version != expected_version:
            raise SchemaVersionMismatch(
                f"the table {schema.name} is at schema version {version}", schema_version=version
            )
        columns = tuple(
            column
            if column.column_id
            else dataclasses.replace(column, column_id=_new_id(table, self._lake.schema_floor))
            for column in schema.columns
        )
        version = max(version, self._lake.schema_floor) + 1
        changed = dataclasses.replace(schema, name=table.name, columns=columns, version=version)
        snapshot_id = self._change("alter", table.table_id, {"version": changed.version})
        table.versions[-1].last_snapshot = snapshot_id
        table.versions.append(SchemaRow(changed, snapshot_id))
        return TableChange(changed, snapshot_id)

    async def begin_drop(self, *, name: str, actor: str = "") -> DropTicket:
        await self._lake.reach()
        table = self._live(name)
        if table is None:
            raise TableNotFound(f"there is no table {name}")
        if table.ticket is None:
            table.ticket = DropTicket(table.table_id, name, self._lake.ends())
        return table.ticket

    async def finish_drop(self, ticket: DropTicket) -> int:
        await self._lake.reach()
        table = self._lake.state.tables.get(ticket.table_id)
        if table is None or table.ticket is None:
            raise TableNotFound(f"the table {ticket.name} is not being dropped")
        if table.last_snapshot is not None:
            return table.last_snapshot
        reached = self._lake.watermark()
        if any(reached[shard] < needed for shard, needed in table.ticket.positions.items()):
            raise Unavailable(
                "entries accepted before the drop are not published yet", retry_after_s=0.1
            )
        snapshot_id = self._change("drop", table.table_id, {"dropped": table.name})
        for row in self._lake.state.files.values():
            if row.file.table_id == table.table_id and row.last_snapshot is None:
                row.last_snapshot = snapshot_id
        table.versions[-1].last_snapshot = table.last_snapshot = snapshot_id
        return snapshot_id

    async def closing_tables(self) -> Sequence[DropTicket]:
        await self._lake.reach()
        tables = self._lake.state.tables.values()
        return [t.ticket for t in tables if t.live and t.ticket is not None]

    async def table(self, name: str) -> TableState | None:
        await self._lake.reach()
        table = self._live(name)
        return None if table is None else TableState(table.current, table.accepts_rows)

    async def tables(self) -> Sequence[TableState]:
        await self._lake.reach()
        live = [table for table in self._lake.state.tables.values() if table.live]
        live.sort(key=lambda table: table.name)
        return [TableState(table.current, table.accepts_rows) for table in live]

    async def schema_version(self, table_id: int, version: int) -> TableSchema | None:
        await self._lake.reach()
        table = self._lake.state.tables.get(table_id)
        versions = table.versions if table is not None else ()
        return next((row.schema for row in versions if row.schema.version == version), None)

    def _live(self, name: str) -> TableRow | None:
        tables = self._lake.state.tables.values()
        return next((table for table in tables if table.live and table.name == name), None)

    def _change(self, operation: str, table_id: int, what: Mapping[str, object]) -> int:
        lake = self._lake
        summary = {"tables": {str(table_id): what}}
        return lake.next_snapshot(operation, summary, at=lake.next_publish_time()).snapshot_id

    # --- publication ------------------------------------------------------------------------

    async def publish(self, publication_id: uuid.UUID, commits: Sequence[Commit]) -> Published:
        await self._lake.reach()
        published = memory_publish.publish(self._lake, publication_id, commits)
        if self._lake.faults.take_lost_reply("publish"):
            raise OutcomeUnknown("the reply to the publish was lost")
        return published

    async def publish_outcome(self, publication_id: uuid.UUID) -> Published | None:
        await self._lake.reach()
        return self._lake.state.publications.get(publication_id)

    async def published_ranges(
        self, *, after: int, until: int, shard: int = 0, position: int = 0, limit: int = 1_000
    ) -> Sequence[PublishedRange]:
        await self._lake.reach()
        found = [
            one
            for one in self._lake.state.published_ranges
            if after < one.snapshot_id <= until
            and (one.shard > shard or (one.shard == shard and one.hi > position))
        ]
        return sorted(found, key=lambda one: (one.shard, one.lo))[:limit]

    async def removed_rows(self, table_id: int, *, after: int, until: int) -> bool:
        await self._lake.reach()
        return any(
            after < number <= until
            and snapshot.operation in ("delete", "retain")
            and str(table_id) in _tables_of(snapshot)
            for number, snapshot in self._lake.state.snapshots.items()
        )

    async def manifest_delta(self, *, after: int, until: int) -> ManifestDelta:
        await self._lake.reach()
        state = self._lake.state
        if 0 < after < state.oldest_snapshot_id:
            raise SnapshotExpired(
                f"what ended after snapshot {after} is not all known any more",
                oldest_snapshot_id=state.oldest_snapshot_id,
            )
        files, ended = [], {}
        for file_id, row in state.files.items():
            last = _ended_by(row.last_snapshot, until)
            if after < row.first_snapshot <= until and (after > 0 or self._lake.is_read(row)):
                files.append(dataclasses.replace(row.file, last_snapshot=last))
            elif last is not None and row.first_snapshot <= after < last:
                ended[file_id] = last
        files.sort(key=lambda file: (file.first_snapshot, file.file_id.bytes))
        return ManifestDelta(
            after,
            until,
            tuple(files),
            ended,
            self._schemas(after, until),
            state.erasure_count,
            memory_erasures.erased(self._lake) if after == 0 else (),
        )

    def _schemas(self, after: int, until: int) -> tuple[SchemaLife, ...]:
        lives = []
        for _, table in sorted(self._lake.state.tables.items()):
            for row in table.versions:
                edges = (row.first_snapshot, row.last_snapshot)
                if any(edge is not None and after < edge <= until for edge in edges):
                    life = SchemaLife(
                        schema=row.schema,
                        first_snapshot=row.first_snapshot,
                        last_snapshot=_ended_by(row.last_snapshot, until),
                        table_first_snapshot=table.first_snapshot,
                        table_last_snapshot=_ended_by(table.last_snapshot, until),
                    )
                    lives.append(life)
        return tuple(lives)


def _tables_of(snapshot: Snapshot) -> Mapping[str, object]:
    tables = snapshot.summary.get("tables", {})
    assert isinstance(tables, Mapping)
    return tables


def _ended_by(last_snapshot: int | None, until: int) -> int | None:
    """An end later than the delta belongs to a later delta."""

    return last_snapshot if last_snapshot is not None and last_snapshot <= until else None


def _new_id(table: TableRow, floor: int) -> int:
    table.last_column_id = max(table.last_column_id, floor) + 1
    return table.last_column_id
