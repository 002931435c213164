"""Random histories: everything a lake can be asked, in any order, with crashes in between.

The machine keeps a small model of what was acknowledged and compares the lake with it after every
publication and at the end. What must hold of every history:

* an acknowledged entry ends terminal at most once, and exactly once after a drain (C2);
* positions are dense (A7), epochs grow (B2), the watermark never falls and covers nothing that is
  not terminal (C3);
* no two owners hold one entry (B2), and a loser changes nothing (B6);
* no snapshot holds a part of an entry (A8);
* a key is answered with its first receipt, always (A3).

Hypothesis drives plain functions, so each step runs one coroutine on a loop of the machine's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lakebus.clock import new_uuid
from lakebus.errors import LeaseLost, OutcomeUnknown, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, BatchState, Claim, KeyTaken, NewEntry, SchemaStale
from storage.catalog.interface import Commit, CommitOutcome, Published
from tests.conformance.harness import (
    SUITE_SETTINGS,
    Backend,
    Capability,
    LakeHarness,
    entry_of,
)
from tests.conformance.worker import Place, Worker

T = TypeVar("T")

MACHINE_SETTINGS = dataclasses.replace(
    SUITE_SETTINGS,
    claim_entries_max=5,
    lease_ttl_ms=250,
    quarantine_attempts=2,
    segment_ring_rotate_bytes=1,
    segment_ring_rotate_age_s=0.01,
)

_OWNERS = st.integers(0, 2)


def run_machine(backend: Backend, *, histories: int, steps: int) -> None:
    """Runs `histories` random histories of at most `steps` steps; prints the failing one."""

    class Machine(LakeMachine):
        chosen_backend: ClassVar[Backend] = backend

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


class LakeMachine(RuleBasedStateMachine):
    """The rules. `held` are claims that the model gave to a worker, alive or not."""

    chosen_backend: ClassVar[Backend]

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self.entries: dict[Place, NewEntry] = {}
        self.keyed: dict[str, tuple[NewEntry, Accepted | KeyTaken]] = {}
        self.held: list[tuple[Worker, Claim]] = []
        self.published: dict[Place, int] = {}
        self.quarantined: set[Place] = set()
        self.publications: list[tuple[Any, list[Commit], Published]] = []
        self.epoch = 0
        self.watermark: dict[int, int] = {}
        self._numbers = itertools.count()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, 60))

    @initialize()
    def open(self) -> None:
        self.lake: LakeHarness = self.run(
            self._stack.enter_async_context(self.chosen_backend.open(MACHINE_SETTINGS))
        )
        self.tables: list[TableSchema] = [self.run(self.lake.create(name)) for name in "tu"]
        self.owners = [new_uuid() for _ in range(3)]

    def teardown(self) -> None:
        try:
            if hasattr(self, "tables"):
                self.run(self._end())
        finally:
            self.run(self._stack.aclose())
            self._loop.close()

    # --- the door -----------------------------------------------------------------------------

    @rule(
        ordering=st.integers(0, 3),
        rows=st.integers(1, 3),
        both=st.booleans(),
        keyed=st.booleans(),
    )
    def append(self, ordering: int, rows: int, both: bool, keyed: bool) -> None:
        entry = self._entry(ordering, rows, both=both, keyed=keyed)
        outcome = self.run(self.lake.bus.append(entry))
        assert isinstance(outcome, Accepted)
        self._accepted(entry, outcome)

    @rule(count=st.integers(2, 8), ordering=st.integers(0, 3))
    def append_group(self, count: int, ordering: int) -> None:
        entries = [self._entry(ordering, 1, both=False, keyed=True) for _ in range(count)]
        entries.append(entries[0])

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(self.lake.bus.append(entry) for entry in entries))

        outcomes = self.run(all_at_once())
        first, again = outcomes[0], outcomes[-1]
        if isinstance(first, KeyTaken):  # either of the two may come first
            first, again = again, first
            outcomes[0] = first
        assert isinstance(again, KeyTaken)
        assert again.record.receipt == first.receipt
        for entry, outcome in zip(entries[:-1], outcomes[:-1], strict=True):
            assert isinstance(outcome, Accepted)
            self._accepted(entry, outcome)

    @precondition(lambda self: self.keyed)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.keyed)))
        self.run(self._assert_replay(key))

    @precondition(lambda self: self.keyed)
    @rule(data=st.data())
    def conflict(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.keyed)))
        entry, first = self.keyed[key]
        other = dataclasses.replace(entry, fingerprint=b"\xff" * 32)
        outcome = self.run(self.lake.bus.append(other))
        assert isinstance(outcome, KeyTaken)
        assert outcome.record.fingerprint == entry.fingerprint
        assert outcome.record.receipt == _receipt(first)

    @rule()
    def append_stale(self) -> None:
        entry = entry_of(self.tables[0], [1], key=f"stale{next(self._numbers)}", schema_version=999)
        assert self.run(self.lake.bus.append(entry)) == SchemaStale((self.tables[0].table_id,))

    @rule()
    def alter(self) -> None:
        table = self.tables[0]
        if len(table.columns) < 6:
            more = Column(0, f"more{next(self._numbers)}", "bigint")
            table = dataclasses.replace(table, columns=(*table.columns, more))
        change = self.run(
            self.lake.catalog.alter_table(schema=table, expected_version=table.version)
        )
        self.tables[0] = change.schema

    @precondition(lambda self: Capability.LOST_REPLIES in self.lake.capabilities)
    @rule(ordering=st.integers(0, 3))
    def append_unheard(self, ordering: int) -> None:
        entry = self._entry(ordering, 2, both=False, keyed=True)

        async def append() -> Accepted | KeyTaken:
            await self.lake.lose_next_reply("append")
            for _ in range(100):
                try:
                    outcome = await self.lake.bus.append(entry)
                except (OutcomeUnknown, Unavailable):
                    await self.lake.advance_s(0.02)
                    continue
                assert isinstance(outcome, Accepted | KeyTaken)
                return outcome
            raise AssertionError("the bus never answered again")

        self._accepted(entry, self.run(append()))

    # --- work ---------------------------------------------------------------------------------

    @rule(owner=_OWNERS)
    def claim(self, owner: int) -> None:
        worker = self.lake.worker(owner=self.owners[owner])
        claim = self.run(worker.bus.claim(worker.owner))
        if claim is None:
            return
        lease = claim.lease
        assert lease.epoch > self.epoch
        self.epoch = lease.epoch
        places = {(lease.shard, p) for p in range(lease.lo, lease.hi)}
        assert places <= self.entries.keys()
        assert not places & (self.published.keys() | self.quarantined)
        assert len(places) <= MACHINE_SETTINGS.claim_entries_max
        for _, other in self.held:
            if other.lease.shard == lease.shard and _overlap(other, claim):
                assert self.run(self.lake.bus.renew([other.lease])) == []
        for entry in self.run(worker.read(claim)):
            expected = self.entries[(lease.shard, entry.position)]
            assert [p.batch.num_rows for p in entry.parts] == [
                p.batch.num_rows for p in expected.parts
            ]
            assert entry.ids == [
                value for part in expected.parts for value in part.batch.column(0).to_pylist()
            ]
        self.held.append((worker, claim))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        _, claim = data.draw(st.sampled_from(self.held))
        kept = self.run(self.lake.bus.renew([claim.lease]))
        assert list(kept) in ([], [claim.lease])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["release", "nack", "canary"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        _, claim = data.draw(st.sampled_from(self.held))

        async def act() -> None:
            if how == "release":
                await self.lake.bus.release(claim.lease)
            elif how == "nack":
                await self.lake.bus.nack(claim.lease, error="drawn", delay_s=0.02)
            else:
                await self.lake.bus.note_canary(claim.lease)

        held = self.run(self.lake.bus.renew([claim.lease]))
        try:
            self.run(act())
        except LeaseLost:
            assert held == []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 3), quarantine=st.booleans())
    def publish(self, data: st.DataObject, count: int, quarantine: bool) -> None:
        chosen = data.draw(
            st.lists(st.sampled_from(self.held), min_size=1, max_size=count, unique_by=id)
        )
        commits = self.run(self._stage(chosen, quarantine=quarantine))
        publication_id = new_uuid()
        published = self.run(self.lake.catalog.publish(publication_id, commits))
        self._take(publication_id, commits, published)

    @precondition(
        lambda self: self.held and Capability.LOST_REPLIES in self.lake.capabilities
    )
    @rule(data=st.data())
    def publish_unheard(self, data: st.DataObject) -> None:
        chosen = [data.draw(st.sampled_from(self.held))]
        publication_id = new_uuid()

        async def publish() -> tuple[list[Commit], Published | None]:
            await self.lake.lose_next_reply("publish")
            commits = await self._stage(chosen, quarantine=False)
            try:
                return commits, await self.lake.catalog.publish(publication_id, commits)
            except OutcomeUnknown:
                pass
            for _ in range(100):
                try:
                    return commits, await self.lake.catalog.publish_outcome(publication_id)
                except Unavailable:
                    await self.lake.advance_s(0.02)
            raise AssertionError("the catalog never answered again")

        commits, published = self.run(publish())
        if published is None:  # it did not happen, or did nothing: sending it again is safe
            published = self.run(self.lake.catalog.publish(publication_id, commits))
        self._take(publication_id, commits, published)

    @precondition(lambda self: self.publications)
    @rule(data=st.data(), same=st.booleans())
    def publish_again(self, data: st.DataObject, same: bool) -> None:
        publication_id, commits, first = data.draw(st.sampled_from(self.publications))
        if same:
            assert self.run(self.lake.catalog.publish(publication_id, commits)) == first
            return
        fresh = new_uuid()
        published = self.run(self.lake.catalog.publish(fresh, commits))
        for commit in commits:
            if first.outcomes[commit.commit_id] is CommitOutcome.PUBLISHED:
                assert published.outcomes[commit.commit_id] is CommitOutcome.LEASE_LOST
        self._take(fresh, commits, published)

    # --- time and ends ------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3]))
    def advance(self, seconds: float) -> None:
        self.run(self.lake.advance_s(seconds))

    @rule()
    def restart(self) -> None:
        self.run(self.lake.restart())
        # The workers died with their process; what they had sent may still arrive.
        self.held = [
            (self.lake.worker(owner=worker.owner), claim) for worker, claim in self.held
        ]

    @rule()
    def purge(self) -> None:
        self.run(self.lake.bus.purge())

    @rule()
    def look(self) -> None:
        self.run(self._check())

    # --- the model ----------------------------------------------------------------------------

    def _entry(self, ordering: int, rows: int, *, both: bool, keyed: bool) -> NewEntry:
        number = next(self._numbers)
        return entry_of(
            self.tables if both else self.tables[number % 2],
            [number * 10 + n for n in range(rows)],
            key=f"k{number}" if keyed else None,
            ordering_key=str(ordering),
        )

    def _accepted(self, entry: NewEntry, outcome: Accepted | KeyTaken) -> None:
        _, shard, position = _receipt(outcome).batch_id[1:].split("-")
        place = (int(shard), int(position))
        assert place not in self.entries
        self.entries[place] = entry
        if entry.idempotency_key is not None:
            self.keyed[entry.idempotency_key] = (entry, outcome)

    async def _assert_replay(self, key: str) -> None:
        entry, first = self.keyed[key]
        outcome = await self.lake.bus.append(entry)
        assert isinstance(outcome, KeyTaken)
        assert outcome.record.receipt == _receipt(first)
        assert outcome.record.fingerprint == entry.fingerprint

    async def _stage(
        self, chosen: list[tuple[Worker, Claim]], *, quarantine: bool
    ) -> list[Commit]:
        commits = []
        for worker, claim in chosen:
            bad = [claim.lease.lo] if quarantine else []
            try:
                commits.append(await worker.stage(claim, quarantine=bad))
            except LeaseLost:
                assert await self.lake.bus.renew([claim.lease]) == []
                self.held.remove((worker, claim))
        return commits

    def _take(self, publication_id: Any, commits: list[Commit], published: Published) -> None:
        """The model's side of a publication."""

        assert published.outcomes.keys() == {commit.commit_id for commit in commits}
        happened = False
        for commit in commits:
            if published.outcomes[commit.commit_id] is not CommitOutcome.PUBLISHED:
                continue
            happened = True
            assert published.snapshot_id is not None
            bad = {entry.position for entry in commit.quarantined}
            for position in range(commit.lease.lo, commit.lease.hi):
                place = (commit.lease.shard, position)
                assert place not in self.published, "terminal twice"
                assert place not in self.quarantined, "terminal twice"
                if position in bad:
                    self.quarantined.add(place)
                else:
                    self.published[place] = published.snapshot_id
        if happened:
            self.publications.append((publication_id, commits, published))
        else:
            assert published.snapshot_id is None
        self.run(self._check())

    async def _check(self) -> None:
        ends = await self.lake.bus.ends()
        for shard, end in ends.items():
            assert {p for s, p in self.entries if s == shard} == set(range(end))
        head = await self.lake.catalog.head()
        terminal = self.published.keys() | self.quarantined
        for shard, mark in head.watermark.items():
            assert self.watermark.get(shard, 0) <= mark
            open_positions = set(range(ends[shard])) - {p for s, p in terminal if s == shard}
            assert mark == min(open_positions, default=ends[shard])
        self.watermark = dict(head.watermark)
        for table in self.tables:
            rows = await self.lake.rows_by_entry(table_id=table.table_id)
            assert rows == self._rows_of(table.table_id)

    def _rows_of(self, table_id: int) -> dict[Place, int]:
        """What the newest snapshot must hold of a table: whole entries, and no others."""

        return {
            place: part.batch.num_rows
            for place in self.published
            for part in self.entries[place].parts
            if part.table_id == table_id
        }

    async def _end(self) -> None:
        """After a drain every acknowledged entry is terminal exactly once."""

        before = set(self.published) | self.quarantined
        for published in await self.lake.drain():
            assert set(published.outcomes.values()) == {CommitOutcome.PUBLISHED}
        for place in self.entries.keys() - before:
            batch_id = f"b1-{place[0]}-{place[1]}"
            status = await self.lake.bus.batch(batch_id)
            assert status is not None
            assert status.state is BatchState.PUBLISHED
            assert status.snapshot_id is not None
            self.published[place] = status.snapshot_id
        await self._check()
        for key in self.keyed:
            await self._assert_replay(key)
        assert len(await self.lake.bus.quarantine_items(limit=1_000)) == len(self.quarantined)


def _receipt(outcome: Accepted | KeyTaken) -> Any:
    return outcome.receipt if isinstance(outcome, Accepted) else outcome.record.receipt


def _overlap(a: Claim, b: Claim) -> bool:
    return a.lease.lo < b.lease.hi and b.lease.lo < a.lease.hi
