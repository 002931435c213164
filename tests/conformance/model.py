"""What a random history has acknowledged so far, and what must therefore hold of the lake."""

from __future__ import annotations

from collections.abc import Sequence

from lakebus.receipts import Receipt
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, BatchState, Claim, KeyTaken, NewEntry
from storage.bus.receipting import parse_batch_id
from storage.catalog.interface import Commit, CommitOutcome, Published
from tests.conformance.harness import LakeHarness
from tests.conformance.worker import Place, ReadEntry

Acknowledged = Accepted | KeyTaken


class LakeModel:
    """`entries` by place; `published` by place to its snapshot; `keyed` by idempotency key."""

    def __init__(self) -> None:
        self.entries: dict[Place, NewEntry] = {}
        self.keyed: dict[str, tuple[NewEntry, Receipt]] = {}
        self.published: dict[Place, int] = {}
        self.quarantined: set[Place] = set()
        self.epoch = 0
        self.watermark: dict[int, int] = {}

    # --- what happened ------------------------------------------------------------------------

    def acknowledge(self, entry: NewEntry, outcome: Acknowledged) -> None:
        receipt = receipt_of(outcome)
        parsed = parse_batch_id(receipt.batch_id)
        assert parsed is not None
        place = parsed[1:]
        assert place not in self.entries
        self.entries[place] = entry
        if entry.idempotency_key is not None:
            self.keyed[entry.idempotency_key] = (entry, receipt)

    def take_claim(self, claim: Claim, read: Sequence[ReadEntry]) -> None:
        lease = claim.lease
        assert lease.epoch > self.epoch
        self.epoch = lease.epoch
        places = [(lease.shard, position) for position in range(lease.lo, lease.hi)]
        assert not set(places) & (self.published.keys() | self.quarantined)
        assert [entry.position for entry in read] == list(range(lease.lo, lease.hi))
        for place, entry in zip(places, read, strict=True):
            assert entry.ids == _ids(self.entries[place])

    def take_publication(self, commits: Sequence[Commit], published: Published) -> bool:
        """True when something was published."""

        assert published.outcomes.keys() == {commit.commit_id for commit in commits}
        done = [c for c in commits if published.outcomes[c.commit_id] is CommitOutcome.PUBLISHED]
        assert bool(done) == (published.snapshot_id is not None)
        for commit in done:
            bad = {entry.position for entry in commit.quarantined}
            for position in range(commit.lease.lo, commit.lease.hi):
                place = (commit.lease.shard, position)
                assert place not in self.published, "terminal twice"
                assert place not in self.quarantined, "terminal twice"
                if position in bad:
                    self.quarantined.add(place)
                else:
                    assert published.snapshot_id is not None
                    self.published[place] = published.snapshot_id
        return bool(done)

    # --- what must hold -----------------------------------------------------------------------

    async def check(self, lake: LakeHarness, tables: Sequence[TableSchema]) -> None:
        ends = await lake.bus.ends()
        for shard, end in ends.items():
            assert {p for s, p in self.entries if s == shard} == set(range(end))
        head = await lake.catalog.head()
        terminal = self.published.keys() | self.quarantined
        for shard, mark in head.watermark.items():
            assert self.watermark.get(shard, 0) <= mark
            pending = set(range(ends[shard])) - {p for s, p in terminal if s == shard}
            assert mark == min(pending, default=ends[shard])
        self.watermark = dict(head.watermark)
        for table in tables:
            rows = await lake.rows_by_entry(table_id=table.table_id)
            assert rows == self._rows_of(table.table_id)

    async def check_replay(self, lake: LakeHarness, key: str) -> None:
        entry, receipt = self.keyed[key]
        outcome = await lake.bus.append(entry)
        assert isinstance(outcome, KeyTaken)
        assert outcome.record.receipt == receipt
        assert outcome.record.fingerprint == entry.fingerprint

    async def check_drained(
        self,
        lake: LakeHarness,
        tables: Sequence[TableSchema],
        drained: Sequence[Published],
    ) -> None:
        """After a drain every acknowledged entry is terminal exactly once."""

        for published in drained:
            assert set(published.outcomes.values()) == {CommitOutcome.PUBLISHED}
        for place in self.entries.keys() - self.published.keys() - self.quarantined:
            status = await lake.bus.batch(f"b1-{place[0]}-{place[1]}")
            assert status is not None
            assert status.state is BatchState.PUBLISHED
            assert status.snapshot_id is not None
            self.published[place] = status.snapshot_id
        await self.check(lake, tables)
        for key in self.keyed:
            await self.check_replay(lake, key)
        assert len(await lake.bus.quarantine_items(limit=1_000)) == len(self.quarantined)

    def _rows_of(self, table_id: int) -> dict[Place, int]:
        """What the newest snapshot must hold of a table: whole entries, and no others."""

        return {
            place: part.batch.num_rows
            for place in self.published
            for part in self.entries[place].parts
            if part.table_id == table_id
        }


def receipt_of(outcome: Acknowledged) -> Receipt:
    return outcome.receipt if isinstance(outcome, Accepted) else outcome.record.receipt


def _ids(entry: NewEntry) -> list[int]:
    return [value for part in entry.parts for value in part.batch.column(0).to_pylist()]
