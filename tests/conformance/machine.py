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
import uuid
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lakebus.clock import new_uuid
from lakebus.errors import LeaseLost, OutcomeUnknown, Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, Claim, KeyTaken, NewEntry, SchemaStale
from storage.catalog.interface import Commit, CommitOutcome, Published
from tests.conformance.harness import (
    SUITE_SETTINGS,
    Backend,
    Capability,
    LakeHarness,
    entry_of,
)
from tests.conformance.machine_rules import MoreRules
from tests.conformance.model import LakeModel
from tests.conformance.worker import Worker

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

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


class LakeMachine(MoreRules):
    """The rules. `held` are claims that the model gave to a worker, alive or not."""

    chosen_backend: ClassVar[Backend]

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self.model = LakeModel()
        self.held: list[tuple[Worker, Claim]] = []
        self.staged: dict[int, Commit] = {}
        self.publications: list[tuple[uuid.UUID, list[Commit], Published]] = []
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
        self.model.acknowledge(entry, outcome)

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
            self.model.acknowledge(entry, outcome)

    @precondition(lambda self: self.model.keyed)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.keyed)))
        self.run(self.model.check_replay(self.lake, key))

    @precondition(lambda self: self.model.keyed)
    @rule(data=st.data())
    def conflict(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.keyed)))
        entry, receipt = self.model.keyed[key]
        other = dataclasses.replace(entry, fingerprint=b"\xff" * 32)
        outcome = self.run(self.lake.bus.append(other))
        assert isinstance(outcome, KeyTaken)
        assert outcome.record.fingerprint == entry.fingerprint
        assert outcome.record.receipt == receipt

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

        self.model.acknowledge(entry, self.run(append()))

    # --- work ---------------------------------------------------------------------------------

    @rule(owner=_OWNERS, stage=st.booleans())
    def claim(self, owner: int, stage: bool) -> None:
        worker = self.lake.worker(owner=self.owners[owner])
        claim = self.run(worker.bus.claim(worker.owner))
        if claim is None:
            return
        assert claim.lease.hi - claim.lease.lo <= MACHINE_SETTINGS.claim_entries_max
        for _, other in self.held:
            if _overlap(other, claim):
                assert self.run(self.lake.bus.renew([other.lease])) == []
        self.take_claim(worker, claim)
        if stage:  # ready to be sent, and sent perhaps long after the lease was lost
            self.run(self._stage([(worker, claim)], quarantine=False))

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

    @precondition(lambda self: self.held and Capability.LOST_REPLIES in self.lake.capabilities)
    @rule(data=st.data())
    def publish_unheard(self, data: st.DataObject) -> None:
        commits = self.run(self._stage([data.draw(st.sampled_from(self.held))], quarantine=False))
        if not commits:  # nothing would be sent, and the loss would hit something later
            return
        publication_id = new_uuid()

        async def publish() -> Published | None:
            await self.lake.lose_next_reply("publish")
            try:
                return await self.lake.catalog.publish(publication_id, commits)
            except OutcomeUnknown:
                pass
            for _ in range(100):
                try:
                    return await self.lake.catalog.publish_outcome(publication_id)
                except Unavailable:
                    await self.lake.advance_s(0.02)
            raise AssertionError("the catalog never answered again")

        published = self.run(publish())
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
        self.held = [(self.lake.worker(owner=worker.owner), claim) for worker, claim in self.held]

    @rule()
    def purge(self) -> None:
        self.run(self.lake.bus.purge())

    @rule()
    def look(self) -> None:
        self.run(self.check())

    # --- steps that several rules share -------------------------------------------------------

    def _entry(self, ordering: int, rows: int, *, both: bool, keyed: bool) -> NewEntry:
        number = next(self._numbers)
        return entry_of(
            self.tables if both else self.tables[number % len(self.tables)],
            [number * 10 + n for n in range(rows)],
            key=f"k{number}" if keyed else None,
            ordering_key=str(ordering),
        )

    async def _stage(self, chosen: list[tuple[Worker, Claim]], *, quarantine: bool) -> list[Commit]:
        commits = []
        for worker, claim in chosen:
            epoch = claim.lease.epoch
            if epoch in self.staged:  # what is staged stays as it is, however often it is sent
                commits.append(self.staged[epoch])
                continue
            bad = [claim.lease.lo] if quarantine else []
            try:
                commits.append(await worker.stage(claim, quarantine=bad))
                self.staged[epoch] = commits[-1]
            except LeaseLost:
                assert await self.lake.bus.renew([claim.lease]) == []
                self.held.remove((worker, claim))
        return commits

    def publish_doomed(self, worker: Worker, claim: Claim) -> None:
        """What a coordinator does with an entry that failed alone often enough (B8)."""

        publication_id = new_uuid()
        staging = worker.stage(claim, quarantine=[claim.lease.lo], by_crash=True)
        try:
            commits = [self.run(staging)]
        except LeaseLost:
            return
        published = self.run(self.lake.catalog.publish(publication_id, commits))
        self._take(publication_id, commits, published)

    def _take(self, publication_id: uuid.UUID, commits: list[Commit], published: Published) -> None:
        if self.model.take_publication(commits, published):
            self.publications.append((publication_id, commits, published))
        self.run(self.check())

    async def _end(self) -> None:
        await self.model.check_drained(self.lake, self.living, await self.lake.drain())
        if self.backup is not None:
            await self.check_restored(self.backup)


def _overlap(a: Claim, b: Claim) -> bool:
    same_shard = a.lease.shard == b.lease.shard
    return same_shard and a.lease.lo < b.lease.hi and b.lease.lo < a.lease.hi
