"""A short recorded run on a real backend, for the tests of the end state's dumps.

It works below HTTP and Ray, on the bus and the catalog of any conformance harness, so that the
facts in the dump come from the product and the record from outside of it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from lakebus.errors import LakebusError
from lakebus.schemas import TableSchema
from lakebus.tokens import TokenCodec, VisibilityToken
from storage.bus.interface import Accepted, KeyTaken
from tests.conformance.harness import LakeHarness, entry_of
from tests.history.record import (
    BatchSeen,
    Changed,
    Ddl,
    Groups,
    Ingest,
    Read,
    Receipt,
    Receipted,
    Rows,
    Status,
    Token,
)
from tests.history.recorder import Recorder
from tests.history.rows import group_of


class LakeRun:
    """One client that does everything in turn; `steps` of them, chosen by a seed."""

    def __init__(self, lake: LakeHarness, recorder: Recorder, *, seed: int) -> None:
        self.lake = lake
        self.recorder = recorder
        self.random = random.Random(seed)
        self.tables: list[TableSchema] = []
        self.requests = itertools.count(1)
        self.keyed: list[Ingest] = []
        self.by_place: dict[tuple[int, int], Ingest] = {}
        self.token: VisibilityToken | None = None
        self.published = 0

    async def start(self) -> None:
        self.codec = TokenCodec((await self.lake.catalog.identity()).token_secret)
        for name in ("t", "u"):
            with self.recorder.begin("c", Ddl("create", name)) as op:
                self.tables.append(await self.lake.create(name))
                op.ok(Changed((await self.lake.catalog.head()).snapshot_id))

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self.random.choice([self.send, self.send, self.again, self.publish, self.read])()

    async def finish(self) -> None:
        """Everything is terminal, and is asked for a last time."""

        await self.lake.drain()
        await self.read()
        for shard, position in sorted(self.by_place):
            await self.ask(shard, position)

    async def send(self) -> None:
        number = next(self.requests)
        names = self.random.choice([["t"], ["u"], ["t", "u"]])
        rows = self.random.randint(1, 3)
        request = Ingest(
            request=number,
            principal="1",
            target=names[0] if len(names) == 1 else "*",
            # The receipt counts the rows of all tables.
            tables=dict.fromkeys(names, rows),
            key=f"k{number}" if self.random.random() < 0.8 else None,
            ordering_key=self.random.choice(["a", "b"]),
        )
        if request.key is not None:
            self.keyed.append(request)
        await self.attempt(request)

    async def again(self) -> None:
        if self.keyed:
            await self.attempt(self.random.choice(self.keyed))

    async def attempt(self, request: Ingest) -> None:
        tables = [table for table in self.tables if table.name in request.tables]
        entry = entry_of(
            tables,
            range(next(iter(request.tables.values()))),
            key=request.key,
            ordering_key=request.ordering_key,
            note=f"request {request.request}",
        )
        with self.recorder.begin("c", request) as op:
            try:
                outcome = await self.lake.bus.append(entry)
            except LakebusError as error:
                op.error(error)
                return
            assert isinstance(outcome, Accepted | KeyTaken)
            replayed = isinstance(outcome, KeyTaken)
            receipt = outcome.record.receipt if isinstance(outcome, KeyTaken) else outcome.receipt
            token = self.codec.decode(receipt.visibility_token)
            self.by_place[next(iter(token.own))] = request
            op.ok(Receipted(Receipt.of(receipt.as_json(), token), replayed=replayed))

    async def publish(self) -> None:
        worker = self.lake.worker()
        claim = await self.lake.bus.claim(worker.owner)
        if claim is None:
            return
        bad = [claim.lease.lo] if self.published % 4 == 0 else []
        self.published += 1
        await worker.publish(await worker.stage(claim, quarantine=bad))

    async def read(self) -> None:
        names = ("t", "u")
        tokens = () if self.token is None else (Token.of(self.token),)
        with self.recorder.begin("c", Read(names, tokens)) as op:
            head = await self.lake.catalog.head()
            tables = {
                table.name: await self.groups(head.snapshot_id, table) for table in self.tables
            }
            self.token = VisibilityToken(head.history, head.snapshot_id)
            op.ok(Rows(head.snapshot_id, tables, Token.of(self.token)))

    async def groups(self, snapshot_id: int, table: TableSchema) -> Groups:
        rows = await self.lake.files.rows_at(
            self.lake.catalog, snapshot_id, table_id=table.table_id
        )
        return {
            self.by_place[place].request: group_of(self.by_place[place].request, table.name, count)
            for place, count in rows.items()
            if place in self.by_place  # the others are of unknown outcome, and nobody's to name
        }

    async def ask(self, shard: int, position: int) -> None:
        serial = len((await self.lake.catalog.identity()).histories)
        for batch_id in self._batch_ids(serial, shard, position):
            status = await self.lake.bus.batch(batch_id)
            if status is None:
                continue
            with self.recorder.begin("c", Status(batch_id)) as op:
                status = await self.lake.bus.batch(batch_id)
                assert status is not None
                op.ok(BatchSeen(status.state.value, status.snapshot_id, status.reason))

    @staticmethod
    def _batch_ids(serial: int, shard: int, position: int) -> Sequence[str]:
        return [f"b{line}-{shard}-{position}" for line in range(1, serial + 1)]
