"""More rules of the machine: tables that come and go, poison, old snapshots, tokens, a restore.

Kept apart from `machine.py`, which has the door, the work and what both share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from lakebus.errors import (
    LeaseLost,
    Quarantined,
    SnapshotExpired,
    TableNotFound,
    TokenHistoryLost,
    Unavailable,
    VisibilityTimeout,
)
from lakebus.schemas import TableSchema
from lakebus.tokens import VisibilityToken
from storage.bus.interface import Claim, SchemaStale
from storage.bus.receipting import entry_token
from storage.catalog.interface import DropTicket
from tests.conformance.harness import Capability, LakeHarness, entry_of
from tests.conformance.model import LakeModel
from tests.conformance.reader import reading
from tests.conformance.worker import Place, Worker

T = TypeVar("T")

_TABLES_MAX = 5
#: The first tables stay for ever, so that there is always something to append to.
_TABLES_MIN = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Backup:
    """A backup, and what the model knew when it was taken."""

    backup: Any
    places: frozenset[Place]
    quarantined: frozenset[Place]
    tables: tuple[TableSchema, ...]


class MoreRules(RuleBasedStateMachine):
    """`tables` are open; `closing` are closed at the door; `dropped` are gone."""

    lake: LakeHarness
    model: LakeModel
    tables: list[TableSchema]
    held: list[tuple[Worker, Claim]]

    def __init__(self) -> None:
        super().__init__()
        self.closing: list[tuple[TableSchema, DropTicket]] = []
        self.dropped: list[TableSchema] = []
        self.seen: dict[int, dict[int, dict[Place, int]]] = {}
        self.oldest = 1
        self.backup: Backup | None = None
        self._tables_made = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        raise NotImplementedError

    def publish_doomed(self, worker: Worker, claim: Claim) -> None:
        raise NotImplementedError

    @property
    def living(self) -> list[TableSchema]:
        """Every table that the newest snapshot has."""

        return [*self.tables, *(schema for schema, _ in self.closing)]

    async def check(self) -> None:
        await self.model.check(self.lake, self.living)
        for schema in self.dropped:
            assert await self.lake.rows_by_entry(table_id=schema.table_id) == {}

    # --- tables -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.tables) < _TABLES_MAX)
    @rule()
    def create(self) -> None:
        self._tables_made += 1
        self.tables.append(self.run(self.lake.create(f"x{self._tables_made}")))

    @precondition(lambda self: len(self.tables) > _TABLES_MIN)
    @rule(data=st.data())
    def begin_drop(self, data: st.DataObject) -> None:
        """Closed at the door; what was accepted before still counts (A12)."""

        schema = data.draw(st.sampled_from(self.tables[_TABLES_MIN:]))
        self.tables.remove(schema)
        ticket = self.run(self.lake.catalog.begin_drop(name=schema.name))
        assert self.run(self.lake.catalog.begin_drop(name=schema.name)) == ticket
        assert ticket.positions == dict(self.run(self.lake.bus.ends()))
        late = entry_of(schema, [1])
        assert self.run(self.lake.bus.append(late)) == SchemaStale((schema.table_id,))
        self.closing.append((schema, ticket))

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def finish_drop(self, data: st.DataObject) -> None:
        schema, ticket = chosen = data.draw(st.sampled_from(self.closing))
        tickets = {t.table_id: t for t in self.run(self.lake.catalog.closing_tables())}
        assert tickets == {t.table_id: t for _, t in self.closing}
        reached = self.run(self.lake.catalog.head()).watermark
        if any(reached[shard] < end for shard, end in ticket.positions.items()):
            with pytest.raises(Unavailable):
                self.run(self.lake.catalog.finish_drop(ticket))
            return
        snapshot_id = self.run(self.lake.catalog.finish_drop(ticket))
        assert self.run(self.lake.catalog.finish_drop(ticket)) == snapshot_id
        with pytest.raises(TableNotFound):
            self.run(self.lake.catalog.begin_drop(name=schema.name))
        self.closing.remove(chosen)
        self.dropped.append(schema)
        self.run(self.check())

    # --- poison -------------------------------------------------------------------------------

    @precondition(lambda self: self.held)
    @rule(data=st.data(), canary=st.booleans())
    def isolate(self, data: st.DataObject, canary: bool) -> None:
        """Fails a range again and again: halves, then the entry alone, then the verdict (B8)."""

        worker, claim = data.draw(st.sampled_from(self.held))
        for _ in range(6):
            if claim.doomed:
                self.publish_doomed(worker, claim)
                return
            try:
                if canary:
                    self.run(self.lake.bus.note_canary(claim.lease))
                self.run(self.lake.bus.nack(claim.lease, error="drawn", delay_s=0.0))
            except LeaseLost:
                return
            self.run(self.lake.advance_s(0.002))
            again = self.run(self.lake.bus.claim(worker.owner))
            assert again is not None, "what was given back cannot be claimed"
            self.take_claim(worker, again)
            was_lone = claim.lease.hi - claim.lease.lo == 1
            if (again.lease.shard, again.lease.lo) == (claim.lease.shard, claim.lease.lo):
                assert again.attempt >= claim.attempt + 1
                assert was_lone or again.lease.hi < claim.lease.hi
            if again.lease.lease_id == claim.lease.lease_id and was_lone and canary:
                assert again.lone_failures == claim.lone_failures + 1
            claim = again

    def take_claim(self, worker: Worker, claim: Claim) -> None:
        """A claim that somebody got, checked and kept."""

        is_lone = claim.lease.hi - claim.lease.lo == 1
        often_enough = claim.lone_failures >= self.lake.settings.quarantine_attempts
        assert claim.doomed == (is_lone and often_enough)
        self.model.take_claim(claim, self.run(worker.read(claim)))
        self.held.append((worker, claim))

    # --- snapshots ----------------------------------------------------------------------------

    @rule()
    def remember(self) -> None:
        head = self.run(self.lake.catalog.head())
        self.seen[head.snapshot_id] = self.run(self._rows_at(head.snapshot_id, self.living))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def look_back(self, data: st.DataObject) -> None:
        """A snapshot is the same for ever, or says that it has expired (D2, D8)."""

        number = data.draw(st.sampled_from(sorted(self.seen)))
        if number < self.oldest:
            with pytest.raises(SnapshotExpired):
                self.run(self.lake.catalog.snapshot(number))
            return
        assert self.run(self.lake.catalog.snapshot(number)).snapshot_id == number
        rows = self.seen[number]
        tables = [t for t in (*self.living, *self.dropped) if t.table_id in rows]
        assert self.run(self._rows_at(number, tables)) == rows

    @precondition(lambda self: Capability.EXPIRE_SNAPSHOTS in self.lake.capabilities)
    @rule(kept=st.integers(0, 5))
    def expire(self, kept: int) -> None:
        before = self.run(self.lake.catalog.head()).snapshot_id - kept
        if before > self.oldest:
            self.run(self.lake.expire_snapshots(before=before))
            self.oldest = before

    async def _rows_at(
        self, snapshot_id: int, tables: Sequence[TableSchema]
    ) -> dict[int, dict[Place, int]]:
        return {
            table.table_id: await self.lake.files.rows_at(
                self.lake.catalog, snapshot_id, table_id=table.table_id
            )
            for table in tables
        }

    # --- tokens -------------------------------------------------------------------------------

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data())
    def read_with_token(self, data: st.DataObject) -> None:
        """Covered, quarantined, or the time is up: whichever is true, and no other (D3, D4)."""

        place = data.draw(st.sampled_from(sorted(self.model.entries)))
        self.run(self._read(place))

    async def _read(self, place: Place) -> None:
        head = await self.lake.catalog.head()
        shard, position = place
        covered = head.watermark[shard] > position
        token = entry_token(history=head.history, shard=shard, position=position)
        names = {table.table_id: table.name for table in self.living}
        async with reading(self.lake) as reader:
            try:
                read = await reader.read(tokens=[token], within_s=10.0 if covered else 0.01)
            except Quarantined:
                assert covered
                assert place in self.model.quarantined
            except VisibilityTimeout:
                assert not covered
            else:
                assert covered
                assert place in self.model.published
                assert read.token == VisibilityToken(head.history, read.snapshot_id)
                for part in self.model.entries[place].parts:
                    name = names.get(part.table_id)
                    if name is not None:
                        assert read.rows[name, place] == part.batch.num_rows

    # --- backup and restore -------------------------------------------------------------------

    @precondition(lambda self: self.backup is None and Capability.RESTORE in self.lake.capabilities)
    @rule()
    def back_up(self) -> None:
        """Restored at the very end; until then the line that will be lost goes on."""

        self.backup = Backup(
            backup=self.run(self.lake.take_backup()),
            places=frozenset(self.model.entries),
            quarantined=frozenset(self.model.quarantined),
            tables=tuple(self.living),
        )

    async def check_restored(self, backup: Backup) -> None:
        """Everything accepted before the backup ends; everything after it is lost, and said so."""

        lost_line = (await self.lake.catalog.head()).history
        await self.lake.restore(backup.backup)
        await self.lake.drain()
        head = await self.lake.catalog.head()
        assert head.history != lost_line
        kept = backup.places - backup.quarantined
        for table in backup.tables:
            expected = {
                place: part.batch.num_rows
                for place in kept
                for part in self.model.entries[place].parts
                if part.table_id == table.table_id
            }
            assert await self.lake.rows_by_entry(table_id=table.table_id) == expected
        async with reading(self.lake) as reader:
            for shard, position in sorted(self.model.entries):
                token = entry_token(history=lost_line, shard=shard, position=position)
                if (shard, position) not in backup.places:
                    with pytest.raises(TokenHistoryLost):
                        await reader.read(tokens=[token])
                elif (shard, position) in backup.quarantined:
                    with pytest.raises(Quarantined):
                        await reader.read(tokens=[token])
                else:
                    assert (await reader.read(tokens=[token])).snapshot_id >= head.snapshot_id
