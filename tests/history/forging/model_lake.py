"""A tiny model of a lake that keeps the contract: every method is one atomic step.

It shares no code with the product, so that an error of the product cannot hide in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from tests.history.end_state import (
    EndState,
    EntryFact,
    FileFact,
    QuarantineFact,
    Range,
    ShardEnd,
    SnapshotFact,
)
from tests.history.end_state import Line as HistoryLine
from tests.history.record import (
    BatchSeen,
    Changed,
    Covered,
    Ddl,
    Groups,
    Ingest,
    Read,
    Receipt,
    Receipted,
    Requeued,
    Result,
    Rows,
    Token,
)
from tests.history.rows import group_of

LINE = "00000000-0000-4000-8000-000000000001"
SHARDS = 2
Place = tuple[int, int]
Answer = Result | tuple[str, str | None]


@dataclass(slots=True)
class _Entry:
    request: Ingest
    receipt: Receipt
    state: str = "accepted"
    snapshot_id: int | None = None
    successor: str | None = None


@dataclass(slots=True)
class _Snapshot:
    snapshot_id: int
    time: str
    operation: str
    watermark: dict[int, int]
    tables: dict[str, Groups]
    files: dict[str, int] = field(default_factory=dict)


class ModelLake:
    """The server: every method is one atomic step."""

    def __init__(self) -> None:
        self.logs: list[list[_Entry]] = [[] for _ in range(SHARDS)]
        self.done: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self.watermark = [0] * SHARDS
        self.keys: dict[tuple[str, str, str], Place] = {}
        self.ranges: list[Range] = []
        self.ended: dict[str, int] = {}
        self.closed: set[str] = set()
        self.snapshots = [_Snapshot(1, _time(1), "genesis", dict.fromkeys(range(SHARDS), 0), {})]

    @property
    def head(self) -> _Snapshot:
        return self.snapshots[-1]

    def new_snapshot(self, operation: str, tables: dict[str, Groups]) -> _Snapshot:
        number = self.head.snapshot_id + 1
        mark = dict(enumerate(self.watermark))
        self.snapshots.append(_Snapshot(number, _time(number), operation, mark, tables))
        return self.head

    def entry(self, place: Place) -> _Entry:
        return self.logs[place[0]][place[1]]

    def ingest(self, request: Ingest) -> Answer:
        scope = (request.principal, request.target, request.key or "")
        if request.key is not None and scope in self.keys:
            stored = self.entry(self.keys[scope])
            if stored.request.variant != request.variant:
                return "idempotency_conflict", stored.receipt.batch_id
            return Receipted(stored.receipt, replayed=True)
        if any(table not in self.head.tables or table in self.closed for table in request.tables):
            return "table_not_found", None
        place = self.append(request)
        if request.key is not None:
            self.keys[scope] = place
        return Receipted(self.entry(place).receipt)

    def append(self, request: Ingest) -> Place:
        ordering = request.ordering_key or ",".join(sorted(request.tables))
        digest = hashlib.blake2b(f"{request.principal}:{ordering}".encode(), digest_size=2).digest()
        shard = digest[0] % SHARDS
        position = len(self.logs[shard])
        batch_id = f"b1-{shard}-{position}"
        token = Token(LINE, 0, {shard: position + 1}, ((shard, position),))
        answer = {
            "batch_id": batch_id,
            "target": request.target,
            "rows": sum(request.tables.values()),
            "rows_rejected": request.bad_rows,
            "payload_fingerprint": f"v1:{request.request}:{request.variant}",
        }
        self.logs[shard].append(_Entry(request, Receipt.of(answer, token)))
        return shard, position

    def publish(self, shard: int, lo: int, hi: int, condemned: set[int]) -> None:
        """Makes entries [lo, hi) terminal in a new snapshot."""

        tables = {table: dict(groups) for table, groups in self.head.tables.items()}
        files: dict[str, int] = {}
        number = self.head.snapshot_id + 1
        for position in range(lo, hi):
            entry = self.logs[shard][position]
            entry.snapshot_id = number
            if position in condemned:
                entry.state = "quarantined"
                continue
            entry.state = "published"
            request = entry.request
            for table, count in request.tables.items():
                group = group_of(request.request, table, count, variant=request.variant)
                tables[table][request.request] = group
                files[table] = files.get(table, 0) + count
        self.ranges.append(Range(shard, lo, hi, number))
        self.done[shard][lo] = hi
        while self.watermark[shard] in self.done[shard]:
            self.watermark[shard] = self.done[shard].pop(self.watermark[shard])
        self.new_snapshot("append", tables).files = files

    def free_runs(self) -> list[tuple[int, int, int]]:
        """(shard, lo, hi) of entries that are not terminal yet."""

        runs: list[tuple[int, int, int]] = []
        for shard, log in enumerate(self.logs):
            for position, entry in enumerate(log):
                if entry.state != "accepted":
                    continue
                if runs and runs[-1][0] == shard and runs[-1][2] == position:
                    runs[-1] = (shard, runs[-1][1], position + 1)
                else:
                    runs.append((shard, position, position + 1))
        return runs

    def verdict_on(self, tokens: tuple[Token, ...]) -> Answer | None:
        """None while the tokens are not covered, the refusal, or the covering answer."""

        head = self.head
        for token in tokens:
            if token.floor > head.snapshot_id:
                return None
            if any(head.watermark[shard] < p for shard, p in token.positions.items()):
                return None
        for place in sorted({place for token in tokens for place in token.own}):
            entry = self.entry(place)
            if entry.state == "quarantined" and entry.successor is None:
                return "quarantined", entry.receipt.batch_id
        return Covered(head.snapshot_id, Token(LINE, head.snapshot_id))

    def read(self, read: Read) -> Answer | None:
        if read.snapshot_id is not None:
            snapshot = self.snapshots[read.snapshot_id - 1]
        elif read.time is not None:
            snapshot = [s for s in self.snapshots if s.time <= read.time][-1]
        else:
            verdict = self.verdict_on(read.tokens)
            if not isinstance(verdict, Covered):
                return verdict
            snapshot = self.head
        if any(table not in snapshot.tables for table in read.tables):
            return "table_not_found", None
        lo, hi = read.window or (0, 1 << 62)
        tables = {
            table: {q: g for q, g in snapshot.tables[table].items() if lo <= q < hi}
            for table in read.tables
        }
        number = snapshot.snapshot_id
        return Rows(number, tables, Token(LINE, number), snapshot.time)

    def status(self, batch_id: str) -> Answer:
        _, shard, position = batch_id[1:].split("-")
        entry = self.entry((int(shard), int(position)))
        shown = entry.snapshot_id if entry.state == "published" else None
        return BatchSeen(entry.state, shown, None, entry.successor)

    def ddl(self, ddl: Ddl) -> Answer | None:
        head = self.head
        tables = dict(head.tables)
        if ddl.action == "create":
            if ddl.table in tables:
                return "table_exists", None
            tables[ddl.table] = {}
        elif ddl.action == "drop":
            self.closed.add(ddl.table)
            if any(
                ddl.table in e.request.tables
                for log in self.logs
                for e in log
                if e.state == "accepted"
            ):
                return None
            if ddl.table not in tables:
                return "table_not_found", None
            del tables[ddl.table]
            self.ended[ddl.table] = head.snapshot_id + 1
        snapshot = self.new_snapshot(ddl.action, tables)
        return Changed(snapshot.snapshot_id, Token(LINE, snapshot.snapshot_id))

    def requeue(self, batch_id: str) -> Answer:
        _, shard, position = batch_id[1:].split("-")
        entry = self.entry((int(shard), int(position)))
        if entry.successor is None:
            if any(table in self.closed for table in entry.request.tables):
                return "table_not_found", None
            successor = self.append(entry.request)
            entry.successor = self.entry(successor).receipt.batch_id
        return Requeued(entry.successor)

    def end_state(self) -> EndState:
        entries = [
            EntryFact(
                e.receipt.batch_id, s, p, sum(e.request.tables.values()), e.state, e.snapshot_id
            )
            for s, log in enumerate(self.logs)
            for p, e in enumerate(log)
        ]
        return EndState(
            lines=(HistoryLine(1, LINE, 0, {}),),
            shards=tuple(ShardEnd(s, len(self.logs[s]), self.watermark[s]) for s in range(SHARDS)),
            snapshots=tuple(
                SnapshotFact(
                    s.snapshot_id,
                    s.snapshot_id - 1 or None,
                    1,
                    s.time,
                    s.operation,
                    s.watermark,
                    s.files,
                )
                for s in self.snapshots
            ),
            ranges=tuple(sorted(self.ranges, key=lambda row: (row.shard, row.lo))),
            files=tuple(
                FileFact(
                    f"{s.snapshot_id}-{table}", table, rows, s.snapshot_id, self.ended.get(table)
                )
                for s in self.snapshots
                for table, rows in s.files.items()
            ),
            entries=tuple(entries),
            quarantined=tuple(
                QuarantineFact(e.receipt.batch_id, s, p, e.successor)
                for s, log in enumerate(self.logs)
                for p, e in enumerate(log)
                if e.state == "quarantined"
            ),
            drained=True,
        )


def _time(number: int) -> str:
    return f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}.{number // 3600:06}Z"
